"""`probe`: measure what every head loses with less memory, to allocate a number of rows to heads.

One forward pass with full attention and one backward pass give the queries, keys and values of all heads, and
the gradient g of the loss with respect to each head's output o. With a memory the output is o + d, and the
loss rises by about (g . d)^2 / 2 per token. This uses the Fisher information as the curvature of the loss, so
g is the gradient of the loss on tokens sampled from the model itself [ours]. Every head is tried with every
option separately, outside of the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovq.convert.attach import kv_heads
from ovq.convert.budgets import allocate, changes
from ovq.convert.captures import Captures, captures_of, check_texts, counted
from ovq.convert.config import MemoryConfig
from ovq.convert.distances import Distances, far_attention
from ovq.convert.trials import Option, trials
from ovq.convert.use import ExpectedUse
from ovq.ops.options import PAIR_MERGES

# Default options are multiples of a step; `rows` is at most about this many steps.
_STEPS = 24
# Windows without slots: at equal rows slots always lost less, except for the shortest.
_WINDOWS = (1, 2, 4, 8)
# A head may keep all of a text of at most this many times `rows` tokens. For longer texts, the other heads
# would lose more than that head gains.
_MOST_TIMES = 8
# Windows per number of slots. Twice as many options lose 0.7 % less (docs/results/convert.md).
_WINDOWS_WITH_SLOTS = {
    1: (2, 3),
    2: (2, 3),
    3: (2,),
    4: (2, 4, 6, 24),
    6: (4,),
    8: (4, 8, 12),
    12: (4,),
    16: (8,),
    24: (4, 8),
    48: (8,),
    64: (4,),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Result of `probe`: the loss of each head with each option.

    Attributes:
        options: the memories tried.
        losses: `[layers, heads, options]` rise of the loss in nats per token if that head alone gets the
            option; inf for options that were ruled out.
        num_sinks: first tokens kept exactly in all options.
        settings: `chunk_size`, `merge`, `value_weight`, `key_exponents` and `token_use` of all options.
        rows: rows per head for which options were ruled out; None if all were tried.
    """

    options: tuple[Option, ...]
    losses: Tensor
    num_sinks: int
    settings: dict[str, Any]
    rows: float | None = None

    def config(self, rows: float, *, scale: float = 1.0) -> MemoryConfig:
        """The config with at most `rows` rows per head on average, allocated by the losses of heads.

        Args:
            rows: mean of `num_sinks + num_slots + window` over all heads.
            scale: factor of all slots and windows, for texts that much longer than the probe's.

        Raises:
            ValueError: if no option is small enough, options were ruled out for other rows, or a number is
                out of range.
        """
        if math.isnan(rows):
            raise ValueError(f"rows: expected a number, found {rows}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale: expected a finite number above 0, found {scale}")
        if self.rows is not None and (rows, scale) != (self.rows, 1.0):
            raise ValueError(
                f"rows: expected {self.rows:g} (scale 1), for which options were ruled out, found {rows:g} "
                f"(scale {scale:g}); probe without rows for others"
            )
        layers, heads, _ = self.losses.shape
        size = self.settings["chunk_size"]
        options = [
            Option(
                num_slots=round(o.num_slots * scale),
                window=max(size, round(o.window * scale / size) * size),
            )
            for o in self.options
        ]
        costs = [o.rows(self.num_sinks) for o in options]
        chosen = allocate(self.losses.flatten(0, 1), costs, rows * layers * heads)

        def table(name: str) -> list[list[int]]:
            found = [getattr(options[i], name) for i in chosen]
            return [found[i : i + heads] for i in range(0, len(found), heads)]

        return MemoryConfig(
            num_slots=table("num_slots"), window=table("window"), num_sinks=self.num_sinks, **self.settings
        )


def default_options(
    rows: int, *, num_sinks: int, chunk_size: int, length: int | None = None
) -> tuple[Option, ...]:
    """Options of windows alone, and of slots with windows, in multiples of one or more chunks.

    Args:
        rows: average rows per head to allocate; at most about 24 steps.
        num_sinks, chunk_size: as in `attach`.
        length: tokens per text. Options with at least as many rows are left out, except one that keeps all
            tokens, since some heads must tell every token apart. That one is only offered for texts of at
            most 8 times `rows` tokens.

    Example:
        >>> options = default_options(260, num_sinks=4, chunk_size=32, length=3072)
        >>> [o.rows(4) for o in options[:4]], len(options)
        ([36, 68, 132, 260], 23)
        >>> default_options(768, num_sinks=4, chunk_size=32, length=3072)[-2:]
        (Option(num_slots=2048, window=128), Option(num_slots=2940, window=128))
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, found {chunk_size}")
    step = chunk_size * max(1, round(rows / (_STEPS * chunk_size)))
    windows = [(0, w) for w in _WINDOWS]
    slots = [(n, w) for n, sizes in _WINDOWS_WITH_SLOTS.items() for w in sizes]
    options = [Option(num_slots=step * n, window=step * w) for n, w in windows + slots]
    if length is None:
        return tuple(options)
    kept = [o for o in options if o.rows(num_sinks) < length]
    window = options[-1].window
    if num_sinks + window < length <= _MOST_TIMES * rows:
        # For long texts, also sizes in between.
        while 2 * kept[-1].num_slots < length - num_sinks - window:
            kept.append(Option(num_slots=2 * kept[-1].num_slots, window=window))
        kept.append(Option(num_slots=length - num_sinks - window, window=window))
    return tuple(kept)


def probe(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    *,
    options: Sequence[Option],
    rows: float | None = None,
    num_sinks: int = 4,
    chunk_size: int = 32,
    merge: str = "nearest",
    value_weight: float = 1.0,
    targets: Sequence[Tensor | None] | None = None,
    weights: Sequence[float] | None = None,
    has_distances: bool = True,
    has_use: bool = True,
    seed: int = 0,
    captures: Captures | None = None,
    progress: Callable[[int], None] | None = None,
    learning: Callable[[int], None] | None = None,
) -> Probe:
    """Measure the loss of every head of a model that is not converted yet with each option.

    Memory: that of one forward and backward pass, or of the `Captures` of one text.

    Args:
        model: as for `attach`; unchanged afterwards.
        texts: `[T]` token ids of each text; if possible, of the length that the memory is meant for.
        options: the memories to try.
        rows: the only rows per head that `config` will be called with: options that no head gets are then
            ruled out without a trial, among them most of the slow ones. None to try all.
        num_sinks, chunk_size, merge, value_weight: of all options, as in `attach`.
        targets: for each text a mask `[T]` of the tokens whose prediction counts, or None for all. With a
            mask, the loss is on the tokens of the text, otherwise on tokens sampled from the model.
        weights: weight of each text; None for 1 each. A text with a mask of few tokens that depend on memory
            has losses many times larger than others, and may need a lower weight.
        has_distances: whether to learn a metric for keys and values of each head as well (`Distances`), used
            in merges; `value_weight` multiplies the learned weight of values. It is learned on the texts
            without a mask, or on all if each has one.
        has_use: whether to learn the expected use of tokens as well (`ExpectedUse`), used in merges; on all
            texts, with their weights. Ignored by rules that do not merge pairs.
        seed: seed of the sampled tokens.
        captures: captures of the model, to share texts with other functions; None for new ones.
        progress: called with the number of trials made or ruled out so far, of texts x heads x options.
        learning: called before the trials with the number of layers, over texts, from which distances and
            uses were learned so far.

    Raises:
        ValueError: a model that cannot be converted, no options, fewer `rows` than the smallest option,
            texts of fewer than 2 tokens or of unknown ones, targets or weights that do not fit them, or
            captures of another model.
        OSError: no disk space for captures.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
        >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)
        >>> model = LlamaForCausalLM(config).eval()
        >>> options = [Option(num_slots=n, window=w) for n, w in ((0, 8), (8, 8), (0, 64))]
        >>> found = probe(model, [torch.arange(60) % 32], options=options, chunk_size=8)
        >>> found.losses.shape, found.config(40).rows_per_head <= 40
        (torch.Size([2, 1, 3]), True)
    """
    num_layers, num_heads = len(heads := kv_heads(model)), heads[0]
    if not options:
        raise ValueError("options: expected at least one, found none")
    check_texts(model, texts, targets)
    masks = [None] * len(texts) if targets is None else targets
    settings: dict[str, Any] = {"chunk_size": chunk_size, "merge": merge, "value_weight": value_weight}
    shares = torch.tensor(
        [1.0] * len(texts) if weights is None else weights, dtype=torch.float64, device="cpu"
    )
    if len(shares) != len(texts) or not bool((shares >= 0).all()) or not 0 < float(shares.sum()) < math.inf:
        raise ValueError(
            f"weights: expected a finite number of at least 0 for each of {len(texts)} texts, found {weights}"
        )
    shares = shares / shares.sum()
    # Tokens in the windows of all options are never in slots.
    sizes = {"num_sinks": num_sinks, "num_recent": min((o.window for o in options if o.num_slots), default=0)}
    losses = torch.zeros(num_layers * num_heads, len(options), dtype=torch.float64, device="cpu")
    is_tried = torch.zeros_like(losses, dtype=torch.bool)
    costs = [o.rows(num_sinks) for o in options]
    # Raises ValueError if `rows` are too few, before the slow part.
    wanted, count = _wanted(losses, is_tried, costs, rows), counted(progress)
    with captures_of(model, captures) as kept:
        if has_distances or has_use:
            is_of_distances = [has_distances and (m is None or None not in masks) for m in masks]
            uses = shares.tolist() if has_use and merge in PAIR_MERGES else [0.0] * len(texts)
            read = list(zip(texts, masks, is_of_distances, uses, strict=True))
            found = _learned(kept, read, seed, sizes, learning)
            if has_distances:
                settings["value_weight"] = [[value_weight * w for w in d.value_weights()] for d, _ in found]
                settings["key_exponents"] = [d.key_exponents() for d, _ in found]
            if any(uses):
                exponents = settings.get("key_exponents", [None] * len(found))
                settings["token_use"] = [use.numbers(e) for (_, use), e in zip(found, exponents, strict=True)]
        while bool(wanted.any()):
            for text, mask, share in zip(texts, masks, shares.tolist(), strict=True):
                # Files are memory-mapped, so requesting a text again costs almost nothing.
                layers = kept.of(text, mask, seed)
                losses += share * trials(layers, options, num_sinks, settings, wanted=wanted, progress=count)
            is_tried |= wanted
            wanted = _wanted(losses, is_tried, costs, rows)
        count(len(texts) * int((~is_tried).sum()))
    losses = losses.masked_fill(~is_tried, torch.inf).view(num_layers, num_heads, -1)
    return Probe(options=tuple(options), losses=losses, num_sinks=num_sinks, settings=settings, rows=rows)


def _wanted(losses: Tensor, is_tried: Tensor, costs: list[int], rows: float | None) -> Tensor:
    """Trials `[heads, options]` to run next, bool; none once the option of every head is known.

    `losses` `[heads, options]` are 0 for options not tried; `costs` are the rows of each option.
    """
    if rows is None:
        return ~is_tried
    wanted, cost = torch.zeros_like(is_tried), torch.tensor(costs, device="cpu")
    for head, option in changes(losses, costs, rows * len(losses)):
        if not is_tried[head, option]:
            # `allocate` usually takes most smaller options before this one, so try them in the same round.
            wanted[head] |= cost <= costs[option]
    if not bool(is_tried.any()):
        wanted |= cost <= rows
    return wanted & ~is_tried


def _learned(
    captures: Captures,
    texts: Sequence[tuple[Tensor, Tensor | None, bool, float]],
    seed: int,
    sizes: dict[str, int],
    progress: Callable[[int], None] | None,
) -> list[tuple[Distances, ExpectedUse]]:
    """Distances and expected uses of each layer, learned from texts.

    A text is its token ids, a mask, whether distances are learned from it, and its weight for uses.
    """
    count = counted(progress)
    layers: list[tuple[Distances, ExpectedUse]] = []
    for text, mask, has_distances, weight in texts:
        if not has_distances and not weight:
            continue
        captured = captures.of(text, mask, seed)
        layers = layers or [(Distances(c.k.shape[1], c.k.shape[3]), ExpectedUse()) for c in captured]
        for (distances, use), c in zip(layers, captured, strict=True):
            if has_distances:
                distances.start(c.k, c.v, num_targets=c.num_targets)
            if weight:
                use.start(c.k, c.v, num_targets=c.num_targets, num_sinks=sizes["num_sinks"], weight=weight)
            for part in far_attention(c.q, c.k, c.v, o=c.o, g=c.g, **sizes):
                if has_distances:
                    distances.see(*part)
                if weight:
                    use.see(*part)
            count(1)
    return layers
