"""`Prefixes`: a prefix cache, so that the common beginning of prompts is not read again.

The next prompt of a chat begins with all earlier messages, and many prompts begin with the same document. A
state represents all tokens that a row has read, at constant size in models with a constant state. So recent
states are kept by the tokens that they have read, and a prompt continues from its longest prefix with one.

States are kept after prompts and answers, but not after an answer that its text has ended, as a stop sequence
does: its row may have read on. Where two prompts with a common beginning diverge, a state is kept when the
second one is read, for the third and later ones. Every state is complete by itself, so the least recently
used one is evicted: of a long chat, the last state is enough.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from ovq.hf.rows import Rows

MIN_TOKENS = 16
"""Fewest tokens for which a state is worth keeping; reading fewer costs less."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """The cached state for a prompt.

    Attributes:
        rows: A copy of the row that has read its first `num_tokens` tokens; None if there is none.
        num_tokens: Number of tokens that need not be read.
        fork: Number of tokens shared with an earlier prompt, if a state should be kept there; else 0.
    """

    rows: Rows | None = None
    num_tokens: int = 0
    fork: int = 0


class Prefixes:
    """States by the tokens that were read. Only for the thread that runs the model, except for the counts."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # States and their bytes by root and tokens, in the order of their last use.
        self._states: OrderedDict[tuple[Hashable, bytes], tuple[Rows, int]] = OrderedDict()
        # The keys of each root, sorted, so that common beginnings are adjacent.
        self._sorted: dict[Hashable, list[bytes]] = {}
        self.nbytes = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._states)

    def find(self, root: Hashable, tokens: Sequence[int]) -> Known:
        """The cached state for a prompt, which leaves at least one token to read.

        The `root` is what states depend on besides tokens: the model's settings, and the context read before.
        """
        keys, prompt = self._sorted.get(root, []), _key(tokens)
        place = bisect_left(keys, prompt)
        # In sorted order, the longest common beginning is with one of the neighbours.
        shared = max((_num_common(key, prompt) for key in keys[max(0, place - 1) : place + 1]), default=0)
        known = prompt[:-_TOKEN_BYTES]
        # Any key that is a prefix of `known` is also a prefix of the last key before it in sorted order.
        while (place := bisect_right(keys, known)) and not known.startswith(key := keys[place - 1]):
            known = known[: _num_common(key, known) * _TOKEN_BYTES]
        num_tokens = len(keys[place - 1]) // _TOKEN_BYTES if place else 0
        shared = min(shared, len(tokens) - 1)
        fork = shared if shared - num_tokens >= MIN_TOKENS else 0
        if not num_tokens:
            return Known(fork=fork)
        found = root, keys[place - 1]
        self._states.move_to_end(found)
        return Known(rows=self._states[found][0].copied(), num_tokens=num_tokens, fork=fork)

    def add(self, root: Hashable, tokens: Sequence[int], rows: Rows) -> None:
        """Keep `rows`, which have read these tokens and must not be changed; evicts others for room."""
        key = _key(tokens)
        size = rows.nbytes + len(key)
        if size > self._max_bytes:
            return
        if (root, key) in self._states:
            self._drop(root, key)
        self._states[root, key] = rows, size
        insort(self._sorted.setdefault(root, []), key)
        self.nbytes += size
        while self.nbytes > self._max_bytes:
            self._drop(*next(iter(self._states)))
            self.num_evicted += 1

    def is_worth_keeping(self, num_tokens: int) -> bool:
        """Whether to keep a state `num_tokens` tokens after the last one."""
        return self._max_bytes > 0 and num_tokens >= MIN_TOKENS

    def forget(self, is_gone: Callable[[Hashable], bool]) -> None:
        """Drop all states of roots for which `is_gone` holds."""
        for root, key in list(self._states):
            if is_gone(root):
                self._drop(root, key)

    def _drop(self, root: Hashable, key: bytes) -> None:
        _, size = self._states.pop((root, key))
        self.nbytes -= size
        keys = self._sorted[root]
        del keys[bisect_left(keys, key)]
        if not keys:
            del self._sorted[root]


_TOKEN = np.dtype(np.int32)
_TOKEN_BYTES = _TOKEN.itemsize


def _key(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=_TOKEN).tobytes()


def _num_common(a: bytes, b: bytes) -> int:
    """Length in tokens of the common beginning of two keys."""
    num = min(len(a), len(b)) // _TOKEN_BYTES
    differs = np.frombuffer(a, _TOKEN, num) != np.frombuffer(b, _TOKEN, num)
    return int(differs.argmax()) if differs.any() else num
