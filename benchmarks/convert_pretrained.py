"""What a pretrained model loses in constant memory: loss on long texts and needles, by rows per head.

    python benchmarks/convert_pretrained.py --model DIR --prose hamlet.txt --code argparse.py \
        --probe-prose address.txt --probe-code inspect.py --out docs/results/convert.json

DIR is a model of transformers, such as SmolLM2-135M-Instruct (`ovq convert --gguf-file` makes one of a GGUF).
Compared are, with equal rows per key/value head: full attention; the first 4 tokens and a window; slots and
a window, all heads alike; what a probe of the heads shares out; and the same with fitted biases, as `ovq
convert` has it (`--methods fitted`). The probe reads other texts (`--probe-prose`, `--probe-code`) than those
the loss is measured on. What `ovq convert` has written is measured by
`--methods adapted --adapted DIR...`, one for each share. `--draw` draws the losses of the file by rows, and
ends.

Every number is written as soon as it is there, and a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ovq.convert import (
    MemoryConfig,
    Option,
    Probe,
    attach,
    default_options,
    fitted_bias,
    hidden_numbers,
    load,
    probe,
)
from ovq.runtime.files import write_atomic
from ovq_lab.eval.reading import read_losses, read_pieces, target_losses
from ovq_lab.plots.canvas import NullLocator
from ovq_lab.plots.panels import new_panels, save
from ovq_lab.plots.style import MIXER_STYLES, PAIRS, PALETTE
from ovq_lab.runtime.environment import environment
from ovq_lab.text.haystack import NeedleBuilder

SINKS = 4
VALUE_WEIGHT = 1.0
# Weight of the needle text in the probe; the other texts have 1.
NEEDLE_WEIGHT = 0.1
# A window without slots has smaller chunks, so that it nearly slides token by token. Its size is increased by
# half a chunk and rounded up, as it holds on average half a chunk less than its size.
WINDOW_CHUNK = 32
PIECE = 512
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def main() -> None:
    """Measure the rows that are missing in the file."""
    arguments = parsed()
    if arguments.draw:
        draw(json.loads(arguments.out.read_text())["rows"], arguments.out.with_suffix(".png"))
        return
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = {name: getattr(arguments, name).read_text() for name in ("prose", "code")}
    ids = {name: torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for name, text in texts.items()}
    results = Results(arguments.out, about=vars(arguments) | {"environment": environment("cpu")})
    lab = Lab(arguments, tokenizer)
    for length in arguments.lengths:
        for method, share in lab.methods():
            for name, tokens in ids.items():
                key = {"what": "loss", "text": name, "length": length, "method": method, "share": share}
                results.add(key, lambda k=key, t=tokens: lab.loss(k, t[: k["length"]]))
    for length in arguments.needle_lengths:
        for kind in arguments.needles:
            for method, share in lab.methods():
                for index, depth in enumerate(DEPTHS):
                    key = {"what": "needle", "text": kind, "length": length, "method": method, "share": share}
                    key |= {"index": index, "depth": depth}
                    results.add(key, lambda k=key: lab.needle(k))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    for name in ("--prose", "--code", "--probe-prose", "--probe-code"):
        parser.add_argument(name, type=Path, required=True, help="a text file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--probe-file", type=Path, help="where the probe is kept between runs")
    parser.add_argument("--probe-tokens", type=int, default=2048)
    parser.add_argument(
        "--equal-weights", action="store_true", help="merge tokens as if all were of the same use"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[1 / 4, 1 / 12], help="rows / context")
    parser.add_argument("--lengths", type=int, nargs="*", default=[3072, 6144])
    parser.add_argument("--needle-lengths", type=int, nargs="*", default=[2500, 4000])
    parser.add_argument("--needles", nargs="*", default=["noise", "essay"], help="noise (S1), essay (S2)")
    parser.add_argument("--methods", nargs="+", default=["full", "window", "slots", "probed"])
    parser.add_argument("--adapted", nargs="*", default=[], help="a folder for each share")
    parser.add_argument("--merge", default="nearest")
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="draw the losses that are in the file, and end")
    return parser.parse_args()


class Results:
    """The file of results."""

    def __init__(self, path: Path, *, about: dict[str, Any]) -> None:
        self._path = path
        self._content = json.loads(path.read_text()) if path.exists() else {"rows": []}
        self._content["about"] = {
            k: v if isinstance(v, (int, float, dict)) else str(v) for k, v in about.items()
        }

    def add(self, key: dict[str, Any], measure: Any) -> None:
        """Measure and write a row, unless the file has it."""
        if any(key.items() <= row.items() for row in self._content["rows"]):
            return
        start = time.process_time()
        row = key | measure() | {"cpu_seconds": round(time.process_time() - start, 1)}
        self._content["rows"].append(row)
        write_atomic(self._path, json.dumps(self._content, indent=1) + "\n")
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


class Lab:
    """Measures the model with the memory of each method."""

    def __init__(self, arguments: argparse.Namespace, tokenizer: Any) -> None:
        self.arguments, self.tokenizer = arguments, tokenizer
        self._loaded: tuple[Any, Any] = (None, None)
        self._probe: Probe | None = None

    def methods(self) -> list[tuple[str, float]]:
        """The compared methods, each with the share of the context kept as rows."""
        wanted = self.arguments.methods
        return [("full", 1.0)] * ("full" in wanted) + [
            (method, share) for share in self.arguments.shares for method in wanted if method != "full"
        ]

    def loss(self, key: dict[str, Any], ids: torch.Tensor) -> dict[str, float]:
        """Mean loss on the last third of a text, in nats per token."""
        model, cache, about = self._model(key)
        start = len(ids) * 2 // 3
        for _ in read_pieces(model, ids[: start - 1], cache, piece_size=PIECE):
            pass
        losses = read_losses(model, ids[start - 1 :], cache, piece_size=PIECE)
        return {"loss": float(losses.mean()), **about}

    def needle(self, key: dict[str, Any]) -> dict[str, float]:
        """Whether greedy generation gives the number, the share of its tokens that are the argmax, and
        whether all digits are: in a play, a newline may be more likely than the space before them.
        """
        texts = [self.arguments.prose.read_text()] if key["text"] == "essay" else []
        builder = NeedleBuilder(self.tokenizer, haystack=key["text"], value="number", texts=texts)
        needle = builder.build(key["length"], depth=key["depth"], seed=0, index=key["index"])
        model, cache, about = self._model(key)
        prompt, answer = torch.from_numpy(needle.prompt), torch.from_numpy(needle.answer)
        for _ in read_pieces(model, prompt[:-1], cache, piece_size=PIECE):
            pass
        inputs = torch.cat([prompt[-1:], answer[:-1]])
        [hidden] = read_pieces(model, inputs, cache, piece_size=len(inputs))
        is_first = target_losses(model, hidden, answer)[1]
        is_digit = torch.tensor([self.tokenizer.decode([token]).isdigit() for token in answer.tolist()])
        found = {
            "found": is_first.all(),
            "tokens": is_first.float().mean(),
            "digits": is_first[is_digit].all(),
        }
        return {name: float(value) for name, value in found.items()} | about

    def _model(self, key: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
        """The model, an empty cache, and the rows per head."""
        wanted = (key["method"], key["share"], key["length"])
        if wanted != self._loaded[0] and key["method"] == "adapted":
            folder = self.arguments.adapted[self.arguments.shares.index(key["share"])]
            self._loaded = wanted, load(folder, dtype=getattr(torch, self.arguments.dtype))
        if wanted != self._loaded[0]:
            model = self._original()
            if key["method"] != "full":
                attach(model, config=self._config(key["method"], key["share"] * key["length"], key["length"]))
            self._loaded = wanted, model
        model = self._loaded[1]
        if key["method"] == "full":
            return model, DynamicCache(config=model.config), {"rows": key["length"]}
        return model, model.make_cache(), {"rows": model.memory_config.rows_per_head}

    def _original(self) -> Any:
        dtype = getattr(torch, self.arguments.dtype)
        return AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=dtype).eval()

    def _config(self, method: str, rows: float, length: int) -> MemoryConfig:
        size = self.arguments.chunk_size
        settings = {"merge": self.arguments.merge, "value_weight": VALUE_WEIGHT}
        if method == "fitted":
            config = self._config("probed", rows, length)
            return fitted_bias(self._original(), self._probe_texts(), config)
        if method == "probed":
            probed = self._probed()
            if length > 8 * rows:
                # As in `default_options`, no head keeps all tokens if rows are few.
                kept = {"options": probed.options[:-1], "losses": probed.losses[..., :-1]}
                probed = dataclasses.replace(probed, **kept)
            found = probed.config(rows, scale=length / self.arguments.probe_tokens)
            # A probe from a file may have used another merge rule.
            return dataclasses.replace(found, merge=self.arguments.merge)
        config = self._original().config
        heads = {"num_layers": config.num_hidden_layers, "num_kv_heads": config.num_key_value_heads}
        if method == "window":
            window = -(-int(rows - SINKS + WINDOW_CHUNK / 2) // WINDOW_CHUNK) * WINDOW_CHUNK
            own = {"num_slots": 0, "window": window, "chunk_size": WINDOW_CHUNK}
        else:
            window = max(size, round(rows / 3 / size) * size)
            own = {"num_slots": round(rows) - SINKS - window, "window": window, "chunk_size": size}
        return MemoryConfig.uniform(**heads, **own, num_sinks=SINKS, **settings)

    def _probed(self) -> Probe:
        """Probe of the heads on its texts and on needles in the first of them; saved to `--probe-file`."""
        path = self.arguments.probe_file
        if self._probe is None and path is not None and path.exists():
            self._probe = torch.load(path, weights_only=False)
        if self._probe is None:
            length, size = self.arguments.probe_tokens, self.arguments.chunk_size
            prose = self.arguments.probe_prose.read_text()
            random = np.random.default_rng(7)
            needles, is_answer = hidden_numbers(self.tokenizer, prose, length, random=random)
            # Sizes in steps of one chunk, for all shares, and an option that keeps all tokens.
            options = default_options(0, num_sinks=SINKS, chunk_size=size, length=length)
            options += (Option(num_slots=length - SINKS - 4 * size, window=4 * size),)
            self._probe = probe(
                self._original(),
                [*self._probe_texts(), torch.from_numpy(needles)],
                targets=[None, None, torch.from_numpy(is_answer)],
                weights=[1, 1, NEEDLE_WEIGHT],
                options=options,
                num_sinks=SINKS,
                chunk_size=size,
                merge=self.arguments.merge,
                value_weight=VALUE_WEIGHT,
                has_use=not self.arguments.equal_weights,
                progress=lambda done: print(f"probe: {done} trials", flush=True),
            )
            if path is not None:
                torch.save(self._probe, path)
        return self._probe

    def _probe_texts(self) -> list[torch.Tensor]:
        """Token ids of the probe's texts, without needles."""
        paths = (self.arguments.probe_prose, self.arguments.probe_code)
        ids = [self.tokenizer(path.read_text(), verbose=False)["input_ids"] for path in paths]
        return [torch.tensor(each[: self.arguments.probe_tokens]) for each in ids]


def draw(rows: list[dict], path: Path) -> None:
    """Plot the loss on the last third against rows per head, one panel per text."""
    lines = {
        "window": ("a window and its first tokens", MIXER_STYLES["sink_attention"]),
        "slots": ("slots, all heads alike", PALETTE[1]),
        "probed": ("slots, as probed", MIXER_STYLES["ovq"]),
        "equal": ("ovq convert if all tokens count alike", PALETTE[2]),
        "fitted": ("ovq convert", MIXER_STYLES[PAIRS]),
    }
    titles = {"prose": "prose (Hamlet)", "code": "code (argparse.py)"}
    losses = [row for row in rows if row["what"] == "loss"]
    ticks = sorted({round(row["rows"]) for row in losses if row["method"] == "fitted"})
    figure, panels = new_panels(len(titles))
    for axes, (text, title) in zip(panels, titles.items(), strict=True):
        found = [row for row in losses if row["text"] == text]
        [full] = [row["loss"] for row in found if row["method"] == "full"]
        axes.axhline(full, label="full attention", color="black", linestyle=":")
        for method, (label, style) in lines.items():
            points = sorted((row["rows"], row["loss"]) for row in found if row["method"] == method)
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style.options())
        axes.set(
            xscale="log", title=title, xlabel="rows per head, on average", ylabel="loss (nats per token)"
        )
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    save(figure, path)


if __name__ == "__main__":
    main()
