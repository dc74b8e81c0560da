"""Samples in training order: which ones, in which order, read by ranges, and a loader over them."""

from shards.stream.stream import Item, Stream

__all__ = ["Item", "Stream"]
