"""Changes a dataset: removes samples on request, removes repeated images."""
