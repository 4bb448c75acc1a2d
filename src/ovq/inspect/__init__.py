"""Inspect the memory: what the layers of a model keep of a text, what they merge, what each token reads.

`inspect_text` runs a model on a text and reconstructs its memory chunk by chunk; `write_page` shows it as one
self-contained HTML page, and `ovq_lab.plots.memory` in figures for papers.
"""

from ovq.inspect.converted import converted_memories
from ovq.inspect.layer import layer_memory, read_weights
from ovq.inspect.memory import DROPPED, EXACT, LayerMemory
from ovq.inspect.page import page_bytes, page_html, write_page
from ovq.inspect.pieces import token_pieces
from ovq.inspect.sharing import LEVEL_NAMES, Sharing, levels, sharing
from ovq.inspect.text import MAX_TOKENS, MOST_TOKENS, NUM_READS, InspectedText, inspect_text

__all__ = [
    "DROPPED",
    "EXACT",
    "LEVEL_NAMES",
    "MAX_TOKENS",
    "MOST_TOKENS",
    "NUM_READS",
    "InspectedText",
    "LayerMemory",
    "Sharing",
    "converted_memories",
    "inspect_text",
    "layer_memory",
    "levels",
    "page_bytes",
    "page_html",
    "read_weights",
    "sharing",
    "token_pieces",
    "write_page",
]
