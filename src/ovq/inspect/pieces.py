"""`token_pieces`: the text of each token, so that a page can show a text token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_pieces(text: str, ids: Sequence[int], tokenizer: Any | None) -> list[str]:
    """The text of each token of a text. Joined, they are the text, except for special tokens.

    A character of several tokens belongs to the first of them; the others have an empty piece. A special
    token without text, such as the one that marks the beginning, is shown by its name.

    Args:
        text: The text.
        ids: Its token ids.
        tokenizer: The tokenizer that made them; None if the text is token ids.

    Example:
        >>> token_pieces("12 7\\n33", [12, 7, 33], None)
        ['12', '7', '33']
    """
    if tokenizer is None:
        return [str(token) for token in ids]
    spans = _spans(text, ids, tokenizer)
    if spans is None:
        return [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]
    special = set(tokenizer.all_special_ids)
    pieces, end = [], 0
    for token, (first, last) in zip(ids, spans, strict=True):
        if first == last and token in special:
            pieces.append(tokenizer.convert_ids_to_tokens(token))
            continue
        # Start at the end of the previous piece, as tokenizers of words leave out the spaces in between.
        pieces.append(text[end : max(end, last)])
        end = max(end, last)
    return pieces


def _spans(text: str, ids: Sequence[int], tokenizer: Any) -> list[tuple[int, int]] | None:
    """Start and end of each token in the text; None if the tokenizer has no offsets or gives other ids."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    for marks_start in (True, False):
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=marks_start, verbose=False)
        if list(found["input_ids"][: len(ids)]) == list(ids):
            return found["offset_mapping"][: len(ids)]
    return None
