"""Measures on captions of the demo world, by a detector that ships with the package."""
