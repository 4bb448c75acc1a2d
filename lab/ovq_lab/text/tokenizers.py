"""Tokenizers. All are Hugging Face's, so they can be saved beside a model, and every command can use them.

In the tokenizers made here, tokens 0..255 are the bytes, and the last token is the end of text, which is also
the padding token.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ovq.byte_tokens import byte_tokenizer, byte_vocabulary, wrapped
from ovq.runtime.files import writing
from ovq_lab.text.cache import cached_folder
from ovq_lab.text.documents import Document, split_of
from ovq_lab.text.readers import local_path
from ovq_lab.text.source import TextSource, source_content, source_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_TRAINING_BYTES = 2**28


def encode_bytes(text: str) -> np.ndarray:
    """The tokens of `byte_tokenizer` for a text, `[T]` uint8, computed much faster.

    Example:
        >>> encode_bytes("né").tolist()
        [110, 195, 169]
    """
    # A lone surrogate, which JSON can hold, has no UTF-8 encoding.
    return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)


def train_tokenizer(documents: Iterable[Document], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        documents: The training texts.
        vocab_size: Number of tokens, including the bytes and the end of text. Few documents may give fewer.

    Raises:
        ValueError: If the bytes and the end of text do not fit.

    Example:
        >>> text = Document(name="a", text="again and again and again")
        >>> tokenizer = train_tokenizer([text], vocab_size=260)
        >>> len(tokenizer("again and again")["input_ids"]), tokenizer.eos_token_id
        (9, 259)
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"vocab_size: expected at least 257, found {vocab_size}")
    vocabulary = byte_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(vocabulary), show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    # The trainer numbers the bytes in the sorted order of their characters, then the pairs.
    merges = [tuple(pair) for pair in trained["merges"]]
    return wrapped(Tokenizer(models.BPE(vocab=trained["vocab"] | vocabulary, merges=merges)), is_by_word=True)


def get_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by name.

    Args:
        name: `"bytes"`, the folder of a saved tokenizer, or the name of one on the hub.

    Raises:
        ValueError: If there is none, or it has no end-of-text token.

    Example:
        >>> len(get_tokenizer("bytes"))
        257
    """
    if name == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(local_path(name)))
    except (OSError, ValueError) as error:
        raise ValueError(
            "tokenizer: expected bytes, bpe:N, the folder of a saved tokenizer, or one that the hub has and "
            f"this machine can reach, found {name!r} ({str(error).splitlines()[0]})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: expected one with a token for the end of a text, found {name!r}")
    return tokenizer


def source_tokenizer(source: TextSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a corpus; for `"bpe:N"` it is trained here and cached.

    It is trained on the first 256 MiB of the training documents; more text hardly changes which pairs are
    frequent.

    Raises:
        ValueError: If it is not available.
    """
    num_tokens = source.num_trained_tokens
    if num_tokens is None:
        return get_tokenizer(source.tokenizer)
    depends_on = [*source_content(source), source.tokenizer, repr(source.held_out)]

    def fill(folder: Path) -> None:
        documents = source_documents(source)
        training = (d for d in documents if split_of(d.name, held_out=source.held_out) == "train")
        tokenizer = train_tokenizer(_first_bytes(training), num_tokens)
        with writing(folder):
            tokenizer.save_pretrained(folder)

    return get_tokenizer(str(cached_folder(depends_on, fill)))


def _first_bytes(documents: Iterable[Document]) -> Iterator[Document]:
    """The first documents, as many as a tokenizer is trained on."""
    size = 0
    for document in documents:
        yield document
        size += len(document.text.encode("utf-8"))
        if size >= _TRAINING_BYTES:
            return


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id. `len` counts tokens, which are fewer if ids have been left out, as
    in tokenizers that have lost words or have their special tokens far behind the others.

    Example:
        >>> num_token_ids(byte_tokenizer())
        257
    """
    return 1 + max(tokenizer.get_vocab().values())


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is equivalent to `encode_bytes`.

    Example:
        >>> is_byte_tokenizer(byte_tokenizer())
        True
    """
    return len(tokenizer) == 257 and tokenizer_content(tokenizer) == _byte_content()


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """A string that determines the behaviour of a tokenizer."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    return f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())}"


@functools.cache
def _byte_content() -> str:
    return tokenizer_content(byte_tokenizer())
