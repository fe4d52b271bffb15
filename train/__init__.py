"""Training programs: run them as ``python -m train.<name>``."""
