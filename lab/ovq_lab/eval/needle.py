"""Needle in a haystack: retrieval of one sentence from a long text, by length and depth.

Run it as `ovq eval needle --model DIR --lengths 1024,4096 --haystack noise --value number`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from ovq.hf.cache import CACHE_KEY
from ovq.hf.streaming import Sampling
from ovq.runtime.progress import WorkReporter
from ovq_lab.eval.dictionaries import dictionaries_to_test, each_dictionary
from ovq_lab.eval.models import branch, check_logits, long_range_mixer, new_cache, row_fields
from ovq_lab.eval.reading import PIECE_SIZE, read_pieces, target_losses
from ovq_lab.eval.rows import NamedRow, model_label
from ovq_lab.text.haystack import Needle, NeedleBuilder

_EXTRA_TOKENS = 16
"""Tokens that a model may generate beyond those of the value before it counts as not found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleRow(NamedRow):
    """Scores of one model at one depth and one length (most tokens of prompt and answer together).

    Attributes:
        haystack: Kind of text, `"noise"` or `"essay"`.
        value: Kind of value, `"word"`, `"number"` or `"uuid"`.
        depth: Relative position of the needle, from 0 (the beginning) to 1 (right before the question).
        num_examples: Number of questions.
        num_distractors: Number of wrong values that the right one is compared with.
        generated: Share of questions after which greedy generation produces the value.
        token_accuracy: Share of the values' tokens that the model ranks first, given those before them.
        choice: Share of questions whose value is more likely than each of the distractors; `1 / (1 +
            num_distractors)` by guessing.
    """

    haystack: str
    value: str
    depth: float
    num_examples: int
    num_distractors: int
    generated: float
    token_accuracy: float
    choice: float


class Score(NamedTuple):
    """The scores of a model on one question."""

    is_generated: bool
    token_accuracy: float
    is_chosen: bool


def evaluate_needle(
    model: PreTrainedModel,
    builder: NeedleBuilder,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_slots: Sequence[int] = (),
    merges: Sequence[str] = (),
    num_examples: int = 5,
    seed: int = 0,
    piece_size: int = PIECE_SIZE,
    reporter: WorkReporter,
    name: str = "",
) -> list[NeedleRow]:
    """Evaluate needle retrieval at several lengths and depths and with several dictionaries.

    Args:
        model: A model of this library, a converted one, or a causal language model of transformers;
            evaluated on its device and in its dtype; its dictionary is restored afterwards.
        builder: Builds the questions, with the model's tokenizer.
        lengths: Largest numbers of tokens of prompt and answer together, one test for each.
        depths: Relative positions of the needle, from 0 to 1.
        num_slots: Sizes of the dictionary to test, see `dictionaries_to_test`.
        merges: Merge rules to test, likewise.
        num_examples: Questions per length and depth; they are the same at every length and depth.
        piece_size: Tokens read at a time, which limits the memory needed.

    Returns:
        One row for each number of slots, each rule, each length and each depth, in that order.

    Raises:
        ValueError: If a number is out of range, a length has no room for a question, or the tokenizer has
            tokens that the model does not know.
    """
    if not lengths or not depths or num_examples < 1:
        raise ValueError(
            "expected lengths, depths and at least one example, "
            f"found {list(lengths)}, {list(depths)} and {num_examples}"
        )
    # Fail before anything is read if a question cannot be built.
    for index in range(num_examples):
        for depth in {min(depths), max(depths)}:
            builder.build(min(lengths), depth=depth, seed=seed, index=index)
    tested = dictionaries_to_test(model.config, num_slots=num_slots, merges=merges)
    total = len(tested) * sum(lengths) * len(depths) * num_examples
    label = model_label(long_range_mixer(model.config), None, name)
    work, done = reporter.start(f"needles {label}", total=total), 0
    rows = []
    for dictionary in each_dictionary(model, tested):
        check_logits(model)
        for length, depth in itertools.product(lengths, depths):
            scores = []
            for index in range(num_examples):
                needle = builder.build(length, depth=depth, seed=seed, index=index)
                scores.append(ask(model, builder.tokenizer, needle, piece_size=piece_size))
                done += length
                work.update(done, note=f"{dictionary.note}length {length}, depth {depth:.0%}")
            rows.append(
                NeedleRow(
                    name=name,
                    **row_fields(model, dictionary, length),
                    haystack=builder.haystack,
                    value=builder.value,
                    depth=depth,
                    num_examples=num_examples,
                    num_distractors=builder.num_distractors,
                    generated=fmean(score.is_generated for score in scores),
                    token_accuracy=fmean(score.token_accuracy for score in scores),
                    choice=fmean(score.is_chosen for score in scores),
                )
            )
    return rows


@torch.no_grad()
def ask(model: PreTrainedModel, tokenizer: Any, needle: Needle, *, piece_size: int = PIECE_SIZE) -> Score:
    """Score a model on one question. The prompt is read once; generation and answers continue from its cache.

    Call `eval()` on the model first; it is used on its device and in its dtype.
    """
    highest = max(int(ids.max()) for ids in (needle.prompt, needle.answer))
    if highest >= model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected token ids below {model.config.vocab_size}, as the model knows, "
            f"found {highest}"
        )
    prompt = torch.from_numpy(needle.prompt).to(model.device)
    cache = new_cache(model)
    for _ in read_pieces(model, prompt[:-1], cache, piece_size=piece_size):
        # Only the cache is needed.
        pass
    output = model.generate(  # type: ignore[operator]  # a method of models with an output layer
        # All tokens but the last are in the cache.
        input_ids=prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=len(needle.answer) + _EXTRA_TOKENS,
        **Sampling().options,
        pad_token_id=model.config.pad_token_id or 0,
        **{CACHE_KEY: branch(cache)},
    )
    said = tokenizer.decode(output[0, len(prompt) :].tolist(), skip_special_tokens=True)
    losses, is_first = _forced(model, prompt[-1:], needle.answer, cache)
    others = [_forced(model, prompt[-1:], other, cache)[0].sum() for other in needle.distractors]
    return Score(
        is_generated=needle.value.lower() in said.lower(),
        token_accuracy=float(is_first.float().mean()),
        is_chosen=bool(losses.sum() < torch.stack(others).min()),
    )


def _forced(
    model: PreTrainedModel, last: torch.Tensor, answer: np.ndarray, cache: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher-forced losses of an answer's tokens, and whether each was the most likely token."""
    ids = torch.from_numpy(answer).to(last.device)
    [hidden] = read_pieces(model, torch.cat([last, ids[:-1]]), branch(cache), piece_size=len(ids))
    return target_losses(model, hidden, ids)
