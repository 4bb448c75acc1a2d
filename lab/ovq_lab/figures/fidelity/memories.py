"""Memories of a stream of keys and values, each allowed the same number of bytes.

All have one head and are in float32, and are written for comparison, not for speed. Parameters that are fixed
before a stream begins (a codebook, random features, a learning rate) count as weights, not as state, and cost
nothing here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ovq.ops import OVQState, ovq_attention
from ovq.ops.schedule import grown_slots
from ovq_lab.figures.fidelity.streams import Stream

CHUNK_SIZE = 64
_NUMBER_BYTES = 4
_COUNT_NUMBERS = 2
"""float32 numbers that a count of 64 bits takes."""
_NUM_SINKS = 4
_KMEANS_ITERATIONS = 100
_LEARNING_RATES = (0.03, 0.1, 0.3, 1.0)
_NUM_TUNING_TOKENS = 8192
_NUM_TUNING_QUERIES = 256


class Memory(ABC):
    """A bounded memory of a stream, whose read approximates exact attention.

    Args:
        num_bytes: Largest number of bytes of state, whatever the length of the stream.
        scale: Factor of the dot products of the attention that it replaces.
        sample: Another stream of the same kind, to fit fixed parameters.
    """

    name: ClassVar[str]

    def __init__(self, num_bytes: int, *, scale: float, sample: Stream, seed: int) -> None:
        self.scale = scale
        self.key_dim, self.value_dim = sample.keys.shape[1], sample.values.shape[1]
        self.num_numbers = num_bytes // _NUMBER_BYTES
        self.generator = torch.Generator().manual_seed(seed)
        self.nbytes = _NUMBER_BYTES * self.prepare(sample)

    @abstractmethod
    def prepare(self, sample: Stream) -> int:
        """Fit the fixed parameters, and start empty; returns the number of float32 numbers when full."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Read `[T, K]` keys and `[T, V]` values, T a multiple of `CHUNK_SIZE`."""

    @abstractmethod
    def read(self, queries: Tensor) -> Tensor:
        """Outputs `[Q, V]` for queries `[Q, K]`."""

    def cluster(self, keys: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
        """Centres `[num_clusters, K]` of k-means, and the index of the nearest one for each key, `[T]`."""
        try:
            from sklearn.cluster import KMeans
        except ImportError as error:
            raise ImportError("k-means needs scikit-learn: pip install './lab[theory]'") from error
        seed = int(torch.randint(2**31, (), generator=self.generator))
        kmeans = KMeans(num_clusters, n_init=1, max_iter=_KMEANS_ITERATIONS, random_state=seed)
        labels = kmeans.fit(keys.numpy()).labels_
        return torch.from_numpy(kmeans.cluster_centers_), torch.from_numpy(labels).long()


def softmax_read(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, count: Tensor | None = None
) -> Tensor:
    """Attention `[Q, V]` of queries over keys and values; a key with a count stands for that many tokens.

    Example:
        >>> keys, values = torch.eye(2), torch.tensor([[0.0], [1.0]])
        >>> softmax_read(torch.zeros(1, 2), keys, values, 1.0, torch.tensor([1, 3]))
        tensor([[0.7500]])
    """
    scores = scale * queries @ keys.T
    if count is not None:
        scores = scores + count.log()
    return scores.softmax(dim=-1) @ values


class OVQMemory(Memory):
    """The dictionary of OVQ with the paper's merge rule, computed by `ovq_attention`."""

    name = "OVQ"
    merge: ClassVar[str] = "existing"

    def prepare(self, sample: Stream) -> int:
        """Start without slots; at the ends of chunks no tokens are pending."""
        slot_numbers = self.key_dim + self.value_dim + _COUNT_NUMBERS
        self.num_slots = self.num_numbers // slot_numbers
        self.state: OVQState | None = None
        return self.num_slots * slot_numbers

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Read as a layer would; the outputs are ignored."""
        keys, values = keys[None, :, None], values[None, :, None]
        _, self.state = ovq_attention(
            keys,
            keys,
            values,
            num_slots=self.num_slots,
            chunk_size=CHUNK_SIZE,
            merge=self.merge,
            initial_state=self.state,
            output_final_state=True,
        )

    def read(self, queries: Tensor) -> Tensor:
        """Attention over the slots."""
        state = self.state
        assert state is not None, "a memory is read after something was appended to it"
        is_open = state.count[0, 0] > 0
        keys, values, count = (tensor[0, 0, is_open] for tensor in (state.keys, state.values, state.count))
        return softmax_read(queries, keys, values, self.scale, count)


class NearestMemory(OVQMemory):
    """The same number of slots, with `merge="nearest"`."""

    name = "OVQ, nearest"
    merge = "nearest"


class RandomMerging(OVQMemory):
    """As many slots as OVQ at any time, but tokens open slots and merge into slots at random."""

    name = "random merging"

    def prepare(self, sample: Stream) -> int:
        """Start without slots."""
        num_numbers = super().prepare(sample)
        self.num_seen, self.num_open = 0, 0
        self.sums = torch.zeros(self.num_slots, self.key_dim + self.value_dim)
        self.count = torch.zeros(self.num_slots)
        return num_numbers

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Merge chunk by chunk."""
        for chunk in torch.cat([keys, values], dim=1).split(CHUNK_SIZE):
            self.num_seen += CHUNK_SIZE
            before = self.num_open
            self.num_open = grown_slots(
                before, self.num_seen, num_slots=self.num_slots, chunk_size=CHUNK_SIZE, growth="plateau"
            )
            slots = torch.randint(self.num_open, (CHUNK_SIZE,), generator=self.generator)
            openers = torch.randperm(CHUNK_SIZE, generator=self.generator)[: self.num_open - before]
            slots[openers] = torch.arange(before, self.num_open)
            self.sums.index_add_(0, slots, chunk)
            self.count.index_add_(0, slots, torch.ones(CHUNK_SIZE))

    def read(self, queries: Tensor) -> Tensor:
        """Attention over the slots."""
        count = self.count[: self.num_open]
        keys, values = (self.sums[: self.num_open] / count[:, None]).split(
            [self.key_dim, self.value_dim], dim=1
        )
        return softmax_read(queries, keys, values, self.scale, count)


class OfflineKMeans(OVQMemory):
    """k-means (k-means++) over all keys at once, which no memory of constant size can do."""

    name = "offline k-means"

    def prepare(self, sample: Stream) -> int:
        """Start with no tokens; its size counts as that of the slots, as if it were a memory."""
        self.keys, self.values = sample.keys[:0], sample.values[:0]
        return super().prepare(sample)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Keep all tokens."""
        self.keys, self.values = torch.cat([self.keys, keys]), torch.cat([self.values, values])

    def read(self, queries: Tensor) -> Tensor:
        """Cluster all tokens so far into as many slots as fit the budget, and attend to the means."""
        if len(self.keys) <= self.num_slots:
            return softmax_read(queries, self.keys, self.values, self.scale)
        _, labels = self.cluster(self.keys, self.num_slots)
        count = torch.bincount(labels, minlength=self.num_slots)
        keys, values = (
            torch.zeros(self.num_slots, tensor.shape[1]).index_add_(0, labels, tensor) / count[:, None]
            for tensor in (self.keys, self.values)
        )
        return softmax_read(queries, keys, values, self.scale, count)


class StaticVQ(Memory):
    """VQ-attention: slots fixed by k-means over the sample; each slot averages its values.

    Source: Lingle, *Transformer-VQ* (arXiv 2309.16354); there the slots are learned in training.
    """

    name = "static VQ"

    def prepare(self, sample: Stream) -> int:
        """Fit the keys of the slots; only sums of values and counts are state."""
        slot_numbers = self.value_dim + _COUNT_NUMBERS
        num_slots = min(self.num_numbers // slot_numbers, len(sample.keys) // 2)
        self.codes, _ = self.cluster(sample.keys, num_slots)
        self.value_sum = torch.zeros(num_slots, self.value_dim)
        self.count = torch.zeros(num_slots)
        return num_slots * slot_numbers

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add each value to the slot that is nearest to its key."""
        codes = (keys @ self.codes.T - self.codes.square().sum(-1) / 2).argmax(-1)
        self.value_sum.index_add_(0, codes, values)
        self.count.index_add_(0, codes, torch.ones(len(codes)))

    def read(self, queries: Tensor) -> Tensor:
        """Attention over the slots that were used."""
        is_used = self.count > 0
        count = self.count[is_used]
        values = self.value_sum[is_used] / count[:, None]
        return softmax_read(queries, self.codes[is_used], values, self.scale, count)


class LinearAttention(Memory):
    """Linear attention with positive random features of the softmax kernel, as many as the bytes allow.

    Source: Choromanski et al., *Rethinking Attention with Performers* (arXiv 2009.14794).
    """

    name = "linear attention"

    def prepare(self, sample: Stream) -> int:
        """Draw the features."""
        num_features = self.num_numbers // (self.value_dim + 1)
        self.directions = torch.randn(num_features, self.key_dim, generator=self.generator)
        self.state = torch.zeros(num_features, self.value_dim + 1)
        return self.state.numel()

    def _features(self, x: Tensor) -> Tensor:
        # The factor exp(-scale |x|^2 / 2) is left out: it is equal for all vectors of length 1 and cancels.
        return (self.scale**0.5 * x @ self.directions.T).exp()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add to the sums of products of features and values, and to the sums of features."""
        self.state += self._features(keys).T @ torch.cat([values, torch.ones(len(values), 1)], dim=1)

    def read(self, queries: Tensor) -> Tensor:
        """Numerator over denominator."""
        read = self._features(queries) @ self.state
        return read[:, :-1] / read[:, -1:]


class DeltaRule(Memory):
    """The delta rule S <- S + b phi(k) (v - S^T phi(k))^T on random Fourier features of the keys.

    The rate b is the best of four on the sample. Source of the rule: Schlag et al.,
    *Linear Transformers Are Secretly Fast Weight Programmers* (arXiv 2102.11174); of the features: Rahimi and
    Recht, *Random Features for Large-Scale Kernel Machines* (2007).
    """

    name = "delta rule"

    def prepare(self, sample: Stream) -> int:
        """Draw features of a Gaussian kernel (exp(scale (q.k - 1)) on the sphere); choose the rate."""
        num_pairs = self.num_numbers // self.value_dim // 2
        self.directions = self.scale**0.5 * torch.randn(num_pairs, self.key_dim, generator=self.generator)
        num_tokens = min(_NUM_TUNING_TOKENS, len(sample.keys) // 2) // CHUNK_SIZE * CHUNK_SIZE
        queries = sample.queries[num_tokens:][:_NUM_TUNING_QUERIES]
        keys, values = sample.keys[:num_tokens], sample.values[:num_tokens]
        exact = softmax_read(queries, keys, values, self.scale)
        errors = {}
        for self.rate in _LEARNING_RATES:
            self.state = torch.zeros(2 * num_pairs, self.value_dim)
            self.append(keys, values)
            errors[self.rate] = float((self.read(queries) - exact).square().sum())
        self.rate = min(errors, key=errors.__getitem__)
        self.state = torch.zeros(2 * num_pairs, self.value_dim)
        return self.state.numel()

    def _features(self, x: Tensor) -> Tensor:
        """Features `[T, F]` of length 1."""
        phases = x @ self.directions.T
        return torch.cat([phases.cos(), phases.sin()], dim=1) / len(self.directions) ** 0.5

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Update token by token, one chunk at a time: the updates of a chunk solve a triangular system."""
        for features, chunk in zip(
            self._features(keys).split(CHUNK_SIZE), values.split(CHUNK_SIZE), strict=True
        ):
            overlaps = (self.rate * features @ features.T).tril(-1)
            updates = torch.linalg.solve_triangular(
                overlaps, self.rate * (chunk - features @ self.state), upper=False, unitriangular=True
            )
            self.state += features.T @ updates

    def read(self, queries: Tensor) -> Tensor:
        """Product of the queries' features with the state."""
        return self._features(queries) @ self.state


class WindowAndSinks(Memory):
    """The first four tokens and the newest ones, exact.

    Source: Xiao et al., *Efficient Streaming Language Models with Attention Sinks* (arXiv 2309.17453).
    """

    name = "window + sinks"

    def prepare(self, sample: Stream) -> int:
        """Start with no tokens."""
        self.num_kept = self.num_numbers // (self.key_dim + self.value_dim)
        self.keys, self.values = sample.keys[:0], sample.values[:0]
        return self.num_kept * (self.key_dim + self.value_dim)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Drop the oldest tokens, but keep the sinks."""
        self.keys, self.values = (
            self._newest(torch.cat(pair)) for pair in ((self.keys, keys), (self.values, values))
        )

    def _newest(self, tokens: Tensor) -> Tensor:
        if len(tokens) <= self.num_kept:
            return tokens
        return torch.cat([tokens[:_NUM_SINKS], tokens[len(tokens) - self.num_kept + _NUM_SINKS :]])

    def read(self, queries: Tensor) -> Tensor:
        """Attention over the tokens kept."""
        return softmax_read(queries, self.keys, self.values, self.scale)


MEMORIES: tuple[type[Memory], ...] = (
    OVQMemory,
    NearestMemory,
    StaticVQ,
    LinearAttention,
    DeltaRule,
    WindowAndSinks,
    RandomMerging,
    OfflineKMeans,
)
