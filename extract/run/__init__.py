"""The run of an extraction: plan, workers' tasks, shards, retries, progress."""
