"""A converted model beside the original on one long text: loss by position, seconds, and bytes kept.

    python benchmarks/convert_long.py --model DIR --converted DIR --text book.txt --out long.json

The converted model reads the whole text in pieces, and a row is written after each `--step` tokens. The
original reads in turns with it as far as `--full-length`. Beyond that, it is measured at the lengths of
`--at` alone: its cache is filled with keys and values that it has made, again and again, up to the last piece
before that length, and that piece is read. Such a row says `is_filled`; its times are those of reading the
text, since attention takes as long whatever keys hold, and it has no loss. At the same lengths, both generate
a few tokens, in turns. Times are those of the processor, so that other work on the machine matters
little.

With `--needles`, sentences that give a key a number of seven digits are put in at these places of the text.
After `--ask` tokens, a copy of a model's cache is asked for each of those that it has read. A needle is
found if every token of the number is the most likely one; its digits are, if all tokens but the space before
them are. Losses leave out the sentences.

With `--then`, the first `--then-length` tokens of each of these files are read at the end, once with a copy
of the converted model's cache and once with an empty one: whether the memory loses by what it has read
before. Such a row has the mean loss of all these tokens, and that of the last `--measured` of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ovq.convert import MemoryCache, load
from ovq.runtime.files import write_atomic
from ovq_lab.eval.models import branch
from ovq_lab.eval.reading import read_losses, read_pieces, target_losses
from ovq_lab.runtime.environment import environment

METHODS = ["converted", "full"]
NUM_GENERATED = 9
KEYS = ["amber", "badger", "candle", "falcon", "garden", "hammer", "island", "kettle", "lantern", "meadow"]
KEYS += ["orchard", "pepper", "ribbon", "saddle", "tunnel", "violin", "willow", "anchor", "basket", "comet"]


def main() -> None:
    """Read the text, and write rows after each step."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    dtype, length, step = getattr(torch, arguments.dtype), arguments.length, arguments.step
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = "\n\n".join(path.read_text() for path in arguments.text)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])[arguments.start :]
    ids, is_text, needles = hide(ids, tokenizer, arguments.needles)
    if len(ids) <= length:
        raise SystemExit(f"--length: expected at most {len(ids) - 1}, as the text has tokens, found {length}")
    ids, is_text = ids[: length + 1], is_text[: length + 1]
    if arguments.then and "converted" not in arguments.methods:
        raise SystemExit("--then: expected --methods with converted, which alone is read on")
    thens = []
    for path in arguments.then:
        then = torch.tensor(tokenizer(path.read_text(), verbose=False)["input_ids"])
        if len(then) <= arguments.then_length:
            found_length = f"{len(then) - 1} in {path}"
            raise SystemExit(f"--then-length: expected at most the tokens of each text, found {found_length}")
        thens.append(then[: arguments.then_length + 1])
    all_readers = {}
    if "converted" in arguments.methods:
        model = load(arguments.converted, dtype=dtype)
        all_readers["converted"] = Reader(model, model.make_cache(), arguments.piece)
    if "full" in arguments.methods:
        original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        all_readers["full"] = Reader(original, DynamicCache(config=original.config), arguments.piece)
    rows: list[dict[str, Any]] = []
    for start in range(0, length, step):
        end, is_filled = min(start + step, length), start >= arguments.full_length
        readers = dict(all_readers)
        if is_filled and end not in arguments.at:
            readers.pop("full", None)
        if is_filled and "full" in readers:
            readers["full"].fill(end - arguments.piece)
        for place in range(start, end, arguments.piece):
            for name, reader in readers.items():
                if name == "converted" or not is_filled or place + arguments.piece >= end:
                    part = slice(place, min(place + arguments.piece, end) + 1)
                    counts = is_text[part] if place >= end - arguments.measured else None
                    reader.read(ids[part], counts)
        found = {name: {"method": name, "tokens": end, **reader.row()} for name, reader in readers.items()}
        if is_filled and "full" in found:
            found["full"] |= {"is_filled": True, "loss": None}
        if end in arguments.at:
            times: dict[str, list[float]] = {name: [] for name in readers}
            for place in range(NUM_GENERATED):
                for name, reader in readers.items():
                    times[name].append(reader.decode(ids[place : place + 1], is_first=not place))
            for name, reader in readers.items():
                reader.copy = None
                found[name]["decode_ms"] = round(1000 * statistics.median(times[name]), 1)
        if end in arguments.ask:
            for name, reader in readers.items():
                found[name]["needles"] = [
                    {"place": place, **reader.knows(question, answer, digits)}
                    for place, question, answer, digits in needles
                    if place < end and (name == "converted" or not is_filled)
                ]
        rows += found.values()
        about = {name: str(value) for name, value in vars(arguments).items()}
        for name in ("text", "then"):
            about[name] = " ".join(path.name for path in vars(arguments)[name])
        content = {"about": about | {"environment": environment("cpu")}, "rows": rows}
        write_atomic(arguments.out, json.dumps(content, indent=1) + "\n")
        print(*found.values(), sep="\n", flush=True)
    if arguments.then:
        reader = all_readers["converted"]
        for path, then in zip(arguments.then, thens, strict=True):
            for read, cache in ((0, reader.model.make_cache()), (length, reader.cache.snapshot())):
                one = Reader(reader.model, cache, arguments.piece)
                rows.append({"then": path.name, "after": read, **one.follow(then, arguments.measured)})
                print(rows[-1], flush=True)
        write_atomic(arguments.out, json.dumps(content, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the original")
    parser.add_argument("--converted", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files, which are joined")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=int, default=0, help="tokens of the text that are left out")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--step", type=int, default=2048)
    parser.add_argument(
        "--measured", type=int, default=1 << 40, help="tokens at the end of each step whose losses count"
    )
    parser.add_argument("--piece", type=int, default=512, help="tokens that are read at a time")
    parser.add_argument("--full-length", type=int, default=8192, help="where the original stops reading")
    parser.add_argument(
        "--at", type=int, nargs="+", default=[2048 * 2**i for i in range(6)], help="where both are measured"
    )
    parser.add_argument(
        "--needles", type=int, nargs="*", default=[], help="places of numbers that are hidden"
    )
    parser.add_argument("--ask", type=int, nargs="*", default=[], help="where the model is asked for them")
    parser.add_argument(
        "--then", type=Path, nargs="*", default=[], help="files, each of which is read after the text"
    )
    parser.add_argument("--then-length", type=int, default=8192, help="tokens of each of these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def hide(
    ids: torch.Tensor, tokenizer: Any, places: list[int]
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Token ids with a sentence inserted at each place, a mask of the text's own tokens, and the needles.

    A needle is its place, the tokens of its question and of its answer, and a mask of the answer's digits.
    """
    generator, parts, needles, done = random.Random(0), [], [], 0
    for place, key in zip(sorted(places), KEYS, strict=False):
        stem = f"One of the special magic numbers for {key} is:"
        number = f" {generator.randrange(10**6, 10**7)}"
        question = f"\nWhat is the special magic number for {key} in the text above? {stem}"
        sentence, asked, answer = (
            torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (f"\n{stem}{number}.\n", question, number)
        )
        parts += [(ids[done:place], True), (sentence, False)]
        start = place + sum(len(x) for x, is_text in parts if not is_text) - len(sentence)
        digits = torch.tensor([tokenizer.decode([token]).isdigit() for token in answer.tolist()])
        needles.append((start, asked, answer, digits))
        done = place
    parts.append((ids[done:], True))
    is_text = list(itertools.chain(*([kind] * len(x) for x, kind in parts)))
    return torch.cat([x for x, _ in parts]), torch.tensor(is_text), needles


class Reader:
    """A model with its cache.

    Args:
        model: original or converted. cache: its cache. piece: tokens per call.
    """

    def __init__(self, model: Any, cache: Any, piece: int) -> None:
        self.model, self.cache, self.piece = model, cache, piece
        self.copy: Any = None
        self.losses: list[torch.Tensor] = []
        self.seconds, self.num_read = 0.0, 0

    def read(self, ids: torch.Tensor, counts: torch.Tensor | None) -> None:
        """Read all tokens but the last; keep losses on the next tokens that `counts` marks (None: none)."""
        begun = time.process_time()
        [hidden] = read_pieces(self.model, ids[:-1], self.cache, piece_size=self.piece)
        self.seconds += time.process_time() - begun
        self.num_read += len(ids) - 1
        if counts is not None:
            self.losses.append(target_losses(self.model, hidden, ids[1:])[0][counts[1:]])

    def follow(self, ids: torch.Tensor, num_last: int) -> dict[str, float]:
        """Mean loss on all tokens of a text but the first, and on the last `num_last` tokens."""
        losses = read_losses(self.model, ids, self.cache, piece_size=self.piece)
        return {
            "loss": round(float(losses.mean()), 4),
            "loss_of_last": round(float(losses[-num_last:].mean()), 4),
        }

    def fill(self, length: int) -> None:
        """Repeat the keys and values of the full cache up to `length` tokens."""
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                x = getattr(layer, name)
                setattr(layer, name, x.repeat(1, 1, -(-length // x.shape[2]), 1)[:, :, :length])

    @torch.no_grad()
    def knows(self, question: torch.Tensor, answer: torch.Tensor, digits: torch.Tensor) -> dict[str, bool]:
        """Whether all tokens of the answer are the argmax after the question (greedy generation gives it),
        and whether all its digits are; leaves the cache unchanged.
        """
        ids = torch.cat([question, answer])
        logits = self.model(ids[None, :-1], past_key_values=branch(self.cache)).logits[0]
        is_first = logits[-len(answer) :].argmax(-1) == answer
        return {"found": bool(is_first.all()), "digits": bool(is_first[digits].all())}

    @torch.no_grad()
    def decode(self, ids: torch.Tensor, *, is_first: bool) -> float:
        """Processor seconds of a decode step on a copy of the cache, made if `is_first`."""
        if is_first:
            self.copy = branch(self.cache)
        begun = time.process_time()
        self.model(ids[None], past_key_values=self.copy)
        return time.process_time() - begun

    def row(self) -> dict[str, Any]:
        """Mean loss and milliseconds per token since the last row, and bytes of the cache."""
        if isinstance(self.cache, MemoryCache):
            num_bytes = self.cache.nbytes
        else:
            num_bytes = sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))
        found = {
            "loss": round(float(torch.cat(self.losses).mean()), 4),
            "num_read": self.num_read,
            "ms_per_token": round(1000 * self.seconds / self.num_read, 3),
            "bytes": num_bytes,
        }
        self.losses, self.seconds, self.num_read = [], 0.0, 0
        return found


if __name__ == "__main__":
    main()
