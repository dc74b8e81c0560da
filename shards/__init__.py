"""What a sample is, and the dataset on disk: encode, write, index, read, verify, look."""
