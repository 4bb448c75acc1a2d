"""Tokens and bytes: a tokenizer of bytes, and the bytes that a token of any tokenizer stands for."""

from __future__ import annotations

import functools
import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""The text of the token that ends a text, in the tokenizers made here."""

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
"""How tokenizers of characters write the bytes of those that they do not know."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens 0..255 are the bytes of UTF-8 and whose token 256 ends a text.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("né")["input_ids"], tokenizer.decode([110, 195, 169]), tokenizer.eos_token_id
        ([110, 195, 169], 'né', 256)
    """
    from tokenizers import Tokenizer, models

    return wrapped(Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[])))


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes that a token adds to a text, which may be part of a character; none for special tokens.

    Args:
        tokenizer: One of transformers: of bytes or pairs of them, with single bytes for what it does not know
            (`<0xE2>`), or of whole characters.
        token: Its id.

    Example:
        >>> [token_bytes(byte_tokenizer(), token) for token in (110, 195, 169, 256)]
        [b'n', b'\\xc3', b'\\xa9', b'']
    """
    # Twice, because at the beginning of a text some tokenizers leave the space out that a word brings.
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
    """How the byte-level parts of `tokenizers` write each byte.

    A byte that is a printable character of Latin-1 is written as that character; the others are written as
    the characters from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    others = itertools.count(256)
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def wrapped(tokenizer: Tokenizer, *, is_by_word: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes or of byte pairs, in the form that transformers uses."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Without pairs, splitting at words has no effect.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_by_word)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        # Batches need one, and no model has an embedding for another; the mask says what is padding. It
        # goes before a prompt, which is continued at its end.
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        # A text that happens to spell the token out does not end there.
        split_special_tokens=True,
    )
