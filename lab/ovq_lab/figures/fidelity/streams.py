"""Key/value streams for measuring memories without a model: random, clustered, and made from real text."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_NUM_CLUSTERS = 1024
_CLUSTER_SPREAD = 0.5
"""Noise within a cluster: its length on keys, whose centres have length 1; its standard deviation on
values."""
_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")
_CONTEXT_WEIGHTS = (1.0, 0.5)
"""Weights of a word and of the previous word in a key, so that a key reflects a little of its context."""


class Stream(NamedTuple):
    """Keys, values and queries in order.

    Attributes:
        keys: `[T, K]` float32, of length 1.
        values: `[T, V]` float32.
        queries: `[T, K]` float32, of length 1; after t tokens, those from row t on are used.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor


def random_stream(seed: int, num_sample: int, num_tokens: int, head_dim: int) -> tuple[Stream, Stream]:
    """Keys and queries uniform on the sphere, normal values: no structure, the hardest case for slots.

    Args:
        num_sample: Tokens of the sample.
        num_tokens: Tokens of the stream, T.
        head_dim: K, and V.

    Returns:
        A sample, to fit the fixed parameters of a memory, and the stream.

    Example:
        >>> sample, stream = random_stream(0, 10, 100, 8)
        >>> stream.keys.norm(dim=-1).allclose(torch.ones(100))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    keys, values, queries = torch.randn(3, num_sample + num_tokens, head_dim, generator=generator)
    return _split(Stream(F.normalize(keys, dim=-1), values, F.normalize(queries, dim=-1)), num_sample)


def clustered_stream(seed: int, num_sample: int, num_tokens: int, head_dim: int) -> tuple[Stream, Stream]:
    """Keys around 1024 centres, the i-th with a frequency proportional to 1 / i; values cluster too.

    Queries and the sample come from the same clusters: the best case for memories with fixed parameters.
    Arguments and returns are those of `random_stream`.
    """
    generator = torch.Generator().manual_seed(seed)
    return _split(_clustered(num_sample + num_tokens, head_dim, generator), num_sample)


def new_clusters_stream(seed: int, num_sample: int, num_tokens: int, head_dim: int) -> tuple[Stream, Stream]:
    """As `clustered_stream`, but the centres of the stream are not those of the sample.

    Fixed parameters do not fit these centres, like names that mean nothing outside their context.
    """
    generator = torch.Generator().manual_seed(seed)
    return _clustered(num_sample, head_dim, generator), _clustered(num_tokens, head_dim, generator)


def text_stream(seed: int, num_sample: int, num_tokens: int, head_dim: int) -> tuple[Stream, Stream]:
    """Real text, as seen by an attention head that looks up what followed words like the current ones.

    The text is the source of Python's standard library, split into words and signs, with files in an order
    that the seed draws; its beginning is the sample. Embeddings are made from the singular vectors of word
    bigram counts, counted on as many words of the files after it. A key is the embedding of a word plus half
    that of the previous word; the value is the embedding of the next word; queries are the keys of the text
    that follows.

    Arguments and returns are those of `random_stream`.
    """
    num_keys, num_before = num_sample + num_tokens, len(_CONTEXT_WEIGHTS) - 1
    # One more word before the first key, and one after the last.
    num_read = num_before + num_keys + 1
    words = _standard_library(seed, num_read + num_keys)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    ids = [vocabulary[word] for word in words]
    embedded = _word_embeddings(ids[num_read:], len(vocabulary), head_dim, seed)[ids[:num_read]]
    keys = sum(
        (weight * embedded[num_before - back :][:num_keys] for back, weight in enumerate(_CONTEXT_WEIGHTS)),
        start=torch.zeros(()),
    )
    keys = F.normalize(keys, dim=-1)
    # After t tokens, queries start at key t: queries are keys that come after the tokens read.
    return _split(Stream(keys, embedded[num_before + 1 :], keys), num_sample)


STREAMS: dict[str, Callable[[int, int, int, int], tuple[Stream, Stream]]] = {
    "random": random_stream,
    "clustered": clustered_stream,
    "new clusters": new_clusters_stream,
    "text": text_stream,
}


def _split(stream: Stream, num_sample: int) -> tuple[Stream, Stream]:
    """Split the first tokens off as the sample."""
    return Stream(*(tensor[:num_sample] for tensor in stream)), Stream(
        *(tensor[num_sample:] for tensor in stream)
    )


def _clustered(num_tokens: int, head_dim: int, generator: torch.Generator) -> Stream:
    """Keys, values and queries of newly drawn clusters."""
    centres = F.normalize(torch.randn(_NUM_CLUSTERS, head_dim, generator=generator), dim=-1)
    cluster_values = torch.randn(_NUM_CLUSTERS, head_dim, generator=generator)
    weights = 1 / torch.arange(1, _NUM_CLUSTERS + 1)
    of_keys, of_queries = torch.multinomial(
        weights, 2 * num_tokens, replacement=True, generator=generator
    ).chunk(2)
    noise = _CLUSTER_SPREAD * torch.randn(3, num_tokens, head_dim, generator=generator)
    # On keys and queries `_CLUSTER_SPREAD` is the length of the noise, on values its deviation per component.
    noise[:2] /= head_dim**0.5
    return Stream(
        F.normalize(centres[of_keys] + noise[0], dim=-1),
        cluster_values[of_keys] + noise[2],
        F.normalize(centres[of_queries] + noise[1], dim=-1),
    )


def _standard_library(seed: int, num_words: int) -> list[str]:
    """The first `num_words` words of the standard library's source, with its files in random order."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(folder.glob("*.py"))
    rng = np.random.default_rng(seed)
    words: list[str] = []
    for place in rng.permutation(len(paths)):
        words += _WORD_OR_SIGN.findall(paths[place].read_text(encoding="utf-8", errors="replace"))
        if len(words) >= num_words:
            return words[:num_words]
    raise ValueError(
        f"expected at least {num_words} words in the *.py files of {folder}, found {len(words)}; "
        "the text stream needs the source of Python's standard library"
    )


def _word_embeddings(ids: list[int], num_words: int, head_dim: int, seed: int) -> Tensor:
    """Embeddings `[num_words, head_dim]` of length 1, from bigram counts; random for words without counts."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.tensor([ids[:-1], ids[1:]])
    both = torch.cat([follows, follows.flip(0)], dim=1)
    # Counts of following words are in the left columns, counts of preceding words in the right ones.
    both[1, follows.shape[1] :] += num_words
    # Enabled for all tensors inside: otherwise PyTorch 2.11 warns for tensors derived from these.
    with torch.sparse.check_sparse_tensor_invariants():
        ones = torch.ones(both.shape[1])
        counts = torch.sparse_coo_tensor(both, ones, (num_words, 2 * num_words)).coalesce()
        logs = torch.sparse_coo_tensor(counts.indices(), counts.values().log1p(), counts.shape)
    # A randomised range finder with two power iterations: accurate to a few per cent, which is enough.
    sample = torch.sparse.mm(logs, torch.randn(2 * num_words, 2 * head_dim, generator=generator))
    for _ in range(2):
        basis, _ = torch.linalg.qr(sample)
        sample = torch.sparse.mm(logs, torch.sparse.mm(logs.t(), basis))
    basis, _ = torch.linalg.qr(sample)
    left, singular, _ = torch.linalg.svd(torch.sparse.mm(logs.t(), basis).T, full_matrices=False)
    embeddings = basis @ left[:, :head_dim] * singular[:head_dim].sqrt()
    is_new = embeddings.norm(dim=-1) < 1e-6
    embeddings[is_new] = torch.randn(int(is_new.sum()), head_dim, generator=generator)
    return F.normalize(embeddings, dim=-1)
