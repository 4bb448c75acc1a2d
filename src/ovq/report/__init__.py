"""Showing results: progress, tables, figures, and files written in one piece."""
