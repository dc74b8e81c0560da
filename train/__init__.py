"""Trains what infer runs, on what shards streams."""
