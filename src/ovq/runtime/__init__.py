"""Shared by all commands: files, progress, verbosity."""
