"""What every package stands on: errors, configuration, command lines, files at any URL."""
