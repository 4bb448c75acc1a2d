"""One token of each row, or a few drafts, through a converted model in one call of a kernel, where it can.

Modules of PyTorch take longer to be called than the processor takes to read the weights. A kernel reads them
once per call, in a narrower format if that is asked for (`weight_dtype`). Everything that is not plainly
tokens that a plain model writes takes the modules: prompts, gradients, hooks, adapters, padding and what
looks inside. Several tokens of a row are drafts where the cache records what it reads, to take it out again.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

from ovq.convert.attention import IMPLEMENTATION
from ovq.convert.cache import MemoryCache, MemoryLayer, key_factors
from ovq.convert.compiled import is_compiled, tensors_of
from ovq.convert.config import LayerConfig
from ovq.convert.memory import HeadMemory
from ovq.convert.unchanged import Part, Unchanged
from ovq.hf.cache import CACHE_KEY
from ovq.ops.backends.cpu import HeadGroup, HeadsLayer, HeadsStep, Matrix, is_available, output_step, packed
from ovq.ops.backends.cpu.kernels import DTYPES

#: Formats of the weights that decode, as `attach` takes them.
WEIGHT_DTYPES = ("float32", "bfloat16", "int8", "int4")

#: More tokens of all rows than this take the modules. At so many, the kernel takes 0.9 times as long in
#: float32, and a third in 8 bits.
MOST_ROWS = 32

_KINDS = ("llama", "qwen2", "qwen3", "mistral")
# Arguments of `forward` beside the token, the cache and where it stands: values at which they ask nothing.
_NOTHING = {
    "use_cache": (True, None),
    "return_dict": (True, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "labels": (None,),
    "inputs_embeds": (None,),
}


def checked_weight_dtype(weight_dtype: str | None) -> str | None:
    """The format of the weights that decode; None for that of the model.

    Raises:
        ValueError: an unknown one.

    Example:
        >>> checked_weight_dtype("int8"), checked_weight_dtype("auto")
        ('int8', None)
    """
    if weight_dtype is None or weight_dtype == "auto":
        return None
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"weight_dtype: expected None, 'auto' or one of {list(WEIGHT_DTYPES)}, found {weight_dtype!r}"
        )
    return weight_dtype


def token_output(model: Any, own_class: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What `forward` of a converted model returns for written tokens; None where modules must do it.

    Args:
        model: the converted model.
        own_class: its class before it was converted.
        args: of the call. kwargs: likewise.
    """
    call = _call_of(model, args, kwargs)
    if call is None or (step := _step_of(model, own_class)) is None:
        return None
    stream = step.stream(call)
    if stream is None:
        return None
    kept: dict[str, Any] = {CACHE_KEY: call.cache}
    logits = step.logits(stream)[:, -call.num_logits :]
    return CausalLMOutputWithPast(logits=logits, **kept)  # type: ignore[arg-type]  # a float tensor


def token_stream(model: Any, own_class: type, **inputs: Any) -> Tensor | None:
    """What the last norm of a converted model gets, `[B, T, D]`, for a few tokens of each row.

    For engines that compute logits themselves.

    Args:
        model: the converted model.
        own_class: its class before it was converted.
        inputs: of `forward`.

    Returns:
        The stream, after which the cache among the inputs has read the tokens; None, with nothing read, where
        modules must do it.
    """
    call = _call_of(model, (), inputs)
    if call is None or (step := _step_of(model, own_class)) is None:
        return None
    return step.stream(call)


class _Call(NamedTuple):
    tokens: Tensor
    positions: Tensor | None
    cache: MemoryCache
    num_logits: int


def _call_of(model: Any, args: tuple, kwargs: dict[str, Any]) -> _Call | None:
    """The call, if it is for one token of each of a few rows, or drafts, and asks for nothing but logits."""
    if torch.is_grad_enabled() or model.training or torch.compiler.is_compiling() or len(args) > 1:
        return None
    others = dict(kwargs)
    tokens = args[0] if args else others.pop("input_ids", None)
    cache, positions, mask = (
        others.pop(name, None) for name in (CACHE_KEY, "position_ids", "attention_mask")
    )
    num_logits = others.pop("logits_to_keep", 0)
    if not isinstance(num_logits, int) or not isinstance(cache, MemoryCache):
        return None
    for name, value in others.items():
        if not any(value is nothing for nothing in _NOTHING.get(name, ())):
            return None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not tokens.is_cpu:
        return None
    rows, num = tokens.shape
    if not 0 < rows * num <= MOST_ROWS or rows != cache.num_rows or not (num == 1 or _are_drafts(cache, num)):
        return None
    if positions is not None and getattr(positions, "shape", None) not in ((1, num), (rows, num)):
        return None
    if mask is not None and not _is_all_real(mask, rows, num):
        return None
    return _Call(tokens, positions, cache, num_logits)


def _are_drafts(cache: MemoryCache, num: int) -> bool:
    """Whether so many tokens may be taken out again, and are merged at most once."""
    return all(layer.record_past and num <= layer.config.budgets[0].chunk_size for layer in cache.layers)


def _is_all_real(mask: Any, num_rows: int, num: int) -> bool:
    """Whether a mask says of the new tokens that they are none of padding."""
    is_mask = isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == num_rows and mask.shape[1] >= num
    return is_mask and bool(mask[:, -num:].all())


# Not attributes of models, which are copied and pickled.
_STEPS: weakref.WeakKeyDictionary[nn.Module, _Step] = weakref.WeakKeyDictionary()


def _step_of(model: Any, own_class: type) -> _Step | None:
    """The step of a model as it is now; None if it is none that a kernel can do."""
    if _has_any_global_hook() or torch.is_autocast_enabled("cpu") or not is_available():
        return None
    step = _STEPS.get(model)
    if step is None or not step.is_current():
        # Before another copy of the weights is made.
        _STEPS.pop(model, None)
        step = _made_step(model, own_class)
        if step is not None:
            _STEPS[model] = step
    return step


def _made_step(model: Any, own_class: type) -> _Step | None:
    """The step of a model; None if it is of another kind, or not plain."""
    kind = next((x for x in _KINDS if own_class.__module__ == f"transformers.models.{x}.modeling_{x}"), None)
    if kind is None or not own_class.__name__.endswith("ForCausalLM"):
        return None
    name = own_class.__name__.removesuffix("ForCausalLM")
    try:
        parts = _parts(model, lambda part: getattr(sys.modules[own_class.__module__], name + part))
    except KeyError:
        # Somebody has taken modules out.
        return None
    step = _Step(model, parts)
    if not (step.is_current() and step.fits()):
        return None
    step.pack_()
    return step


def _parts(model: nn.Module, class_of: Callable[[str], type[nn.Module]]) -> list[Part]:
    """The modules whose work the step does. `class_of` gives the model's class of a kind of modules."""

    def part(owner: nn.Module, name: str, kind: type[nn.Module] | str) -> Part:
        module = owner._modules[name]
        assert module is not None
        return Part(owner._modules, name, module, class_of(kind) if isinstance(kind, str) else kind)

    base = model._modules["model"]
    assert base is not None
    layers = part(base, "layers", nn.ModuleList)
    found = [layers, part(base, "norm", "RMSNorm"), part(base, "rotary_emb", "RotaryEmbedding")]
    found.append(part(model, "lm_head", nn.Linear))
    for index in layers.module._modules:
        block = part(layers.module, index, "DecoderLayer")
        attention, mlp = part(block.module, "self_attn", "Attention"), part(block.module, "mlp", "MLP")
        found += [block, attention, mlp, part(mlp.module, "act_fn", type(ACT2FN["silu"]))]
        norms = [(block, "input_layernorm"), (block, "post_attention_layernorm")]
        norms += [(attention, x) for x in ("q_norm", "k_norm") if x in attention.module._modules]
        found += [part(owner.module, name, "RMSNorm") for owner, name in norms]
        linear = [(attention, f"{x}_proj") for x in "qkvo"] + [
            (mlp, f"{x}_proj") for x in ("gate", "up", "down")
        ]
        found += [part(owner.module, name, nn.Linear) for owner, name in linear]
    return found


class _Step:
    """The step of one model, with the weights that it reads.

    Args:
        model: the model.
        parts: modules whose work the step does.
    """

    def __init__(self, model: Any, parts: list[Part]) -> None:
        # What keeps a step must not keep its model.
        self._model: Callable[[], Any] = weakref.ref(model)
        self._base = model.model
        self._unchanged = Unchanged(parts)
        self._weight_dtype = model.weight_dtype
        self._caches: weakref.WeakKeyDictionary[MemoryCache, _CacheStep] = weakref.WeakKeyDictionary()

    def fits(self) -> bool:
        """Whether the step does what the model's modules do, as far as sizes and formats go."""
        model = self._model()
        dtype, blocks = model.lm_head.weight.dtype, model.model.layers
        for x in self._unchanged.weights:
            if type(x) is not nn.Parameter or not (x.is_cpu and x.is_contiguous()):
                return False
            if x.dtype != dtype or x.dtype not in DTYPES:
                return False
        attentions = [block.self_attn for block in blocks]
        return (
            len(blocks) == model.config.num_hidden_layers
            and [x.layer_idx for x in attentions] == list(range(len(blocks)))
            and all(getattr(x, "sliding_window", None) is None for x in attentions)
            and len({(x.head_dim, len(x.q_proj.weight), len(x.k_proj.weight)) for x in attentions}) == 1
        )

    def is_current(self) -> bool:
        """Whether modules and weights are still those that the step was made of, and plain."""
        model = self._model()
        if model.weight_dtype != self._weight_dtype or model.config._attn_implementation != IMPLEMENTATION:
            return False
        config = model.config
        has_more = config.output_attentions or config.output_hidden_states
        if has_more or not getattr(config, "return_dict", True):
            return False
        # Its one hook is that of `attach`.
        base = model.model
        if base is not self._base or len(base._forward_pre_hooks) != 1 or base._forward_hooks:
            return False
        return "forward" not in vars(base) and bool(self._unchanged)

    def pack_(self) -> None:
        """Make the copies of the weights that the step reads, where it does not read those of the model."""
        model, format = self._model(), checked_weight_dtype(self._weight_dtype)

        def matrix(linear: nn.Linear) -> Matrix:
            return packed(linear.weight, linear.bias, format)

        def norm(module: Any) -> Tensor:
            return module.weight.detach().float()

        self._layers: list[HeadsLayer] = []
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            before, after = block.input_layernorm, block.post_attention_layernorm
            of_heads = [getattr(attention, x, None) for x in ("q_norm", "k_norm")]
            eps = [0.0 if x is None else x.variance_epsilon for x in (before, after, of_heads[0])]
            products = {x: matrix(getattr(attention, f"{x}_proj")) for x in "qkvo"}
            products |= {x: matrix(getattr(mlp, f"{x}_proj")) for x in ("gate", "up", "down")}
            layer = HeadsLayer(
                **products,
                mixer_norm=norm(before),
                mlp_norm=norm(after),
                q_norm=None if of_heads[0] is None else norm(of_heads[0]),
                k_norm=None if of_heads[1] is None else norm(of_heads[1]),
                eps=(eps[0], eps[1], eps[2]),
                head_dim=attention.head_dim,
                score_scale=attention.scaling,
            )
            self._layers.append(layer)
        final = model.model.norm
        self._norm, self._eps = norm(final), final.variance_epsilon
        # GGUF files, too, keep more bits of the output layer than of the others.
        output = model.lm_head
        self._output = packed(output.weight, output.bias, "int8" if format == "int4" else format)

    def stream(self, call: _Call) -> Tensor | None:
        """`[B, T, D]`, after which the cache has read the tokens; None if the step cannot read that cache."""
        model, cache, num = self._model(), call.cache, call.tokens.shape[1]
        # Raises if layers have read different numbers.
        num_columns = cache.num_columns
        if len(cache.layers) != len(self._layers) or not all(_is_ready(layer) for layer in cache.layers):
            return None
        # All layers turn at the same places.
        if cache.layers[0].until_turn() <= num or not all(layer.can_record(num) for layer in cache.layers):
            return None
        for layer in cache.layers:
            layer.own_()
        own = self._caches.get(cache)
        if own is None or not own.is_current(cache):
            if not all(self._can_read(layer, len(call.tokens)) for layer in cache.layers):
                return None
            self._caches[cache] = own = _CacheStep(cache, self._layers)
        positions = call.positions
        if positions is None:
            positions = torch.arange(num_columns, num_columns + num)[None]
        x = model.model.embed_tokens(call.tokens)
        cos, sin = model.model.rotary_emb(x, position_ids=positions)
        if cos.shape[-1] != self._layers[0].head_dim:
            return None
        return own.run(x.float(), cos, sin)

    def logits(self, stream: Tensor) -> Tensor:
        """`[B, T, V]`."""
        return output_step(stream, self._norm, self._eps, self._output).to(self._model().lm_head.weight.dtype)

    def _can_read(self, layer: MemoryLayer, num_rows: int) -> bool:
        """Whether a layer's memory is one of this model, and kernels can change it."""
        first, dim = self._layers[0], self._layers[0].head_dim
        num_heads, dtype = layer.config.num_kv_heads, self._model().lm_head.weight.dtype
        like = torch.empty(num_rows, num_heads, 1, dim, dtype=dtype)
        return num_heads * dim == first.k.shape[0] and all(
            memory.recent_keys.shape == (num_rows, len(memory.budget.heads), memory.budget.num_exact, dim)
            and memory.recent_values.shape == memory.recent_keys.shape
            and is_compiled([memory], like, like)
            and all(x.is_cpu for x in tensors_of(memory).values())
            for memory in layer.state
        )


def _is_ready(layer: MemoryLayer) -> bool:
    """Whether a layer has read something, and no call has stopped half-way."""
    return layer.state is not None and not layer.has_staged


class _CacheStep:
    """The memories of a cache as kernels take them, from one token to the next.

    Args:
        cache: what the rows have read.
        layers: those of the model.
    """

    def __init__(self, cache: MemoryCache, layers: Sequence[HeadsLayer]) -> None:
        self._memories = [memory for layer in cache.layers for memory in layer.own_()]
        self._layers = cache.layers
        self._configs = [layer.config for layer in cache.layers]
        self._tensors = [tensors_of(memory) for memory in self._memories]
        groups = [_groups(layer, of) for layer, of in zip(cache.layers, layers, strict=True)]
        self._groups = [group for own in groups for group in own]
        self._merged: list[list[int]] = [[] for _ in self._groups]
        factors = [
            None if x.key_exponents is None else key_factors(x.key_exponents, torch.empty(1, 1, 1, dim))[:, 0]
            for x, dim in ((config, layers[0].head_dim) for config in self._configs)
        ]
        self._step = HeadsStep(layers, groups, factors, cache.num_rows, MOST_ROWS)
        self._num_tokens = 1

    def is_current(self, cache: MemoryCache) -> bool:
        """Whether the cache still has these memories, and they their tensors."""
        memories = [memory for layer in cache.layers for memory in layer.state]
        if len(memories) != len(self._memories):
            return False
        for layer, config in zip(cache.layers, self._configs, strict=True):
            if layer.config is not config:
                return False
        for memory, own, tensors in zip(memories, self._memories, self._tensors, strict=True):
            memory.own_()
            if memory is not own:
                return False
            fields = vars(memory)
            for name, x in tensors.items():
                if fields[name] is not x:
                    return False
        return True

    def run(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[B, T, D]` through the layers, with angles `[B or 1, T, K]`; the memories have read the tokens."""
        rows, num, _ = x.shape
        before = [layer.copies_before(num) for layer in self._layers]
        if num != self._num_tokens:
            self._num_tokens = num
            for group in self._groups:
                group.put("length", [num] * rows)
        for i, (memory, group) in enumerate(zip(self._memories, self._groups, strict=True)):
            group.put("filled", memory.filled)
            if memory.num_merged != self._merged[i]:
                self._merged[i] = list(memory.num_merged)
                group.put("num_merged", memory.num_merged)
                group.put("schedule", _schedule(memory))
        for own, angles in ((self._step.cos, cos), (self._step.sin, sin)):
            own[: rows * num].view(rows, num, -1).copy_(angles)
        y = self._step.run(x)
        for memory in self._memories:
            memory.count_tokens(num)
        for layer, copies in zip(self._layers, before, strict=True):
            layer.num_columns += num
            layer.record_read(copies, num)
        return y


def _schedule(memory: HeadMemory) -> list[int]:
    """Slots in use now and after the next merge, of each row, one row after the other."""
    budget, size = memory.budget, memory.budget.chunk_size
    return [budget.num_open(num + more) for num in memory.num_merged for more in (0, size)]


def _groups(layer: MemoryLayer, of: HeadsLayer) -> list[HeadGroup]:
    """The heads of a layer as kernels take them."""
    config, dim = layer.config, of.head_dim
    num_heads = of.q.shape[0] // dim
    groups = []
    for memory in layer.state:
        num_rows, budget = len(memory.filled), memory.budget
        # The kernel puts in its own queries, keys and values.
        k = torch.empty(num_rows, config.num_kv_heads, 1, dim, dtype=memory.recent_keys.dtype)
        schedule = _schedule(memory)
        groups.append(
            HeadGroup.of(
                tensors_of(memory),
                heads=budget.heads,
                num_sinks=budget.num_sinks,
                chunk_size=budget.chunk_size,
                options=budget.options if budget.num_slots else None,
                filled=memory.filled,
                num_merged=memory.num_merged,
                lengths=[1] * num_rows,
                schedule=[schedule[i : i + 2] for i in range(0, len(schedule), 2)],
                k=k,
                v=k,
                q=torch.empty(num_rows, num_heads, 1, dim),
                temperature=_numbers(config, "slot_temperature"),
                bias=_numbers(config, "slot_bias"),
            )
        )
    return groups


def _numbers(config: LayerConfig, name: str) -> Tensor | None:
    found: Iterable[float] | None = getattr(config, name)
    return None if found is None else torch.tensor(tuple(found), dtype=torch.float32)
