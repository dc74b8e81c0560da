"""Cached latents and text-encoder outputs: their format, and the run that adds them to shards."""
