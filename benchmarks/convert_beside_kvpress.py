"""What presses of kvpress lose where `convert_pretrained.py` measures converted models, on the same texts.

    python benchmarks/convert_beside_kvpress.py --model DIR --prose hamlet.txt --code argparse.py \
        --out docs/results/convert_kvpress.json

It needs kvpress (`pip install kvpress`) in an environment of its own: kvpress 0.5.5 asks for a transformers
older than the converted models do, so the two cannot run in one process.

A press works otherwise than a converted model. It reads a text with full attention, in one piece and with
all its keys and values in memory; then it drops all but `--rows` tokens per head, once; what is read later is
kept in full. So the loss on the last third is measured after a press of the first two thirds, and the cache
grows meanwhile. A needle's question comes after the press, which cannot know it.

All presses of a text share its first reading. Every number is written as soon as it is there, and a run that
was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ovq.runtime.files import write_atomic
from ovq.text.haystack import NeedleBuilder

PIECE = 512
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PRESSES = {
    "SnapKV": kvpress.SnapKVPress,
    "KeyDiff": kvpress.KeyDiffPress,
    "StreamingLLM": kvpress.StreamingLLMPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
}
QUESTION = "\nWhat is the special magic number for"


@torch.no_grad()
def main() -> None:
    """Measure what is missing in the file."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    results = Results(arguments.out, about=vars(arguments) | versions())
    for name in ("prose", "code"):
        ids = torch.tensor(tokenizer(getattr(arguments, name).read_text(), verbose=False)["input_ids"])
        for length in arguments.lengths:
            # As in convert_pretrained.py, the first token whose loss counts is the first of the last third.
            cut = length * 2 // 3 - 1
            key = {"what": "loss", "text": name, "length": length}
            results.add_all(key, model, ids[:length], cut, arguments.rows)
    for kind in arguments.needles:
        texts = [arguments.prose.read_text()] if kind == "essay" else []
        builder = NeedleBuilder(tokenizer, haystack=kind, value="number", texts=texts)
        for length in arguments.needle_lengths:
            for index, depth in enumerate(DEPTHS):
                needle = builder.build(length, depth=depth, seed=0, index=index)
                ids = torch.cat([torch.from_numpy(needle.prompt), torch.from_numpy(needle.answer)])
                key = {"what": "needle", "text": kind, "length": length, "index": index, "depth": depth}
                key["num_answer"] = len(needle.answer)
                cut = question_start(needle.prompt.tolist(), tokenizer)
                results.add_all(key, model, ids, cut, [length // 4])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--prose", type=Path, required=True, help="a text file")
    parser.add_argument("--code", type=Path, required=True, help="a text file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[3072])
    parser.add_argument("--rows", type=int, nargs="+", default=[768, 256], help="tokens kept per head")
    parser.add_argument("--needle-lengths", type=int, nargs="*", default=[2500])
    parser.add_argument("--needles", nargs="*", default=["noise", "essay"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def versions() -> dict[str, str]:
    """What was measured with."""
    from importlib.metadata import version

    return {
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def question_start(prompt: list[int], tokenizer: Any) -> int:
    """Where the question begins."""
    wanted = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    return max(i for i in range(len(prompt)) if prompt[i : i + len(wanted)] == wanted)


class Results:
    """The file of results."""

    def __init__(self, path: Path, *, about: dict[str, Any]) -> None:
        self._path = path
        self._content = json.loads(path.read_text()) if path.exists() else {"rows": []}
        self._content["about"] = {k: v if isinstance(v, int) else str(v) for k, v in about.items()}

    def add_all(self, key: dict[str, Any], model: Any, ids: Tensor, cut: int, kept: list[int]) -> None:
        """Measure what is missing of a text that is pressed after `cut` tokens, and write it."""
        methods = [("full", cut), *((name, rows) for rows in kept for name in PRESSES)]
        missing = [
            (name, rows)
            for name, rows in methods
            if not any({**key, "method": name, "rows": rows}.items() <= row.items() for row in self._rows)
        ]
        if not missing:
            return
        start = time.process_time()
        caches = pressed(model, ids[:cut], missing)
        seconds = time.process_time() - start
        for name, rows in missing:
            start = time.process_time()
            losses, is_first = read_on(model, caches.pop((name, rows)), ids, cut)
            if key["what"] == "loss":
                found = {"loss": float(losses.mean())}
            else:
                answer = is_first[-key["num_answer"] :].float()
                found = {"found": float(answer.all()), "tokens": float(answer.mean())}
            row = {**key, "method": name, "rows": rows, "rows_at_end": rows + len(ids) - 1 - cut, **found}
            row["cpu_seconds"] = round(time.process_time() - start, 1)
            row["cpu_seconds_of_first_reading"] = round(seconds, 1)
            self._rows.append(row)
            write_atomic(self._path, json.dumps(self._content, indent=1) + "\n")
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    @property
    def _rows(self) -> list[dict[str, Any]]:
        return self._content["rows"]


def pressed(model: Any, ids: Tensor, methods: list[tuple[str, int]]) -> dict[tuple[str, int], DynamicCache]:
    """A cache for each method and number of rows, after a text that is read once for all of them."""
    caches = {method: DynamicCache(config=model.config) for method in methods}
    presses = {}
    for name, rows in methods:
        if name != "full":
            presses[name, rows] = PRESSES[name](compression_ratio=1 - (rows + 0.5) / len(ids))
            presses[name, rows].post_init_from_model(model)

    def hook(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for method, cache in caches.items():
            keys, values = layer.keys, layer.values
            if method in presses:
                keys, values = presses[method].compress(
                    module, kwargs["hidden_states"], keys, values, output[1], kwargs
                )
                assert keys.shape[2] == method[1]
            cache.update(keys, values, module.layer_idx)

    hooks = []
    for layer in model.model.layers:
        # Where presses look for it.
        layer.self_attn.rotary_emb = model.model.rotary_emb
        hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
    try:
        model.model(ids[None], past_key_values=DynamicCache(config=model.config))
    finally:
        for each in hooks:
            each.remove()
    return caches


def read_on(model: Any, cache: DynamicCache, ids: Tensor, cut: int) -> tuple[Tensor, Tensor]:
    """Losses on the tokens after place `cut`, and whether each was the likeliest; all read is kept."""
    losses, is_first = [], []
    for place in range(cut, len(ids) - 1, PIECE):
        end = min(place + PIECE, len(ids) - 1)
        # Positions go on from the text; those of the mask follow from the cache.
        places = torch.arange(place, end)[None]
        logits = model(ids[None, place:end], position_ids=places, past_key_values=cache).logits[0].float()
        targets = ids[place + 1 : end + 1]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        is_first.append(logits.argmax(-1) == targets)
    return torch.cat(losses), torch.cat(is_first)


if __name__ == "__main__":
    main()
