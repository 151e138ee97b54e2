"""Tests that need long: `make soak`, or `python -m tests.soak [PART ...]`."""
