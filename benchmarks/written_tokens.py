"""What a written token of a converted model costs by the format of its weights, in time and in loss.

    python benchmarks/written_tokens.py --model FOLDER --texts hamlet.txt,lear.txt --out tokens.json

The folder is that of a model of transformers. Times are medians, the ways in turns in one process: by the
modules of PyTorch, and in one compiled call with weights of each format. Losses are of texts read as prompts
with such weights, less those with the weights as they are. Weights that were once
dequantised lie on the grid that they are rounded to, so losses are also those of an equal model whose weights
do not.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ovq.convert import attach
from ovq.convert.packed import PACKED, pack_
from ovq.hf.cache import CACHE_KEY
from ovq.runtime.files import write_atomic
from ovq_lab.runtime.environment import environment

MEMORY = {"num_slots": 188, "window": 64}
WAYS = ("modules", "float32", "bfloat16", "int8", "int4")
# (tokens read before, rows of the batch).
SIZES = ((1000, 1), (4000, 1), (300, 4), (300, 8), (300, 32))
NUM_TURNS, NUM_TOKENS = 10, 6
NUM_TARGETS = 2048
# The module; `ovq.convert.attach` is the function of the same name.
ATTACH = sys.modules[attach.__module__]


@torch.inference_mode()
def times(model: nn.Module, ids: Tensor) -> list[dict]:
    """Median milliseconds per decode step of each way, for each of `SIZES`."""
    models = {way: copy.copy(model) for way in WAYS}
    for way, own in models.items():
        own.weight_dtype = None if way == "modules" else way
    rows = []
    for num_read, num_rows in SIZES:
        cache = model.make_cache()
        model(ids[:, :num_read], logits_to_keep=1, **{CACHE_KEY: cache})
        caches = {way: cache.selected([0] * num_rows) for way in WAYS}
        token = ids[:, num_read : num_read + 1].expand(num_rows, 1)
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(NUM_TURNS):
            for way, own in models.items():
                step = ATTACH.token_output if way != "modules" else lambda *_: None
                with mock.patch.object(ATTACH, "token_output", step):
                    for i in range(NUM_TOKENS + 1):
                        begin = time.perf_counter()
                        own(token, **{CACHE_KEY: caches[way]})
                        # Skip the first step: the processor caches still hold another way's weights.
                        if i:
                            found[way].append(time.perf_counter() - begin)
        medians = {way: round(1e3 * statistics.median(seconds), 2) for way, seconds in found.items()}
        rows.append({"tokens_read": num_read, "rows": num_rows, "milliseconds": medians})
        print(rows[-1], file=sys.stderr)
    return rows


@torch.inference_mode()
def losses(model: nn.Module, texts: dict[str, Tensor], *, is_moved: bool) -> list[dict]:
    """Loss of each text by weight format, and the mean difference to float32 with its standard error.

    Args:
        model: the model; its weights change if `is_moved`.
        texts: token ids of each text.
        is_moved: whether to move the weights off the quantization grid first.
    """
    if is_moved:
        move_off_grid_(model)
    models = {kind: _with_weights(model, kind) for kind in WAYS[1:]}
    rows: list[dict] = []
    for text, ids in texts.items():
        before: Tensor | None = None
        for kind, own in models.items():
            found = _loss(own, ids)
            before = found if before is None else before
            change = found - before
            rows.append(
                {
                    "text": text,
                    "weights": kind,
                    "off_grid": is_moved,
                    "loss": round(float(found.mean()), 4),
                    "change": round(float(change.mean()), 4),
                    "standard_error": round(float(change.std()) / len(change) ** 0.5, 4),
                }
            )
            print(rows[-1], file=sys.stderr)
    return rows


def _with_weights(model: Any, kind: str) -> Any:
    """A copy of a model with weights in a format, also for prompts."""
    own = copy.deepcopy(model)
    if kind in PACKED:
        pack_(own, kind)
        own.weight_dtype = kind
        return own
    for module in own.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(module.weight.to(getattr(torch, kind)))
    return own


def move_off_grid_(model: Any) -> None:
    """Rescale a Llama-like model in place so that it computes the same, but off the quantization grid.

    Norm weights are folded into the layers that read them. Channels of the values and of the MLP are scaled
    by random factors in the layers that write them, and by the inverses in those that read them.
    """
    generator = torch.Generator().manual_seed(0)

    def fold(norm: Any, *readers: nn.Linear) -> None:
        for reader in readers:
            reader.weight.mul_(norm.weight)
        norm.weight.fill_(1)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        fold(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        fold(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        per_head = torch.rand(len(attention.v_proj.weight), generator=generator) + 0.5
        heads = per_head.view(-1, 1, attention.head_dim).expand(-1, attention.num_key_value_groups, -1)
        up = torch.rand(len(mlp.up_proj.weight), generator=generator) + 0.5
        for maker, reader, made, read in (
            (attention.v_proj, attention.o_proj, per_head, heads.reshape(-1)),
            (mlp.up_proj, mlp.down_proj, up, up),
        ):
            maker.weight.mul_(made[:, None])
            reader.weight.div_(read)
    fold(model.model.norm, model.lm_head)


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    cache, found = model.make_cache(), []
    for part in range(0, NUM_TARGETS, 512):
        logits = model(ids[:, part : part + 512], **{CACHE_KEY: cache}).logits[0]
        found.append(nn.functional.cross_entropy(logits, ids[0, part + 1 : part + 513], reduction="none"))
    return torch.cat(found)


def main() -> None:
    """Read the options, measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True, help="files, with commas between them")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    files = [Path(name) for name in arguments.texts.split(",")]
    texts = {
        file.name: tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
        for file in files
    }
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    # Untied, so that rounding the output layer leaves the embeddings unchanged.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model = attach(model, **MEMORY)
    content = {
        "environment": environment("cpu") | {"torch_threads": torch.get_num_threads()},
        "memory": MEMORY,
        "times": times(model, next(iter(texts.values()))),
        "losses": [
            row
            for is_moved in (False, True)
            for row in losses(
                model, {name: ids[:, : NUM_TARGETS + 1] for name, ids in texts.items()}, is_moved=is_moved
            )
        ],
    }
    write_atomic(arguments.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
