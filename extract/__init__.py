"""From image-text pairs to shards: sources, estimators, and the run on Ray."""
