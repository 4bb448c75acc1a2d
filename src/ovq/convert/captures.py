"""`Captures`: queries, keys, values, outputs and gradients of all heads on texts, each read once.

`capture` runs one forward pass with full attention and one backward pass, for the gradient of the loss with
respect to the output of every head. `probe` and `fitted_bias` need each text several times, so the results
are kept on disk, in a temporary folder: keys and values of all tokens; float32 queries and outputs, and
gradients, of the tokens whose prediction counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from ovq.convert.attach import kv_heads
from ovq.hf.cache import CACHE_KEY
from ovq.ops.serialization import write_file
from ovq.ops.sums import state_dtype
from ovq.runtime.files import TemporaryFolder
from ovq.runtime.modes import evaluating

_IMPLEMENTATION = "ovq_probe"
# Tokens whose logits are computed at a time.
_TOKENS_AT_ONCE = 256
# Only queries in this last part of a text count: before, less is merged. With a third, a probe takes
# a quarter longer and finds no better memory (docs/results/convert.md).
LAST_PART = 1 / 6
_TENSORS = ("q", "k", "v", "o", "g")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """One layer on a text of T tokens; queries are those of the last t, from the first counted token on.

    Attributes:
        q: `[1, H, t, K]` queries, scaled. k: `[1, Hkv, T, K]`. v: `[1, Hkv, T, V]`.
        o: `[1, H, t, V]` outputs. g: `[1, H, t, V]` gradients of the loss with respect to `o`.
        num_targets: number of tokens whose prediction counts.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    g: Tensor
    num_targets: int


class Captures:
    """Captured tensors of a model's heads on texts; a text is read when first requested.

    They are kept in a temporary folder (see `tempfile.gettempdir`), which is deleted with this object or at
    the end of the `with` block; that of a killed process, when another process makes its own. SmolLM2-135M
    takes 52 KB per token if the last sixth of each text counts.

    Args:
        model: as for `probe`; unchanged afterwards.
        progress: called after each layer with the number of layer passes so far; a text passes each layer
            three times (prefix forward, counted tokens forward, backward).

    Raises:
        ValueError: a model that cannot be converted, or is.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()
        >>> with Captures(model) as captures:
        ...     first, second = captures.of(torch.arange(60) % 32)
        >>> first.q.shape, first.k.shape
        (torch.Size([1, 2, 10, 8]), torch.Size([1, 2, 60, 8]))
    """

    def __init__(self, model: PreTrainedModel, *, progress: Callable[[int], None] | None = None) -> None:
        # Also refuses a converted model, whose attention cannot be replaced.
        kv_heads(model)
        self.model = model
        self._count = counted(progress)
        self._folder = TemporaryFolder("captures")
        self._numbers: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Captures:
        return self

    def __exit__(self, *args: object) -> None:
        self._folder.cleanup()

    def of(self, text: Tensor, mask: Tensor | None = None, seed: int = 0) -> list[Captured]:
        """The captured tensors of all layers on a text.

        Args:
            text: `[T]` token ids.
            mask: `[T]` bool, the tokens whose prediction counts; None for the last sixth. With a mask, the
                loss is on the tokens of the text, otherwise on tokens sampled from the model.
            seed: seed of the sampled tokens.

        Raises:
            ValueError: fewer than 2 tokens or unknown ones, or a mask of another length.
            OSError: no room in the temporary folder.
        """
        path = self.read(text, mask, seed)
        num_layers, num_targets = self._numbers[path.name]
        # Loaded from disk the first time too, so that memory is freed and every call returns the same.
        tensors = load_file(path, device=str(self.model.device))
        return [
            Captured(**{n: tensors[f"{n}{i}"] for n in _TENSORS}, num_targets=num_targets)
            for i in range(num_layers)
        ]

    def read(self, text: Tensor, mask: Tensor | None = None, seed: int = 0) -> Path:
        """Path of the file with the tensors of a text, which is read if necessary; arguments as in `of`."""
        check_texts(self.model, [text], [mask])
        given = (text.tolist(), None if mask is None else mask.tolist(), seed)
        name = hashlib.sha256(repr(given).encode()).hexdigest()
        path = Path(self._folder.name) / name
        if name not in self._numbers:
            layers = capture(self.model, text, mask, seed, lambda: self._count(1))
            tensors = {f"{n}{i}": getattr(c, n).contiguous() for i, c in enumerate(layers) for n in _TENSORS}
            write_file(path, tensors, metadata={})
            self._numbers[name] = len(layers), layers[0].num_targets
        return path


def counted(progress: Callable[[int], None] | None) -> Callable[[int], None]:
    """A function that adds its argument to a total and calls `progress` with the total."""
    total = 0

    def add(num: int) -> None:
        nonlocal total
        total += num
        if progress is not None:
            progress(total)

    return add


def check_texts(
    model: PreTrainedModel, texts: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
) -> None:
    """Raise ValueError unless every text is at least 2 token ids `[T]` of the model's vocabulary, with a mask
    `[T]` or None for each if there are `masks`."""
    embeddings: Any = model.get_input_embeddings()
    most = embeddings.num_embeddings - 1
    masks = [None] * len(texts) if masks is None else masks
    if len(masks) != len(texts):
        raise ValueError(f"targets: expected one for each of {len(texts)} texts, found {len(masks)}")
    for i, (text, mask) in enumerate(zip(texts, masks, strict=True)):
        if not isinstance(text, Tensor) or text.dtype not in (torch.int64, torch.int32):
            found = text.dtype if isinstance(text, Tensor) else type(text).__name__
            raise ValueError(
                f"texts: expected int64 or int32 tensors of token ids, found {found} in text {i}"
            )
        if text.dim() != 1 or len(text) < 2:
            raise ValueError(f"texts: expected at least 2 tokens [T], found {tuple(text.shape)} in text {i}")
        for token in (int(text.min()), int(text.max())):
            if not 0 <= token <= most:
                raise ValueError(f"texts: expected token ids from 0 to {most}, found {token} in text {i}")
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        if mask is not None and given != text.shape:
            raise ValueError(
                f"targets: expected None or a mask of the {len(text)} tokens of text {i}, found {given}"
            )


def captures_of(
    model: PreTrainedModel, captures: Captures | None
) -> contextlib.AbstractContextManager[Captures]:
    """Context manager: the given captures, kept at its end, or new ones, deleted at its end.

    Raises:
        ValueError: captures of another model.
    """
    if captures is None:
        return Captures(model)
    if captures.model is not model:
        raise ValueError("captures: expected those of the same model, found those of another one")
    return contextlib.nullcontext(captures)


@torch.inference_mode(False)
def capture(
    model: PreTrainedModel,
    text: Tensor,
    mask: Tensor | None,
    seed: int,
    after_layer: Callable[[], None] = lambda: None,
) -> list[Captured]:
    """Queries, keys, values, outputs and gradients of all layers on a text.

    The tokens before the first counted one are read first, without gradients, which later gradients do not
    depend on.
    """
    calls: list[tuple[Tensor, ...]] = []
    ids = text[None].to(model.device)
    num_tokens = ids.shape[1]
    start = round(num_tokens * (1 - LAST_PART))
    if mask is None:
        targets = torch.arange(start, num_tokens - 1, device=model.device)
    else:
        targets = mask.to(model.device)[1:].nonzero()[:, 0]
        start = int(targets.min()) if len(targets) else start
    places = torch.arange(num_tokens, device=model.device)
    # One mask for all layers, as autograd saves it.
    causal = torch.zeros(num_tokens - start, num_tokens, dtype=state_dtype(model.dtype), device=model.device)
    causal = causal.masked_fill(places > places[start:, None], -torch.inf)

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        scale = q.shape[3] ** -0.5 if scaling is None else scaling
        # In float32, like the outputs with a memory that these are compared with.
        wide_q, wide_k, wide_v = (x.to(state_dtype(x.dtype)) for x in (q, k, v))
        is_first = q.shape[2] == k.shape[2]
        exact = F.scaled_dot_product_attention(
            *(wide_q, wide_k, wide_v),
            attn_mask=None if is_first else causal,
            is_causal=is_first,
            scale=scale,
            enable_gqa=True,
        )
        o = exact.to(q.dtype)
        if o.requires_grad:
            o.retain_grad()
            o.register_hook(lambda _: after_layer())
            calls.append(((wide_q * scale).detach(), k.detach(), v.detach(), exact.detach(), o))
        after_layer()
        return o.transpose(1, 2), None

    AttentionInterface.register(_IMPLEMENTATION, attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    needed_grad = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False).set_attn_implementation(_IMPLEMENTATION)
    try:
        with evaluating(model):
            given = {CACHE_KEY: DynamicCache(config=model.config), "use_cache": True}
            if start:
                with torch.no_grad():
                    model.base_model(ids[:, :start], **given)
            with torch.enable_grad():
                embedded = model.get_input_embeddings()(ids[:, start:]).detach().requires_grad_(True)
                outputs = model.base_model(inputs_embeds=embedded, **given)
                labels = None if mask is None else ids[0, targets + 1]
                outputs.last_hidden_state.backward(_gradient(model, outputs, targets - start, labels, seed))
    finally:
        model.set_attn_implementation(before)
        # What is registered stays, so it must hold neither the model nor what was found.
        AttentionInterface.register(_IMPLEMENTATION, lambda *args, **kwargs: None)
        for parameter, was_needed in zip(model.parameters(), needed_grad, strict=True):
            parameter.requires_grad_(was_needed)
    return [
        Captured(q=q, k=k, v=v, o=exact, g=o.grad, num_targets=max(1, len(targets)))
        for q, k, v, exact, o in calls
        if o.grad is not None
    ]


def _gradient(
    model: PreTrainedModel, outputs: Any, places: Tensor, labels: Tensor | None, seed: int
) -> Tensor:
    """Gradient `[1, t, hidden_size]`, by the `outputs` of the base model, of the summed losses at `places`.

    Without labels, tokens are sampled.
    """
    hidden = outputs.last_hidden_state.detach()
    generator = torch.Generator(hidden.device).manual_seed(seed)
    gradient = torch.zeros_like(hidden)
    for index in torch.arange(len(places), device=places.device).split(_TOKENS_AT_ONCE):
        part = hidden[0, places[index]].requires_grad_(True)
        # Of the same class, as the model may read more of its fields than this one.
        logits = _logits(model, type(outputs)(last_hidden_state=part[None]))
        if labels is None:
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        else:
            drawn = labels[index]
        F.cross_entropy(logits, drawn, reduction="sum").backward()
        assert part.grad is not None
        gradient[0, places[index]] = part.grad
    return gradient


def _logits(model: PreTrainedModel, outputs: ModelOutput) -> Tensor:
    """Float32 logits `[t, vocab_size]` for `outputs` of the base model on t tokens.

    The model's own `forward` makes them, as some models scale or cap what their output layer gives.
    """
    # In most models the base model, in OPT a module within it.
    decoder: Any = model.get_decoder()
    own = decoder.__dict__.pop("forward", None)
    decoder.forward = lambda *args, **kwargs: outputs
    try:
        # Any ids, which nothing reads.
        return model(torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits[0].float()
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
