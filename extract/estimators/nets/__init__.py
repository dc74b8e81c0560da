"""Networks of estimators that no library has."""
