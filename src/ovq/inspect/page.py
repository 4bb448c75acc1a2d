"""The page of `ovq inspect`: one self-contained HTML file with its data, style and scripts.

Numbers are packed into base64, because a text of thousands of tokens has a weight for each token, head and
layer. The page's content security policy allows its own script and style by their hashes, and no network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from importlib import resources
from typing import Any

import numpy as np

import ovq
from ovq.inspect.memory import LayerMemory
from ovq.inspect.text import InspectedText
from ovq.runtime.files import write_atomic

MOST_BYTES = 64 * 2**20
"""Largest page that is written, as browsers take long to load larger ones."""

# In the order in which they run.
_SCRIPTS = ("data.js", "tools.js", "text.js", "token.js", "raster.js", "slots.js", "main.js")


def page_bytes(found: InspectedText) -> int:
    """Approximate size in bytes of the page of a text."""
    per_token = 0
    for memory in found.layers:
        per_token += memory.num_heads * (4 * memory.entries.shape[2] + 6) + 4 * memory.num_kv_heads
    packed = found.num_tokens * per_token + 6 * sum(len(memory.moves) for memory in found.layers)
    return int(packed * 4 / 3) + 20 * found.num_tokens


def page_html(found: InspectedText, *, layer: int | None = None, head: int | None = None) -> str:
    """The page as HTML, in ASCII.

    Args:
        found: The text and the memory.
        layer: Index in the model of the layer to show first; None for the highest one.
        head: The query head to show first; None for the one that reads the most from slots.

    Raises:
        ValueError: If there is no such layer or head, or the page would be larger than `MOST_BYTES`.
    """
    memory = found.layer(layer)
    head = found.reading_head(layer) if head is None else head
    if not 0 <= head < memory.num_heads:
        raise ValueError(f"head: expected 0 to {memory.num_heads - 1}, found {head}")
    if (size := page_bytes(found)) > MOST_BYTES:
        raise ValueError(
            f"expected a page of at most {MOST_BYTES / 1e6:.0f} MB, found {size / 1e6:.0f} MB "
            f"for {found.num_tokens:,} tokens of {sum(m.num_heads for m in found.layers)} heads; "
            "look at fewer tokens, or keep fewer weights of each query"
        )
    name = "".join(character if character.isprintable() else "\ufffd" for character in found.name)
    style = _file("page.css")
    script = '"use strict";\n(() => {\n' + "\n".join(map(_file, _SCRIPTS)) + "\n})();\n"
    parts = {
        "POLICY": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'",
        "TITLE": html.escape(f"ovq inspect: {name or 'a text'}"),
        "STYLE": style,
        "DATA": _json(page_data(found, layer=memory.layer, head=head)),
        "SCRIPT": script,
    }
    # In one pass, because a text may contain such a mark.
    made = re.sub("@@([A-Z]+)@@", lambda mark: parts[mark[1]], _file("page.html"))
    # Names may have any characters; character references keep the page in ASCII.
    return made.encode("ascii", "xmlcharrefreplace").decode()


def write_page(
    found: InspectedText, path: str | os.PathLike, *, layer: int | None = None, head: int | None = None
) -> None:
    """Write the page to a file completely or not at all; arguments and errors as in `page_html`."""
    write_atomic(path, page_html(found, layer=layer, head=head))


def page_data(found: InspectedText, *, layer: int, head: int) -> dict[str, Any]:
    """The data of the page, in the form that `data.js` reads."""
    return {
        "version": ovq.__version__,
        "model": found.model,
        "name": found.name,
        "hasIds": found.has_ids,
        "numGiven": found.num_given,
        "pieces": list(found.pieces),
        "merge": found.merge,
        "convSize": found.conv_size,
        "numLayers": found.num_layers,
        "levels": list(found.level_names),
        "first": {"layer": layer, "head": head, "token": _first_token(found.layer(layer), head)},
        "layers": [_layer_data(memory) for memory in found.layers],
    }


def _first_token(memory: LayerMemory, head: int) -> int:
    """The token to show first: the query with the largest weight on a single slot; the last one if none."""
    on_slots = np.where(memory.entries[head] >= 0, memory.weights[head], 0).max(-1)
    # The last one among equals, because more has been merged by then.
    return int(len(on_slots) - 1 - on_slots[::-1].argmax())


def _layer_data(memory: LayerMemory) -> dict[str, Any]:
    """One layer: numbers as base64 of little-endian arrays."""
    moves = [memory.moves[memory.moves[:, 1] == head][:, [0, 2, 3]] for head in range(memory.num_kv_heads)]
    kept, is_between = np.rint(memory.kept * 65535), (memory.kept > 0) & (memory.kept < 1)
    return {
        "layer": memory.layer,
        "numSlots": list(memory.num_slots),
        "numExact": list(memory.num_exact),
        "numSinks": memory.num_sinks,
        "chunkSize": memory.chunk_size,
        "numHeads": memory.num_heads,
        "numKvHeads": memory.num_kv_heads,
        "numReads": memory.entries.shape[2],
        "slots": _packed(memory.slots, "<i2"),
        "moves": [_packed(of_head, "<i2") for of_head in moves],
        # Only what is kept exactly, or not at all, has the highest and the lowest number.
        "kept": _packed(np.where(is_between, kept.clip(1, 65534), kept), "<u2"),
        "entries": _packed(memory.entries, "<i2"),
        "weights": _packed(np.rint(memory.weights * 65535), "<u2"),
        "shares": _packed(np.rint(memory.shares.clip(0, 1) * 65535), "<u2"),
    }


def _packed(values: np.ndarray, dtype: str) -> str:
    """Numbers as base64 of an array in C order."""
    return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode()


def _json(data: Any) -> str:
    """JSON that is safe between script tags: in ASCII, without characters that are special in HTML."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    """The hash by which a content security policy allows a script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    """The content of one of the page's source files; all are ASCII, as hashes are over bytes."""
    return (resources.files("ovq.inspect") / "files" / name).read_text(encoding="ascii")
