"""`Prefixes`: the states of rows after earlier prompts and answers, so that what is known is not read again.

The next prompt of a chat begins with all that was said before, and many prompts begin with one document. A
state stands for all tokens that a row has read, and takes constant memory in models of constant state. So the
last states are kept in a tree over tokens, and a prompt goes on from the longest prefix of it that has one.

States are kept after prompts and answers. Where prompts part that have begun alike, one is kept as soon as a
second prompt passes there: from the third on, they share what is before. Every state is complete by itself,
so the one that goes first is the one not used for longest, wherever in the tree it is: of a long chat, the
last state is enough.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np

MIN_TOKENS = 16
"""What reading fewer tokens costs is not worth a state."""


class State(Protocol):
    """What is kept: rows that have read a prefix, such as `ovq.hf.rows.Rows` of one row."""

    @property
    def nbytes(self) -> int:
        """Bytes of it."""

    def copied(self) -> Any:
        """Rows that have read the same and go on by themselves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a prompt.

    Attributes:
        rows: Rows that have read its first `num_tokens` tokens; None if there are none.
        num_tokens: See `rows`.
        fork: How many tokens it shares with an earlier prompt, if a state is worth keeping there; else 0.
    """

    rows: Any | None = None
    num_tokens: int = 0
    fork: int = 0


@dataclasses.dataclass(eq=False)
class _Node:
    """A place in the tree: tokens `edge` after its parent, `length` after the root."""

    parent: _Node | None
    edge: np.ndarray
    length: int
    children: dict[int, _Node] = dataclasses.field(default_factory=dict)
    rows: State | None = None
    nbytes: int = 0


class Prefixes:
    """States by the tokens that were read. Only the thread that runs the model uses it, but for its numbers.

    Args:
        max_bytes: Bytes of states, at most; 0 for none.

    Attributes:
        nbytes: Bytes of states kept.
        num_evicted: States that went to make room.

    Example:
        >>> from ovq.hf import OVQConfig, OVQForCausalLM
        >>> from ovq.hf.rows import Rows
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> prompt, rows = [1, 2, 3, 4] * 20, Rows.start(OVQForCausalLM(config).eval())
        >>> _ = rows.read([prompt])
        >>> prefixes = Prefixes(max_bytes=10**6)
        >>> prefixes.add("model", prompt, rows)
        >>> prefixes.find("model", [*prompt, 5]).num_tokens, prefixes.find("other model", [*prompt, 5])
        (80, Known(rows=None, num_tokens=0, fork=0))
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._roots: dict[Hashable, _Node] = {}
        # In the order of their last use.
        self._kept: OrderedDict[_Node, Hashable] = OrderedDict()
        self.nbytes = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, root: Hashable, tokens: Sequence[int]) -> Known:
        """What is known of a prompt, of which at least one token is left to read.

        Args:
            root: What the states depend on beside tokens: the model, its settings, what was read before.
            tokens: The prompt.
        """
        if root not in self._roots:
            return Known()
        ids = _ids(tokens)
        node: _Node | None = self._roots[root]
        shared, best = 0, None
        while node is not None and node.length == shared:
            if node.rows is not None and shared < len(ids):
                best = node
            if shared == len(ids):
                break
            node = node.children.get(int(ids[shared]))
            if node is not None:
                shared += _num_common(node.edge, ids[shared:])
        num_tokens = 0 if best is None else best.length
        shared = min(shared, len(ids) - 1)
        fork = shared if shared - num_tokens >= MIN_TOKENS else 0
        if best is None:
            return Known(fork=fork)
        assert best.rows is not None
        self._kept.move_to_end(best)
        return Known(rows=best.rows.copied(), num_tokens=num_tokens, fork=fork)

    def add(self, root: Hashable, tokens: Sequence[int], rows: State) -> None:
        """Keep `rows`, which have read these tokens and do not read on; others go if there is no room."""
        size = rows.nbytes
        if size > self._max_bytes:
            return
        node = self._node(root, _ids(tokens))
        self._drop(node)
        node.rows, node.nbytes = rows, size
        self.nbytes += size
        self._kept[node] = root
        while self.nbytes > self._max_bytes:
            oldest = next(iter(self._kept))
            of_root = self._kept[oldest]
            self._drop(oldest)
            self._tidy(oldest, of_root)
            self.num_evicted += 1

    def is_worth(self, num_tokens: int) -> bool:
        """Whether to keep a state so many tokens after the last one."""
        return self._max_bytes > 0 and num_tokens >= MIN_TOKENS

    def forget(self, root: Hashable) -> None:
        """Forget all states of a root."""
        for node in [node for node, of_root in self._kept.items() if of_root == root]:
            self._drop(node)
        self._roots.pop(root, None)

    @property
    def roots(self) -> list[Hashable]:
        """All roots that have states."""
        return list(self._roots)

    def _node(self, root: Hashable, ids: np.ndarray) -> _Node:
        """The node after these tokens, which is made if there is none."""
        node = self._roots.setdefault(root, _Node(None, ids[:0], 0))
        while node.length < len(ids):
            rest = ids[node.length :]
            child = node.children.get(int(rest[0]))
            if child is None:
                child = _Node(node, rest.copy(), len(ids))
                node.children[int(rest[0])] = child
            elif (num := _num_common(child.edge, rest)) < len(child.edge):
                child = self._split(child, num)
            node = child
        return node

    @staticmethod
    def _split(child: _Node, num: int) -> _Node:
        """Put a node `num` tokens after the parent of `child`, before it."""
        parent = child.parent
        assert parent is not None
        middle = _Node(parent, child.edge[:num], parent.length + num)
        parent.children[int(child.edge[0])] = middle
        middle.children[int(child.edge[num])] = child
        child.parent, child.edge = middle, child.edge[num:]
        return middle

    def _drop(self, node: _Node) -> None:
        if node.rows is not None:
            self.nbytes -= node.nbytes
            node.rows, node.nbytes = None, 0
            del self._kept[node]

    def _tidy(self, node: _Node, root: Hashable) -> None:
        """Take nodes out of the tree that have no state and are no fork, from `node` up."""
        while node.rows is None and len(node.children) < 2:
            parent = node.parent
            if parent is None:
                if not node.children:
                    del self._roots[root]
                return
            first = int(node.edge[0])
            if node.children:
                (child,) = node.children.values()
                child.parent, child.edge = parent, np.concatenate([node.edge, child.edge])
                parent.children[first] = child
            else:
                del parent.children[first]
            node = parent


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


def _num_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    num = min(len(a), len(b))
    differs = a[:num] != b[:num]
    return int(differs.argmax()) if differs.any() else num
