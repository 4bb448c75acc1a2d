"""Loss by the bytes of what a pretrained model remembers: full caches and slots, in several formats.

    python benchmarks/cache_bytes.py --model FOLDER --texts hamlet.txt,argparse.py --out convert_bytes.json

The folder is that of a model of transformers which presets come with; `--presets` are rows of these, or
folders of `ovq convert --save-preset`. Losses are those of the last 1,024 of 3,072 tokens and the last 2,048
of 8,192. A full cache in q8_0 or q4_0 keeps keys, after they are turned, and values in blocks of 32 numbers
with a float16 factor, rounded as GGUF's are; all else of it is float32. Converted models are in `--dtype`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ovq.convert import attach
from ovq.convert.presets import Preset, find_preset, load_preset
from ovq.hf.cache import CACHE_KEY
from ovq.runtime.files import write_atomic
from ovq_lab.runtime.environment import environment

# The number of last tokens whose loss counts, by tokens read.
NUM_TARGETS = {3072: 1024, 8192: 2048}
BLOCK = 32
# (largest magnitude of an integer in a block, bits per integer).
BLOCKS = {"q8_0": (127, 8), "q4_0": (8, 4)}
STATE_DTYPES = ("float32", "bfloat16", "int8")


def as_blocks(x: Tensor, kind: str) -> Tensor:
    """Numbers `[..., D]` rounded as in GGUF's blocks."""
    most, bits = BLOCKS[kind]
    blocks = x.unflatten(-1, (-1, BLOCK))
    # In 4 bits the number of largest magnitude becomes -8, so the factor has the opposite sign.
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    factor = largest.abs() / most if bits == 8 else largest / -most
    numbers = (blocks / factor.masked_fill(factor == 0, 1)).round().clamp(-most, most - (bits == 4))
    return (numbers * factor.half().float()).flatten(-2)


class BlockCache(DynamicCache):
    """A full cache whose keys and values are rounded to blocks of a `kind` (None: float32)."""

    def __init__(self, kind: str | None) -> None:
        super().__init__()
        self._kind = kind

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append keys and values, rounded."""
        if self._kind is not None:
            key_states, value_states = (as_blocks(x, self._kind) for x in (key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take in blocks."""
        num = sum(x.numel() for layer in self.layers for x in (layer.keys, layer.values))
        return num * 4 if self._kind is None else num * BLOCKS[self._kind][1] // 8 + num // BLOCK * 2


@torch.inference_mode()
def read(model: Any, ids: Tensor, num_targets: int, cache: Any) -> tuple[float, int]:
    """Mean loss of the last `num_targets` tokens, and bytes of the cache after them."""
    length = ids.shape[1] - 1
    model(ids[:, : length - num_targets], logits_to_keep=1, **{CACHE_KEY: cache})
    logits = model(ids[:, length - num_targets : length], **{CACHE_KEY: cache}).logits[0]
    loss = nn.functional.cross_entropy(logits.float(), ids[0, length - num_targets + 1 :])
    return round(float(loss), 4), cache.nbytes


def preset_of(model: Any, name: str) -> Preset:
    """A preset by its rows, or by its folder."""
    if not name.isdecimal():
        return load_preset(name)
    if (preset := find_preset(model, int(name))) is None:
        raise ValueError(f"--model: expected one that presets of {name} rows come with, found another")
    return preset


def ways(folder: str, presets: str, dtype: str, *, has_full: bool) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the model and a cache factory of each way; full caches first, if any."""

    def load(dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    for kind in (None, *BLOCKS) if has_full else ():
        model = load()
        yield f"full cache, {kind or 'float32'}", model, lambda kind=kind: BlockCache(kind)
    for name in presets.split(","):
        for state_dtype in STATE_DTYPES:
            model = load(getattr(torch, dtype))
            preset = preset_of(model, name)
            model = attach(model, config=preset.config, state_dtype=state_dtype)
            yield f"{preset.rows} rows, slots in {state_dtype}, {dtype} model", model, model.make_cache


def main() -> None:
    """Read the options, measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True, help="files, with commas between them")
    parser.add_argument("--presets", default="256,768", help="rows, or folders, with commas between them")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--lengths", default="3072,8192", help="tokens read, with commas between them")
    parser.add_argument("--slots-only", action="store_true", help="leave out full caches")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = {
        Path(name).name: tokenizer(
            Path(name).read_text(encoding="utf-8"), return_tensors="pt", verbose=False
        ).input_ids
        for name in arguments.texts.split(",")
    }
    rows = []
    lengths = [int(length) for length in arguments.lengths.split(",")]
    has_full = not arguments.slots_only
    for way, model, make_cache in ways(
        arguments.model, arguments.presets, arguments.dtype, has_full=has_full
    ):
        for text, ids in texts.items():
            for length in lengths:
                num_targets = NUM_TARGETS[length]
                loss, num_bytes = read(model, ids[:, : length + 1], num_targets, make_cache())
                rows.append({"way": way, "text": text, "tokens": length, "loss": loss, "bytes": num_bytes})
                print(rows[-1], file=sys.stderr, flush=True)
    write_atomic(
        arguments.out, json.dumps({"environment": environment("cpu"), "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
