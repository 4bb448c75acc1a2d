"""Losses of documents of any length, read in pieces with the model's cache carried between them.

Only the cache is carried, and logits are computed for a few tokens at a time, so a model with a state of
constant size reads any length in the memory of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ovq import byte_tokens
from ovq.hf.cache import CACHE_KEY
from ovq_lab.eval.models import new_cache
from ovq_lab.text.tokenizers import num_token_ids

PIECE_SIZE = 2048

_MOST_LOGITS = 2**24
"""Most logits computed at once, 64 MiB of float32: with a large vocabulary, the logits of a whole piece would
be by far the largest tensor."""


@torch.no_grad()
def read_pieces(
    model: PreTrainedModel, ids: Tensor, cache: Any, *, piece_size: int = PIECE_SIZE
) -> Iterator[Tensor]:
    """Yield the last hidden states of a document, `[t, hidden_size]` for each piece of t tokens.

    Args:
        cache: Cache of the tokens before them, such as `new_cache` returns; updated in place.
    """
    if piece_size < 1:
        raise ValueError(f"piece_size: expected at least 1, found {piece_size}")
    for piece in ids.split(min(piece_size, len(ids))):
        yield model.base_model(piece[None], **{CACHE_KEY: cache}).last_hidden_state[0]


@torch.no_grad()
def target_losses(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses on target tokens `[t]`, predicted from hidden states `[t, hidden_size]`.

    Returns:
        `[t]` float32 losses in nats, and `[t]` bool, whether the target was the most likely token.
    """
    output = model.get_output_embeddings()
    at_once = max(1, _MOST_LOGITS // model.config.vocab_size)
    losses, is_first = [], []
    for states, labels in zip(hidden.split(at_once), targets.split(at_once), strict=True):
        logits = output(states).float()
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        is_first.append(logits.argmax(-1) == labels)
    return torch.cat(losses), torch.cat(is_first)


def read_losses(model: PreTrainedModel, ids: Tensor, cache: Any, *, piece_size: int = PIECE_SIZE) -> Tensor:
    """The loss `[T - 1]` on every token `[T]` of a text except the first, after those in the cache.

    The last token is not read. For `cache` see `read_pieces`.
    """
    losses: list[Tensor] = []
    num_read = 0
    for hidden in read_pieces(model, ids[:-1], cache, piece_size=piece_size):
        losses.append(target_losses(model, hidden, ids[num_read + 1 :][: len(hidden)])[0])
        num_read += len(hidden)
    return torch.cat(losses)


def token_losses(model: PreTrainedModel, ids: np.ndarray, *, piece_size: int = PIECE_SIZE) -> np.ndarray:
    """The loss on every token of a document except the first, given all tokens before it.

    Args:
        model: Used on its device and in its dtype; call `eval()` on it first.
        ids: `[T]` token ids.
        piece_size: Tokens read at a time; changes the result by rounding only.

    Returns:
        `[T - 1]` float32 losses in nats: entry p is the loss on token p + 1 after reading tokens 0 to p.
    """
    if len(ids) < 2 or ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"ids: expected at least 2 token ids below {model.config.vocab_size}, as the model knows, "
            f"found {len(ids)} in {ids.min(initial=0)}..{ids.max(initial=0)}"
        )
    tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(model.device)
    losses = read_losses(model, tokens, new_cache(model), piece_size=piece_size)
    # Moving the losses to the CPU synchronises with the device, so callers can time this function.
    return losses.cpu().numpy()


def start_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before a text; None if it puts none there.

    Example:
        >>> from ovq_lab.text import byte_tokenizer
        >>> start_token(byte_tokenizer())
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    return marked[0] if marked[1 : 1 + len(plain)] == plain and marked[: len(plain)] != plain else None


def token_bytes(tokenizer: Any) -> np.ndarray:
    """The number of bytes of text that each token stands for, `[V]` int64; 0 for special tokens.

    Exact for byte-level and BPE tokenizers. For others, it counts the text that a token adds after itself.
    """
    from tokenizers.decoders import ByteLevel

    num_ids = num_token_ids(tokenizer)
    names = tokenizer.convert_ids_to_tokens(range(num_ids))
    special = set(tokenizer.all_special_ids)
    # Ids that have been left out have no name.
    plain = [i for i in range(num_ids) if i not in special and names[i] is not None]
    # Byte-level tokenizers write each byte as one character.
    is_byte_level = tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel)
    lengths = np.zeros(num_ids, dtype=np.int64)
    for i in plain:
        lengths[i] = len(names[i] if is_byte_level else byte_tokens.token_bytes(tokenizer, i))
    return lengths
