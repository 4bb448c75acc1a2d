"""Parallel worker processes, and the environment that is recorded with measurements."""
