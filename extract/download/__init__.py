"""Downloads from the public internet: bounded, polite, and trusting nothing."""
