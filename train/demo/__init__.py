"""Training of the embedded networks: base, estimators, detector."""
