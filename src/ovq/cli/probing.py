"""The probe of `ovq convert`: its texts, its estimated cost, and its progress."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ovq.runtime.progress import Reporter

if TYPE_CHECKING:
    from ovq.convert.presets import Preset

# Seed of the numbers hidden in a text of the probe.
_NEEDLE_SEED = 7
# Measured for SmolLM2-135M and three texts of 3,072 tokens, on one core: docs/results/convert.md, "Presets".
_SECONDS = {"passes": 66.0, "trials": 41.0}
_WEIGHTS, _NUMBERS, _TOKENS, _OPTIONS = 134.5e6, 90 * 64, 3 * 3072, 24


def run_probe(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, str],
    *,
    name: str,
    rows: int,
    num_tokens: int,
    needle_weight: float,
    fit_bias: bool,
    settings: dict[str, Any],
) -> Preset:
    """Run a probe of a model that is not converted yet; returns the memory that it finds, as a preset.

    Args:
        model, tokenizer, name: The model, its tokenizer and its name.
        texts: Texts by name; if empty, those of the package. Numbers are hidden in the first one.
        rows: Average rows per head.
        num_tokens: Tokens to read of each text, at most the model's `max_position_embeddings`.
        needle_weight: Weight of the text with hidden numbers; each other text has 1.
        fit_bias: Whether to fit biases of the slots' scores.
        settings: `num_sinks`, `chunk_size`, `merge` and `value_weight` of the memory.
    """
    if tokenizer is None:
        raise ValueError(f"--probe: expected a model with a tokenizer, found none in {name}: give --no-probe")
    import numpy as np
    import torch
    import transformers

    import ovq
    from ovq.convert import Captures, default_options, fitted_bias, hidden_numbers, probe
    from ovq.convert.attach import kv_heads
    from ovq.convert.presets import Preset
    from ovq.convert.texts import default_texts

    texts = texts or default_texts()
    # Beyond the trained length the loss is high whatever a head keeps.
    most = min(num_tokens, getattr(model.config, "max_position_embeddings", None) or num_tokens)
    ids = [torch.tensor(tokenizer(text, verbose=False)["input_ids"][:most]) for text in texts.values()]
    read = [{"text": text, "tokens": len(x)} for text, x in zip(texts, ids, strict=True)]
    for file, x in zip(texts, ids, strict=True):
        if len(x) < 2:
            raise ValueError(f"--probe: expected texts of at least 2 tokens, found {len(x)} in {file}")
    targets: list[torch.Tensor | None] = [None] * len(ids)
    weights = [1.0] * len(ids)
    if needle_weight:
        random = np.random.default_rng(_NEEDLE_SEED)
        try:
            found = hidden_numbers(tokenizer, next(iter(texts.values())), len(ids[0]), random=random)
        except ValueError as error:
            raise ValueError(
                f"--needle-weight: expected 0 with {len(ids[0])} tokens of text (at most --probe-tokens and "
                f"the model's max_position_embeddings), found {needle_weight} ({error})"
            ) from error
        ids.append(torch.from_numpy(found[0]))
        targets.append(torch.from_numpy(found[1]))
        weights.append(needle_weight)
        read.append({"text": f"numbers hidden in {read[0]['text']}", "tokens": len(ids[-1])})
    length = max(map(len, ids))
    options = default_options(
        rows, num_sinks=settings["num_sinks"], chunk_size=settings["chunk_size"], length=length
    )
    if not options:
        raise ValueError(
            f"--probe-tokens: expected fewer rows than the {length} tokens of the longest text, found {rows}"
        )
    num_layers = model.config.num_hidden_layers
    with Reporter() as reporter:
        if most < num_tokens:
            reporter.say(f"Reads {most:,} tokens of a text, the model's max_position_embeddings")
        reporter.say(_cost_estimate(model, [len(x) for x in ids], len(options)))
        reading = reporter.start("probe, reading", total=3 * num_layers * len(ids))
        with Captures(model, progress=reading.update) as captures:
            for text, mask in zip(ids, targets, strict=True):
                captures.read(text, mask)
            learning = reporter.start("probe, learning", total=num_layers * len(ids))
            num_heads = sum(kv_heads(model))
            work = reporter.start("probe, trying", total=len(ids) * num_heads * len(options))
            result = probe(
                model,
                ids,
                options=options,
                rows=rows,
                targets=targets,
                weights=weights,
                **settings,
                captures=captures,
                progress=work.update,
                learning=learning.update,
            )
            config = result.config(rows)
            if fit_bias:
                work = reporter.start("probe, biases", total=len(texts))
                config = fitted_bias(
                    model, ids[: len(texts)], config, captures=captures, progress=work.update
                )
    measured = {
        "probe": read,
        "needle_weight": needle_weight,
        "dtype": str(model.dtype).removeprefix("torch."),
        "environment": {
            "processor": platform.processor() or platform.machine(),
            **{module.__name__: module.__version__ for module in (torch, transformers, ovq)},
        },
    }
    return Preset.of(model, config, name="", model_name=name, measured=measured)


def _cost_estimate(model: Any, lengths: list[int], num_options: int) -> str:
    """A line with the estimated time and disk space of a probe."""
    from ovq.convert.attach import kv_heads
    from ovq.convert.captures import LAST_PART

    heads = kv_heads(model)
    dim = getattr(model.config, "head_dim", None) or (
        model.config.hidden_size // model.config.num_attention_heads
    )
    tokens, numbers = sum(lengths), sum(heads) * dim
    weights = sum(p.numel() for p in model.parameters())
    seconds = _SECONDS["passes"] * weights / _WEIGHTS
    seconds += _SECONDS["trials"] * numbers / _NUMBERS * num_options / _OPTIONS
    seconds *= tokens / _TOKENS
    # Keys and values of all tokens; float32 queries and outputs, and gradients, of those that count.
    size = model.dtype.itemsize
    per_token = 2 * numbers * size
    per_token += len(heads) * model.config.num_attention_heads * dim * (2 * 4 + size) * LAST_PART
    minutes = max(1, round(seconds / 60))
    return (
        f"The probe reads {len(lengths)} texts, {tokens:,} tokens in all: about {minutes} min of one core "
        f"(estimated from SmolLM2-135M), and {tokens * per_token / 1e9:.1f} GB in {tempfile.gettempdir()}"
    )
