"""Which pairs of a recall task a trained model keeps in slots of their own, and what that is worth.

A pair has several tokens, of which the long-range layer reads one: through the short convolution, the key of
this token encodes the pair's key, and its value the pair's value. Which token it is depends on training: the
value token itself in some models, the token after it in others. It is the token that questions attend to most
when nothing is merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ovq.hf import OVQForCausalLM
from ovq.hf.assignments import recording
from ovq.layers.ovq import RecordedCall
from ovq.ops import SlotAssignments
from ovq.ops.options import current_merge
from ovq.runtime.progress import WorkReporter
from ovq_lab.eval.accuracy import TOKENS_PER_BATCH, answers_of, check_vocabulary
from ovq_lab.eval.dictionaries import Dictionary, each_dictionary
from ovq_lab.eval.models import long_range_mixer
from ovq_lab.tasks import IGNORE_INDEX, RecallTask

NUM_PARTS = 16
"""Number of equal parts of the context, by which the ages of slots are counted."""
_MOST = 256
COUNT_NAMES = ("1", "2", *(f"{2**i + 1}-{2 ** (i + 1)}" for i in range(1, 8)), f"over {_MOST}")
"""Octaves of the number of tokens in a slot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptRow:
    """Accuracy of one model at one length, and statistics of its slots.

    A pair *has a slot of its own* if, at the moment of the question and in at least one head, its read token
    shares its slot with no read token of another pair. A repetition of the pair counts as well, and so does a
    token of the question's own chunk, which is read exactly.

    Attributes:
        mixer: The long-range mixer.
        num_slots: Slots of its dictionary during the test.
        merge: The merge rule during the test.
        length: Tokens per example.
        context_length: Tokens before the questions.
        num_questions: Number of questions.
        accuracy: Share of the questions answered correctly.
        layer: The layer that reads the pairs.
        offset: Position of the read token of a pair, counted from the pair's first token.
        weight: Share of the questions' attention on that token, if no tokens were merged.
        own_share: Share of the questions whose pair has a slot of its own.
        own_accuracy: Accuracy on these questions; `None` if there are none.
        shared_accuracy: Likewise on the others.
        heads_share: Share of the questions by the number of heads in which their pair has a slot of its own.
        clean_share: Share of the questions whose pair has a slot without any token of another pair.
        slot_counts: Share of slots by number of tokens (`COUNT_NAMES`), when the questions begin.
        oldest: Likewise by the part of the context that holds their oldest token.
        mean_position: Likewise by the part that holds the mean position of their tokens.
        effective_slots: Likewise exp(entropy) of the shares of tokens in slots, mean over heads.
        largest_share: Likewise the share of the tokens in the fullest slot, mean over heads.
    """

    mixer: str
    num_slots: int
    merge: str
    length: int
    context_length: int
    num_questions: int
    accuracy: float
    layer: int
    offset: int
    weight: float
    own_share: float
    own_accuracy: float | None
    shared_accuracy: float | None
    heads_share: dict[str, float]
    clean_share: float
    slot_counts: dict[str, float]
    oldest: dict[str, float]
    mean_position: dict[str, float]
    effective_slots: float
    largest_share: float


@torch.no_grad()
def evaluate_kept(
    model: OVQForCausalLM,
    task: RecallTask,
    *,
    num_slots: int,
    merge: str,
    num_examples: int,
    seed: int = 0,
    reporter: WorkReporter,
) -> KeptRow:
    """Evaluate a model, and find which pairs have a slot of their own when they are asked for.

    Args:
        model: Evaluated on its device and in its dtype; its dictionary is restored afterwards.
        task: The kind of data, at the length to test.
        merge: The merge rule, with its default growth.

    Raises:
        ValueError: If the model has no OVQ layers, or does not know all tokens of the task.
    """
    check_vocabulary(model, task)
    merge = current_merge(merge)
    work = reporter.start("what is kept", total=num_examples)
    batch_size = max(1, TOKENS_PER_BATCH // task.length)
    read_token: _ReadToken | None = None
    tally = _Tally()
    for _ in each_dictionary(model, [Dictionary(num_slots, merge)]):
        for first in range(0, num_examples, batch_size):
            indices = range(first, min(first + batch_size, num_examples))
            read_token = _evaluate_batch(model, task, seed, indices, read_token, tally)
            work.update(indices[-1] + 1)
    assert read_token is not None
    return KeptRow(
        mixer=long_range_mixer(model.config),
        num_slots=num_slots,
        merge=merge,
        length=task.length,
        context_length=task.context_length,
        **read_token._asdict(),
        **tally.fields(),
    )


class _ReadToken(NamedTuple):
    """Layer and token at which a model reads pairs; see `KeptRow`."""

    layer: int
    offset: int
    weight: float


def _evaluate_batch(
    model: OVQForCausalLM,
    task: RecallTask,
    seed: int,
    indices: range,
    read_token: _ReadToken | None,
    tally: _Tally,
) -> _ReadToken:
    """Evaluate a batch of examples and add it to the tally; returns where the model reads pairs."""
    batch = task.build(seed, indices=indices, split="test")
    pairs = _Pairs(task, *task.pair_places(seed, indices=indices, split="test"))
    with recording(model) as calls:
        answers = answers_of(model, batch)
    is_right = answers == batch.labels[batch.labels != IGNORE_INDEX]
    if read_token is None:
        candidates = [
            _ReadToken(i, *_most_read(_weights(of_layer[-1], pairs), pairs)) for i, of_layer in calls.items()
        ]
        read_token = max(candidates, key=lambda found: found.weight)
    found = calls[read_token.layer][-1].assignments()
    tally.add_memory(found.after(task.context_length), task.context_length)
    # A question with several value tokens is right if all of them are.
    by_question = is_right.reshape(len(indices), task.num_queries, -1).all(-1)
    tally.add_questions(by_question, *pairs.owned(found, read_token.offset, model.config.chunk_size))
    return read_token


class _Pairs:
    """Pairs of a batch, those of the context first: first tokens `starts`, numbers `pairs`, both `[B, P]`."""

    def __init__(self, task: RecallTask, starts: np.ndarray, pairs: np.ndarray) -> None:
        self.task, self.starts, self.pairs = task, starts, pairs

    @property
    def questions(self) -> np.ndarray:
        """`[Q]` the last key token of each question, after which the value is predicted."""
        return self.starts[0, self.task.num_stored :] + self.task.key_length - 1

    def tokens(self, offset: int) -> np.ndarray:
        """`[B, P]` the token at this offset of each pair; the last token if the text ends before."""
        return np.minimum(self.starts + offset, self.task.length - 1)

    def owned(self, found: SlotAssignments, offset: int, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Number of heads in which the pair of each question has a slot of its own.

        Returns:
            `[B, Q]`, heads in which the slot has no read token (at `offset`) of another pair; and `[B, Q]`,
            heads in which it has no token of another pair at all.
        """
        read, own_tokens = self.tokens(offset), [self.tokens(i) for i in range(self.task.pair_length)]
        # The read token comes last and overrides: it may also be the first token of the next pair.
        every = np.stack([*own_tokens, read], 1)
        num_asked = len(self.questions)
        own, clean = (np.zeros((len(self.starts), num_asked), dtype=np.int64) for _ in range(2))
        chunks = self.questions // chunk_size
        for chunk in np.unique(chunks):
            slots = found.after(int(chunk) * chunk_size).cpu().numpy()
            asked = np.nonzero(chunks == chunk)[0]
            for b, of_row in enumerate(slots):
                labels = np.full(of_row.shape[1], -1)
                labels[read[b]] = self.pairs[b]
                all_labels = np.full(of_row.shape[1], -1)
                for tokens in every[b]:
                    all_labels[tokens] = self.pairs[b]
                for result, pair_of in ((own, labels), (clean, all_labels)):
                    is_own = _is_alone(of_row, pair_of)[:, read[b]]
                    for q in asked:
                        # Only occurrences of the pair before the question count; it begins after them.
                        place = self.task.num_stored + q
                        is_known = self.pairs[b, :place] == self.pairs[b, place]
                        result[b, q] = is_own[:, :place][:, is_known].any(-1).sum()
        return own, clean


def _is_alone(slots: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whether the slot of each token holds no token of another pair, `[H, T]`.

    Args:
        slots: `[H, T]` slots; -1 for tokens that are in no slot, which are alone.
        pairs: `[T]` pairs; -1 for tokens of no pair.

    Example:
        >>> _is_alone(np.array([[0, 0, 0, 1, 1, -1]]), np.array([3, -1, 3, 4, 5, 4]))
        array([[ True,  True,  True, False, False,  True]])
    """
    is_alone = np.ones(slots.shape, dtype=bool)
    for head, of_head in enumerate(slots):
        is_counted = (of_head >= 0) & (pairs >= 0)
        lowest = np.full(of_head.max(initial=0) + 1, np.iinfo(np.int64).max)
        highest = np.full_like(lowest, -1)
        np.minimum.at(lowest, of_head[is_counted], pairs[is_counted])
        np.maximum.at(highest, of_head[is_counted], pairs[is_counted])
        is_alone[head] = (of_head < 0) | (lowest >= highest)[of_head]
    return is_alone


def _weights(call: RecordedCall, pairs: _Pairs) -> Tensor:
    """Attention weights of the questions of the first example without merging, `[1, Q, T]`, mean over heads.

    The first example is enough: it has many questions, and it does not depend on the batch size.
    """
    asked = torch.from_numpy(pairs.questions).to(call.q.device)
    group = call.q.shape[2] // call.k.shape[2]
    queries = call.q[:1, asked].float() * call.scale.float()[:, None]
    keys = call.k[:1].float().repeat_interleave(group, 2)
    scores = torch.einsum("bqhk,bthk->bhqt", queries, keys)
    is_later = torch.arange(keys.shape[1], device=asked.device) > asked[:, None]
    return scores.masked_fill_(is_later, -torch.inf).softmax(-1).mean(1).cpu()


def _most_read(weights: Tensor, pairs: _Pairs) -> tuple[int, float]:
    """The offset with the highest mean attention weight, and that weight; `weights` `[B, Q, T]` are those of
    the first B examples."""
    num_examples, num_asked, num_places = len(weights), len(pairs.questions), pairs.pairs.shape[1]
    numbers = pairs.pairs[:num_examples]
    # All earlier occurrences of the pair count: in the context and in earlier questions.
    place = np.arange(num_places)
    is_known = numbers[:, -num_asked:, None] == numbers[:, None]
    is_known &= place < place[-num_asked:, None]
    found = []
    # The read token may be any of the pair, or the next.
    for offset in range(pairs.task.pair_length + 1):
        tokens = torch.from_numpy(pairs.tokens(offset)[:num_examples])
        on_pairs = weights.gather(2, tokens[:, None].expand(-1, num_asked, -1)).numpy()
        found.append(float((on_pairs * is_known).sum(-1).mean()))
    best = int(np.argmax(found))
    return best, found[best]


class _Tally:
    """Statistics of questions and slots, collected over batches."""

    def __init__(self) -> None:
        self._questions: list[tuple[np.ndarray, ...]] = []
        self._num_heads = 0
        # Of each head of each row: numbers of tokens in its slots, their oldest and their mean positions.
        self._slots: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add_questions(self, is_right: np.ndarray, own: np.ndarray, clean: np.ndarray) -> None:
        self._questions.append((is_right.ravel(), own.ravel(), clean.ravel()))

    def add_memory(self, slots: Tensor, num_tokens: int) -> None:
        """Add the slots `[B, H, T]` of a batch after `num_tokens` tokens."""
        self._num_heads = slots.shape[1]
        for of_head in slots.flatten(0, 1).cpu().numpy():
            position = np.nonzero(of_head >= 0)[0]
            if not len(position):
                continue
            count = np.bincount(of_head[position])
            total = np.bincount(of_head[position], weights=position)
            oldest = np.full(len(count), num_tokens)
            np.minimum.at(oldest, of_head[position], position)
            used = count > 0
            mean = total[used] / count[used] / num_tokens
            self._slots.append((count[used], oldest[used] / num_tokens, mean))

    def fields(self) -> dict[str, Any]:
        """The fields of a `KeptRow` that follow from the statistics."""
        right, own, clean = (np.concatenate(x) for x in zip(*self._questions, strict=True))
        counts, oldest, mean_position = (np.concatenate(x) for x in zip(*self._slots, strict=True))
        octave = np.minimum(np.ceil(np.log2(counts)), len(COUNT_NAMES) - 1).astype(int)
        shares = [count / count.sum() for count, _, _ in self._slots]
        return {
            "num_questions": len(right),
            "accuracy": float(right.mean()),
            "own_share": float((own > 0).mean()),
            "own_accuracy": _mean(right[own > 0]),
            "shared_accuracy": _mean(right[own == 0]),
            "heads_share": {str(n): float((own == n).mean()) for n in range(self._num_heads + 1)},
            "clean_share": float((clean > 0).mean()),
            "slot_counts": _shares(octave, COUNT_NAMES),
            "oldest": _by_part(oldest),
            "mean_position": _by_part(mean_position),
            "effective_slots": float(np.mean([np.exp(-(x * np.log(x)).sum()) for x in shares])),
            "largest_share": float(np.mean([x.max() for x in shares])),
        }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _by_part(places: np.ndarray) -> dict[str, float]:
    """Shares of relative positions (0 to 1) by part of the context."""
    names = [str(i + 1) for i in range(NUM_PARTS)]
    return _shares(np.minimum((places * NUM_PARTS).astype(int), NUM_PARTS - 1), names)


def _shares(kinds: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """The share of each kind, by its name.

    Example:
        >>> _shares(np.array([0, 0, 2, 0]), ["few", "some", "many"])
        {'few': 0.75, 'some': 0.0, 'many': 0.25}
    """
    shares = np.bincount(kinds, minlength=len(names)) / len(kinds)
    return dict(zip(names, shares.tolist(), strict=True))
