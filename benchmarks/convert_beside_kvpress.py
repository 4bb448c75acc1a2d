"""What presses of kvpress lose where `convert_pretrained.py` measures converted models, on the same texts.

    python benchmarks/convert_beside_kvpress.py --model DIR --prose hamlet.txt --code argparse.py \
        --out docs/results/convert_kvpress.json

It needs kvpress (`pip install kvpress`) in an environment of its own: kvpress 0.5.5 asks for a transformers
older than the converted models do, so the two cannot run in one process. `--harness FILE` asks the questions
of RULER that `ovq eval harness` has asked and written to `harness.json`; their scores are lm-eval's, which
must be installed for it. `--speed` times each press.

A press works otherwise than a converted model. It reads a text with full attention, with all its keys and
values in memory; then it drops all but `--rows` tokens per head, once; what is read later is kept in full. So
the loss on the last third is measured after a press of the first two thirds, and the cache grows meanwhile. A
needle's question comes after the press, which cannot know it. RULER's question is asked both ways: after the
press, and before it, so that the press chooses what to keep by the question. Of KVzip and KVgrad it is asked
after the press alone: they are made for questions that are not known yet, and score a text by reading it
again in chunks of 2,048 and 512 tokens, each after a request to repeat it, as their authors do.

All presses of a text share its reading. Every number is written as soon as it is there, and a run that was
cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any

import kvpress
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)

from ovq.runtime.files import write_atomic
from ovq_lab.text.haystack import NeedleBuilder

PIECE = 512
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PRESSES = {
    "SnapKV": kvpress.SnapKVPress,
    "KeyDiff": kvpress.KeyDiffPress,
    "StreamingLLM": kvpress.StreamingLLMPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
    "Compactor": kvpress.CompactorPress,
    # Allocates rows among the heads of a layer; epsilon as its authors set it to make scores comparable.
    "ExpectedAttention, adaptive": lambda **ratio: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(epsilon=1e-2, **ratio)
    ),
}
QUESTION = "\nWhat is the special magic number for"
# How the questions of RULER begin.
QUESTIONS = ("\nQuestion:", QUESTION, QUESTION.replace("number", "uuid"))
# Tokens generated between checks whether answers are complete.
LOOK = 8


@torch.no_grad()
def main() -> None:
    """Measure the rows that are missing in the file."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    for layer in model.model.layers:
        # Presses read it from the attention layer.
        layer.self_attn.rotary_emb = model.model.rotary_emb
    results = Results(arguments.out, about=vars(arguments) | versions())
    for name in ("prose", "code"):
        ids = torch.tensor(tokenizer(getattr(arguments, name).read_text(), verbose=False)["input_ids"])
        for length in arguments.lengths:
            # As in convert_pretrained.py, the first token whose loss counts is the first of the last third.
            cut = length * 2 // 3 - 1
            key = {"what": "loss", "text": name, "length": length}
            kept = [(name, rows) for rows in arguments.rows for name in arguments.methods]
            results.add_all(key, model, ids[:length], cut, kept)
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
                counts = arguments.needle_rows or [length // 4, length // 12]
                kept = [(name, rows) for rows in counts for name in arguments.methods]
                results.add_all(key, model, ids, cut, kept)
    if arguments.harness is not None:
        samples = json.loads(arguments.harness.read_text())["samples"]
        for task in arguments.tasks:
            for index, sample in enumerate(samples[task]):
                key = {"what": "ruler", "task": task, "length": sample["doc"]["max_length"]}
                results.add_answers(
                    key, index, sample, model, tokenizer, arguments.methods, arguments.harness_rows
                )
    for length in arguments.speed:
        ids = torch.tensor(tokenizer(arguments.prose.read_text(), verbose=False)["input_ids"])
        results.add_speed(model, ids[:length])


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
    parser.add_argument("--methods", nargs="+", default=[*PRESSES, *REREADERS], help="presses")
    parser.add_argument("--needle-lengths", type=int, nargs="*", default=[2500])
    parser.add_argument("--needle-rows", type=int, nargs="*", help="tokens kept; else a quarter, a twelfth")
    parser.add_argument("--needles", nargs="*", default=["essay"])
    parser.add_argument("--harness", type=Path, help="harness.json of `ovq eval harness`")
    parser.add_argument("--tasks", nargs="*", default=["niah_single_1", "ruler_vt", "ruler_cwe", "ruler_fwe"])
    parser.add_argument("--harness-rows", type=int, default=1024, help="tokens kept per head for --harness")
    parser.add_argument("--speed", type=int, nargs="*", default=[], help="lengths at which presses are timed")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def versions() -> dict[str, str]:
    """Versions of the packages used."""
    from importlib.metadata import version

    return {
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def question_start(prompt: list[int], tokenizer: Any) -> int:
    """Index of the first token of the question."""
    wanted = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    return max(i for i in range(len(prompt)) if prompt[i : i + len(wanted)] == wanted)


class Results:
    """The file of results."""

    def __init__(self, path: Path, *, about: dict[str, Any]) -> None:
        self._path = path
        self._content = json.loads(path.read_text()) if path.exists() else {"rows": []}
        self._content["about"] = {k: v if isinstance(v, int) else str(v) for k, v in about.items()}

    def add_all(
        self, key: dict[str, Any], model: Any, ids: Tensor, cut: int, kept: list[tuple[str, int]]
    ) -> None:
        """Measure and write the missing rows of a text that is pressed after `cut` tokens."""
        methods = [("full", cut), *kept]
        missing = [(name, rows) for name, rows in methods if not self._find(**key, method=name, rows=rows)]
        if not missing:
            return
        reading = Reading(model)
        reading.read(ids[:cut])
        for name, rows in missing:
            start = time.process_time()
            cache, is_kept = reading.pressed(name, rows)
            losses, is_first = read_on(model, cache, ids, cut, is_kept)
            if key["what"] == "loss":
                found = {"loss": float(losses.mean())}
            else:
                answer = is_first[-key["num_answer"] :].float()
                found = {"found": float(answer.all()), "tokens": float(answer.mean())}
            row = {**key, "method": name, "rows": rows, "rows_at_end": rows + len(ids) - 1 - cut, **found}
            self._add(row | {"cpu_seconds": round(time.process_time() - start, 1)})

    def add_answers(
        self,
        key: dict[str, Any],
        index: int,
        sample: dict[str, Any],
        model: Any,
        tokenizer: Any,
        methods: list[str],
        rows: int,
    ) -> None:
        """Answer a RULER question with the presses whose answers are missing, and write their scores."""
        from lm_eval.tasks.ruler.common_utils import process_results

        [[prompt, options]], doc = sample["arguments"], sample["doc"]
        asked = [("full", "after"), *((name, "after") for name in methods)]
        asked += [(name, "before") for name in methods if name not in REREADERS]
        ways = [
            {**key, "method": name, "question": when, "rows": key["length"] if name == "full" else rows}
            for name, when in asked
        ]
        found = [self._find(**way) for way in ways]
        ways = [way for way, row in zip(ways, found, strict=True) if not row or len(row["scores"]) <= index]
        if not ways:
            return
        encoded = tokenizer(prompt, return_offsets_mapping=True)
        ids, begin = torch.tensor(encoded["input_ids"]), max(map(prompt.rfind, QUESTIONS))
        cut = next(i for i, (first, _) in enumerate(encoded["offset_mapping"]) if first >= begin)
        reading = Reading(model)
        pressed = []
        for when, end in (("after", cut), ("before", len(ids) - 1)):
            chosen = [way for way in ways if way["question"] == when]
            if chosen:
                reading.read(ids[reading.num_read : end])
            for way in chosen:
                cache, is_kept = reading.pressed(way["method"], rows)
                read_on(model, cache, ids, end, is_kept)
                pressed.append((way, cache, is_kept))

        def score(text: str) -> float:
            return process_results(doc, [text])[str(key["length"])]

        # Caches with as many rows as the text answer alone, the others in one batch.
        is_long = [one[0]["method"] == "full" or one[2] is not None for one in pressed]
        groups = [[one] for one in compress(pressed, is_long)]
        groups.append([one for one, alone in zip(pressed, is_long, strict=True) if not alone])
        for group in filter(None, groups):
            caches, is_kept = [cache for _, cache, _ in group], group[0][2]
            texts = generated(model, tokenizer, caches, ids, options["max_gen_toks"], score, is_kept)
            for (way, _, _), text in zip(group, texts, strict=True):
                row = self._find(**way) or self._add({**way, "scores": []})
                row["scores"].append(score(text))
                self._write()
                print(*key.values(), index, way["method"], row["scores"][-1], repr(text[:60]), flush=True)

    def add_speed(self, model: Any, ids: Tensor) -> None:
        """Time reading a text, alone and with each press to a quarter of its tokens."""
        for name in ("full", *PRESSES, *REREADERS):
            key = {"what": "speed", "length": len(ids), "method": name}
            if self._find(**key):
                continue
            start = time.process_time()
            reading = Reading(model)
            # This includes their first reading of the text.
            if name in REREADERS:
                scores_of(REREADERS[name], model, ids)
            else:
                reading.read(ids)
                reading.pressed(name, len(ids) // 4)
            self._add({**key, "cpu_seconds": round(time.process_time() - start, 2)})

    def _find(self, **key: Any) -> dict[str, Any] | None:
        return next((row for row in self._content["rows"] if key.items() <= row.items()), None)

    def _add(self, row: dict[str, Any]) -> dict[str, Any]:
        self._content["rows"].append(row)
        self._write()
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        return row

    def _write(self) -> None:
        write_atomic(self._path, json.dumps(self._content, indent=1) + "\n")


class Reading:
    """A text read with full attention, so that presses can choose from all of it.

    Attributes:
        ids: the pieces read. Rereaders score those that are there at their first use.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._hidden: list[list[Tensor]] = [[] for _ in model.model.layers]
        self._scores: dict[str, Tensor] = {}
        self.ids: list[Tensor] = []

    @property
    def num_read(self) -> int:
        """Number of tokens read."""
        return sum(map(len, self.ids))

    def read(self, ids: Tensor) -> None:
        """Read more tokens; keeps the inputs of the attention layers, which presses need."""

        def hook(module: Any, inputs: Any, kwargs: dict[str, Any]) -> None:
            self._hidden[module.layer_idx].append(kwargs["hidden_states"])

        hooks = [
            layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
            for layer in self._model.model.layers
        ]
        try:
            places = torch.arange(self.num_read, self.num_read + len(ids))[None]
            self._model.model(ids[None], position_ids=places, past_key_values=self._cache)
        finally:
            for each in hooks:
                each.remove()
        self.ids.append(ids)

    def pressed(self, name: str, rows: int) -> tuple[DynamicCache, list[Tensor] | None]:
        """A cache of `rows` per head, or a full cache and its kept rows, if heads keep different numbers."""
        cache = DynamicCache(config=self._model.config)
        places = torch.arange(self.num_read)[None]
        press, is_kept = None, []
        # Where heads keep different numbers, this follows kvpress but hides dropped rows by a mask. kvpress
        # replaces their keys by ones that no query attends to, which it cannot find for many queries at once.
        if name in REREADERS:
            if name not in self._scores:
                self._scores[name] = scores_of(REREADERS[name], self._model, torch.cat(self.ids))
            scores = self._scores[name]
            num_dropped = scores.numel() * (self.num_read - rows) // self.num_read
            is_dropped = torch.zeros(scores.numel(), dtype=torch.bool)
            is_dropped[(-scores.flatten()).topk(num_dropped).indices] = True
            is_kept = list(~is_dropped.view_as(scores)[:, 0])
        elif name != "full":
            press = PRESSES[name](compression_ratio=1 - (rows + 0.5) / self.num_read)
            press.post_init_from_model(self._model)
        for index, layer in enumerate(self._model.model.layers):
            keys, values = self._cache.layers[index].keys, self._cache.layers[index].values
            if press is not None:
                hidden = torch.cat(self._hidden[index], 1)
                given = {"position_embeddings": self._model.model.rotary_emb(hidden, places)}
                keys, values = press.compress(layer.self_attn, hidden, keys, values, None, given)
                if isinstance(press, kvpress.AdaKVPress):
                    _, heads, dropped = layer.self_attn.masked_key_indices
                    # Otherwise kvpress would change the keys of the next forward.
                    layer.self_attn.masked_key_indices = None
                    is_kept.append(torch.ones(keys.shape[1:3], dtype=torch.bool))
                    is_kept[-1][heads, dropped] = False
                else:
                    assert keys.shape[2] == rows
            cache.update(keys, values, index)
        return cache, is_kept or None


class Scores:
    """Mixin that stops a press after its scores, which do not depend on how much is kept."""

    def compress_post(self, model: Any) -> None:
        """Store the scores `[layers, 1, Hkv, T]`; the first tokens get the highest and are always kept."""
        self.score_val[..., : self.n_sink] = self.score_val.amax() + 1
        self.found = self.score_val


class ZipScores(Scores, kvpress.KVzipPress):
    """KVzip up to its scores."""


class GradScores(Scores, kvpress.KVgradPress):
    """KVgrad up to its scores."""


#: Rereaders: presses that read a text again to score it, and allocate rows among all heads.
REREADERS = {"KVzip": ZipScores, "KVgrad": GradScores}


def scores_of(kind: type[ZipScores | GradScores], model: Any, ids: Tensor) -> Tensor:
    """A rereader's scores of all keys and values of a text, `[layers, 1, Hkv, T]`; the highest are kept."""
    # With a ratio of 0 it would not compute scores.
    press = kind(compression_ratio=0.5)
    with press(model):
        model.model(input_ids=ids[None], past_key_values=DynamicCache(config=model.config))
        # It treats the first tokens as a chat template, which is not used here.
        press.prefix_length = 0
    return press.found


def attention_to_kept(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention to the rows marked in `module.is_kept` `[Hkv, T]` and to all later rows."""
    num, total = query.shape[2], key.shape[2]
    is_seen = torch.ones(num, total, dtype=torch.bool).tril(total - num)
    is_kept = F.pad(module.is_kept, (0, total - module.is_kept.shape[1]), value=True)
    per_head = query.shape[1] // key.shape[1]
    mask = is_seen & is_kept.repeat_interleave(per_head, 0)[:, None]
    o = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[None], scale=scaling, enable_gqa=True
    )
    return o.transpose(1, 2), None


AttentionInterface.register("kept", attention_to_kept)
AttentionMaskInterface.register("kept", lambda *args, **kwargs: None)


@contextmanager
def reading_kept(model: Any, is_kept: list[Tensor] | None) -> Iterator[None]:
    """Let layers attend only to the rows marked in `is_kept` and to all later ones (None: to all)."""
    before = model.config._attn_implementation
    if is_kept is not None:
        model.set_attn_implementation("kept")
        for layer, own in zip(model.model.layers, is_kept, strict=True):
            layer.self_attn.is_kept = own
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def read_on(
    model: Any, cache: DynamicCache, ids: Tensor, cut: int, is_kept: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Losses on the tokens after index `cut`, and whether each was the argmax; none is dropped."""
    losses, is_first = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for place in range(cut, len(ids) - 1, PIECE):
        end = min(place + PIECE, len(ids) - 1)
        # Positions continue those of the text; the mask follows from the length of the cache.
        places = torch.arange(place, end)[None]
        with reading_kept(model, is_kept):
            found = model(ids[None, place:end], position_ids=places, past_key_values=cache)
        logits = found.logits[0].float()
        targets = ids[place + 1 : end + 1]
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        is_first.append(logits.argmax(-1) == targets)
    return torch.cat(losses), torch.cat(is_first)


def generated(
    model: Any,
    tokenizer: Any,
    caches: list[DynamicCache],
    ids: Tensor,
    most: int,
    score: Any,
    is_kept: list[Tensor] | None = None,
) -> list[str]:
    """Greedy continuation of a text for each cache; no cache holds the last token of the text yet.

    Args:
        model: the model. tokenizer: its tokenizer.
        caches: caches after a press. ids: `[T]` the text.
        most: maximum number of tokens; stops once every answer has ended or scores 1, which more tokens keep.
        score: function that scores an answer.
        is_kept: the rows of the only cache that are attended to; None for all.
    """
    lengths = [cache.get_seq_length() for cache in caches]
    joined = DynamicCache(config=model.config)
    for index in range(len(model.model.layers)):
        layers = [cache.layers[index] for cache in caches]
        parts = [
            F.pad(torch.cat([layer.keys, layer.values]), (0, 0, max(lengths) - num, 0))
            for layer, num in zip(layers, lengths, strict=True)
        ]
        keys, values = torch.stack(parts, 1)
        joined.update(keys, values, index)
    is_real = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    token = ids[-1].expand(len(caches), 1)
    tokens: list[Tensor] = []
    for step in range(most):
        is_real = torch.cat([is_real, torch.ones_like(is_real[:, :1])], 1)
        places = torch.full_like(token, len(ids) - 1 + step)
        given = {"attention_mask": is_real.long(), "position_ids": places, "past_key_values": joined}
        with reading_kept(model, is_kept):
            token = model(token, **given).logits[:, -1:].argmax(-1)
        tokens.append(token)
        texts = []
        if (step + 1) % LOOK == 0 or step == most - 1:
            ends = [[*row.tolist(), tokenizer.eos_token_id] for row in torch.cat(tokens, 1)]
            ends = [row[: row.index(tokenizer.eos_token_id)] for row in ends]
            texts = [tokenizer.decode(row) for row in ends]
            if all(len(row) <= step or score(text) == 1 for row, text in zip(ends, texts, strict=True)):
                break
    return texts


if __name__ == "__main__":
    main()
