"""Looks at a dataset: verify, statistics, gallery, sheets."""
