"""Generation without an end: tokens one by one, and the text they make, in memory that does not grow.

`generate` of transformers keeps every token and a mask over all of them, and copies both at each step. Here
only the cache goes from token to token, so that a model whose state has a constant size can run for as long
as it is let.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ovq.fields import check_fields
from ovq.hf.cache import OVQCache
from ovq.hf.modeling_ovq import OVQForCausalLM

# A character has at most 4 bytes, and so at most 4 tokens: after twice as many the text cannot be mended.
_MOST_PENDING = 8
_LONGEST_CHARACTER = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; names and meanings are those of transformers' `generate`.

    Attributes:
        temperature: What logits are divided by; 0 takes the most likely token.
        top_k: Sample from so many of the most likely tokens; 0 for all.
        top_p: Sample from the most likely tokens of this total probability.
        min_p: Sample from tokens at least this share as likely as the most likely one.
        repetition_penalty: What logits of tokens that were there are divided by (multiplied, if negative).

    Raises:
        ValueError: If a number is out of range, or one that only matters in sampling is set without it.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.95).options
        {'do_sample': True, 'temperature': 0.8, 'top_k': 0, 'top_p': 0.95, 'min_p': 0.0}
        >>> Sampling().options
        {'do_sample': False}
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_fields(self)
        for name in ("temperature", "top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, found {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected a number from 0 to 1, found {self.min_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty: expected more than 0, found {self.repetition_penalty}")
        for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if self.temperature == 0 and getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}: expected a temperature above 0 beside it, found 0, which does not sample"
                )

    @property
    def options(self) -> dict[str, Any]:
        """The same as keyword arguments of `generate`."""
        options: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        if self.repetition_penalty != 1:
            options["repetition_penalty"] = self.repetition_penalty
        return options

    def processors(self) -> LogitsProcessorList:
        """transformers' own, in the order `generate` applies them."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature not in (0, 1):
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p > 0:
            found.append(MinPLogitsWarper(float(self.min_p)))
        return found


@torch.no_grad()
def stream_tokens(
    model: OVQForCausalLM,
    input_ids: Sequence[int],
    *,
    cache: OVQCache | None = None,
    sampling: Sampling | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk_size: int = 2048,
) -> Iterator[int]:
    """The tokens that follow a prompt, one by one, without an end but that of the text.

    What is kept between two tokens is the cache and, for the repetition penalty, the set of tokens seen.

    Args:
        model: run where it is, as it is (`eval()` it first).
        input_ids: `[T]` ids of the prompt.
        cache: of what stands before the prompt; brought up to date in place.
        sampling: how tokens are chosen; the most likely one if not given.
        eos_token_id: the token, or tokens, after which the text is over; None to go on for ever.
        generator: of the random numbers, on the model's device; PyTorch's own if not given.
        prefill_chunk_size: tokens of the prompt read at a time, which bounds the memory needed.

    Yields:
        Token ids, those `model.generate` would give.

    Raises:
        ValueError: an empty prompt, or pieces of no tokens.

    Example:
        >>> from itertools import islice
        >>> from ovq.hf import OVQConfig
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = OVQForCausalLM(config).eval()
        >>> tokens = list(islice(stream_tokens(model, [1, 2, 3]), 5))
        >>> whole = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
        >>> tokens == whole[0, 3:].tolist()
        True
    """
    if prefill_chunk_size < 1:
        raise ValueError(f"prefill_chunk_size: expected at least 1, found {prefill_chunk_size}")
    ids = torch.as_tensor(input_ids, dtype=torch.int64, device=model.device)
    if ids.dim() != 1 or len(ids) == 0:
        raise ValueError(f"input_ids: expected a row of at least 1 token, found shape {list(ids.shape)}")
    cache = OVQCache(model.config) if cache is None else cache
    sampling = sampling or Sampling()
    processors = sampling.processors()
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    is_seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
    is_seen[ids] = True
    for piece in ids.split(prefill_chunk_size):
        hidden = model.base_model(piece[None], past_key_values=cache).last_hidden_state
    while True:
        logits = model.get_output_embeddings()(hidden[:, -1]).float()
        # The penalty asks which tokens there were, not where or how often.
        scores = processors(is_seen.nonzero().T, logits) if processors else logits
        if sampling.temperature > 0:
            token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        is_seen[token] = True
        number = int(token)
        yield number
        if number in ends:
            return
        hidden = model.base_model(token, past_key_values=cache).last_hidden_state


def stream_text(tokens: Iterable[int], tokenizer: Any, *, prompt: Sequence[int] = ()) -> Iterator[str]:
    """The text of a stream of tokens, in pieces that come as soon as they are certain.

    Each piece is decoded with the few tokens before it alone, as a tokenizer may join a token with the one
    before it: the work and the memory of a token do not depend on how many there were.

    Args:
        tokens: ids, as they come.
        tokenizer: of transformers.
        prompt: ids before the first token; their text is not repeated.

    Yields:
        Text, never empty. A character spread over several tokens comes with the last of them; bytes that are
        no character come as replacement marks.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> letters = Tokenizer(models.BPE({"Ã": 0, "©": 1, "t": 2}, []))  # bytes, as ByteLevel spells them
        >>> letters.decoder = decoders.ByteLevel()
        >>> list(stream_text([0, 1, 2, 0, 1], PreTrainedTokenizerFast(tokenizer_object=letters)))
        ['é', 't', 'é']
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    shown, pending = list(prompt[-_MOST_PENDING:]), []
    for token in tokens:
        pending.append(int(token))
        before, whole = decode(shown), decode(shown + pending)
        num_kept = 0
        if whole.endswith("\ufffd") or len(whole) <= len(before):
            if len(pending) < _MOST_PENDING:
                continue
            num_kept = _unfinished(shown, pending, decode)
            whole = decode(shown + pending[: len(pending) - num_kept])
        if text := whole[len(before) :]:
            yield text
        shown, pending = pending[: len(pending) - num_kept], pending[len(pending) - num_kept :]
    if pending and (text := decode(shown + pending)[len(decode(shown)) :]):
        yield text


def _unfinished(shown: list[int], pending: list[int], decode: Any) -> int:
    """How many of the last pending tokens may still become a character, where some cannot any more."""
    whole = decode(shown + pending)
    for number in range(_LONGEST_CHARACTER, 0, -1):
        # Cut within a character, the two parts have more replacement marks than the whole.
        if decode(shown + pending[:-number]) + decode(pending[-number:]) == whole:
            return number
    return 0
