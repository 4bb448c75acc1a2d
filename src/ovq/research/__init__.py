"""Experiments: figures of the paper and its rivals, benchmarks, the demonstration.

It may import everything, and only `cli` imports it.
"""
