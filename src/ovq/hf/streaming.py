"""Endless generation in constant memory: a stream of tokens, and of the text that they form.

`generate` of transformers keeps all tokens and a mask over them, and copies both at each step. Here only the
cache is carried from token to token, so a model with a state of constant size can run without end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    Cache,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ovq.fields import check_fields
from ovq.hf.cache import CACHE_KEY
from ovq.hf.context import checked_ids
from ovq.hf.context_file import ContextModel

# A character has at most 4 bytes, so at most 4 tokens; after twice as many it can no longer be completed.
_MOST_PENDING = 8
_LONGEST_CHARACTER = 4
# Logits divided by a smaller number could overflow; a much larger one is infinite in float32.
_LEAST_DIVISOR, _LARGEST_DIVISOR = 1e-6, 1e6


def _is_divisor(x: float) -> bool:
    return _LEAST_DIVISOR <= x <= _LARGEST_DIVISOR


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; names and meanings are those of transformers' `generate`.

    Attributes:
        temperature: Logits are divided by it, 1e-6 to 1e6; 0 takes the most likely token.
        top_k: Sample from this many of the most likely tokens; 0 for all.
        top_p: Sample from the most likely tokens with this total probability.
        min_p: Sample from tokens whose probability is at least this share of the highest one.
        repetition_penalty: Logits of tokens that have occurred are divided by it (multiplied, if negative),
            1e-6 to 1e6.

    Raises:
        ValueError: If a number is out of range, or a sampling option is set without sampling.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.95).options["top_p"]
        0.95
        >>> Sampling().options
        {'do_sample': False, 'repetition_penalty': 1.0}
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_fields(self)
        divisor = f"from {_LEAST_DIVISOR:g} to {_LARGEST_DIVISOR:g}"
        for name, is_right, expected in (
            ("temperature", self.temperature == 0 or _is_divisor(self.temperature), f"0, or {divisor}"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", _is_divisor(self.repetition_penalty), divisor),
        ):
            if not is_right:
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)}")
        for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if self.temperature == 0 and getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}: expected a temperature above 0 with it, found 0, which does no sampling"
                )

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `generate` for this sampling, whatever the model's generation config has."""
        options: dict[str, Any] = {"do_sample": self.temperature > 0}
        options["repetition_penalty"] = float(self.repetition_penalty)
        if self.temperature > 0:
            options |= {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return options

    def processors(self) -> LogitsProcessorList:
        """transformers' logits processors, in the order in which `generate` applies them."""
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
    model: ContextModel,
    input_ids: Sequence[int],
    *,
    cache: Cache | None = None,
    sampling: Sampling | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk_size: int = 2048,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Generate tokens after a prompt one by one, without end unless an end token comes.

    Between two tokens, only the cache is kept and, for the repetition penalty, the set of tokens seen.

    Args:
        model: an `OVQForCausalLM` or a converted model, with its own device and dtype; call `eval()` on it
            first.
        input_ids: `[T]` ids of the prompt.
        cache: cache of the tokens before the prompt; updated in place.
        sampling: how tokens are chosen; None takes the most likely one.
        eos_token_id: the token, or tokens, that end the text; None to go on for ever.
        generator: source of the random numbers, on the model's device; None for PyTorch's default.
        prefill_chunk_size: tokens of the prompt read at a time, which limits the memory needed.
        is_stopped: called before each piece of the prompt and each further token; True ends the stream.

    Yields:
        Token ids, the same as `model.generate` would give.

    Raises:
        ValueError: if the prompt is empty or has ids that the model does not know, `prefill_chunk_size` is
            below 1, or logits are NaN or Inf.

    Example:
        >>> from itertools import islice
        >>> from ovq.hf import OVQConfig, OVQForCausalLM
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = OVQForCausalLM(config).eval()
        >>> tokens = list(islice(stream_tokens(model, [1, 2, 3]), 5))
        >>> whole = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
        >>> tokens == whole[0, 3:].tolist()
        True
    """
    if prefill_chunk_size < 1:
        raise ValueError(f"prefill_chunk_size: expected at least 1, found {prefill_chunk_size}")
    ids = checked_ids(input_ids, model, what="input_ids")
    cache = model.make_cache() if cache is None else cache
    sampling = sampling or Sampling()
    processors = sampling.processors()
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    is_seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
    is_seen[ids] = True
    for piece in ids.split(min(prefill_chunk_size, len(ids))):
        if is_stopped():
            return
        output = model(piece[None], logits_to_keep=1, return_dict=True, **{CACHE_KEY: cache})
    while True:
        logits = output.logits[:, -1].float()
        # The penalty depends only on which tokens have occurred, not where or how often. transformers asks
        # for a LongTensor, which mypy does not accept any operation's result as.
        scores = processors(is_seen.nonzero().T, logits) if processors else logits  # type: ignore[arg-type]
        # The largest is NaN if any is.
        if not bool(scores.amax().isfinite()):
            raise ValueError("logits: expected finite numbers, found NaN or Inf")
        if sampling.temperature > 0:
            token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        is_seen[token] = True
        number = int(token)
        yield number
        if number in ends or is_stopped():
            return
        output = model(token, logits_to_keep=1, return_dict=True, **{CACHE_KEY: cache})


def stream_text(tokens: Iterable[int], tokenizer: Any | None, *, prompt: Sequence[int] = ()) -> Iterator[str]:
    """Decode a stream of tokens into pieces of text, each as soon as it is final.

    Each piece is decoded with only the few tokens before it, since a tokenizer may join a token with the
    previous one. So work and memory per token do not depend on how many came before.

    Args:
        tokens: token ids.
        tokenizer: a tokenizer of transformers; None for a text of ids with spaces between them.
        prompt: ids before the first token; their text is not repeated.

    Yields:
        Text, never empty. A character of several tokens comes with the last of them; bytes that are no
        character come as replacement characters.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> letters = Tokenizer(models.BPE({"Ã": 0, "©": 1, "t": 2}, []))  # bytes, as ByteLevel spells them
        >>> letters.decoder = decoders.ByteLevel()
        >>> list(stream_text([0, 1, 2, 0, 1], PreTrainedTokenizerFast(tokenizer_object=letters)))
        ['é', 't', 'é']
    """
    stream = TextStream(tokenizer, prompt=prompt)
    for token in tokens:
        if text := stream.push(int(token)):
            yield text
    if text := stream.finish():
        yield text


class TextStream:
    """Incremental decoder: `stream_text` for a caller that pushes the tokens.

    Args:
        tokenizer: a tokenizer of transformers; None for a text of ids with spaces between them.
        prompt: ids before the first token; their text is not repeated.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> letters = Tokenizer(models.BPE({"Ã": 0, "©": 1, "t": 2}, []))  # bytes, as ByteLevel spells them
        >>> letters.decoder = decoders.ByteLevel()
        >>> stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=letters))
        >>> [stream.push(token) for token in (0, 1, 2)], stream.finish()
        (['', 'é', 't'], '')
    """

    def __init__(self, tokenizer: Any | None, *, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Ids alone begin without a space.
        self._shown: list[int] = [] if tokenizer is None else list(prompt[-_MOST_PENDING:])
        self._pending: list[int] = []

    def _decode(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that is final after one more token; may be empty."""
        self._pending.append(token)
        shown, pending = self._shown, self._pending
        before, whole = self._decode(shown), self._decode(shown + pending)
        num_kept = 0
        if whole.endswith("\ufffd") or len(whole) <= len(before):
            if len(pending) < _MOST_PENDING:
                return ""
            num_kept = _unfinished(shown, pending, self._decode)
            whole = self._decode(shown + pending[: len(pending) - num_kept])
        self._shown = pending[: len(pending) - num_kept]
        self._pending = pending[len(pending) - num_kept :]
        return whole[len(before) :]

    def finish(self) -> str:
        """The text of tokens held back, at the end of the stream."""
        shown, pending = self._shown, self._pending
        self._shown, self._pending = [], []
        return self._decode(shown + pending)[len(self._decode(shown)) :] if pending else ""


def _unfinished(shown: list[int], pending: list[int], decode: Callable[[list[int]], str]) -> int:
    """Number of last pending tokens that may still become a character, when earlier ones no longer can."""
    whole = decode(shown + pending)
    for number in range(_LONGEST_CHARACTER, 0, -1):
        # If the cut falls within a character, the two parts have more replacement characters than the whole.
        if decode(shown + pending[:-number]) + decode(pending[-number:]) == whole:
            return number
    return 0
