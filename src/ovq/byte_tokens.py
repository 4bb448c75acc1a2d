"""A byte tokenizer, and the bytes that a token of any tokenizer stands for."""

from __future__ import annotations

import functools
import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""End-of-text token of the tokenizers made here."""

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
"""Byte fallback tokens of character tokenizers, for unknown characters."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the UTF-8 bytes as tokens 0..255 and end of text as token 256.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("né")["input_ids"], tokenizer.decode([110, 195, 169]), tokenizer.eos_token_id
        ([110, 195, 169], 'né', 256)
    """
    from tokenizers import Tokenizer, models

    return wrapped(Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[])))


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Bytes that a token adds to a text, possibly part of a character; empty for special tokens.

    Tokenizers may be byte-level, have byte fallback (`<0xE2>`), or have whole characters.

    Example:
        >>> [token_bytes(byte_tokenizer(), token) for token in (110, 195, 169, 256)]
        [b'n', b'\\xc3', b'\\xa9', b'']
    """
    # Decoded twice, as some tokenizers omit the leading space of a word at the start of a text.
    one, two = (str(tokenizer.decode([token] * n, skip_special_tokens=True)) for n in (1, 2))
    if "\ufffd" in two:
        piece = str(tokenizer.convert_ids_to_tokens(token))
        if (byte := _BYTE_PIECE.fullmatch(piece)) is not None:
            return bytes.fromhex(byte[1])
        if (vocabulary := byte_vocabulary()).keys() >= set(piece):
            return bytes(vocabulary[letter] for letter in piece)
    return two[len(one) :].encode()


@functools.cache
def byte_vocabulary() -> dict[str, int]:
    """Byte of each character in the byte-level alphabet of `tokenizers`.

    Printable Latin-1 characters stand for themselves; the other bytes are the characters from 256 on, in
    order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    others = itertools.count(256)
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def wrapped(tokenizer: Tokenizer, *, is_by_word: bool = False) -> PreTrainedTokenizerFast:
    """A byte or byte-pair tokenizer as a fast tokenizer of transformers."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Without byte pairs, splitting at words has no effect.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_by_word)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        # Batches need a padding token, and models have no further embedding for one; the mask marks padding.
        # Padding is on the left, as prompts are continued at their end.
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        # The end-of-text token spelled out in a text is ordinary text.
        split_special_tokens=True,
    )
