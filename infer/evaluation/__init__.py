"""Measures of generated images: what holds of the caption, what fits physically, what agrees, how close to real ones."""
