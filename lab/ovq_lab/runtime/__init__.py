"""Processes that work beside each other, and what stands beside a measured number."""
