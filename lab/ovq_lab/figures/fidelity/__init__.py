"""Memories of equal bytes compared with exact attention, without training: streams, memories, and errors."""
