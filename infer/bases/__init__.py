"""Base models: loading them, and what a pipeline is asked."""
