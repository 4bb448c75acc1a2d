"""Run all layers of a converted model in one kernel call, where possible.

Calling PyTorch modules takes longer than reading the weights from memory. A kernel reads them once per call,
in a narrower format if requested (`weight_dtype`). Calls with gradients, hooks, adapters, padding or
requested intermediate outputs run the modules instead; so do prompts, unless the weights are int8 or int4 and
the processor multiplies bytes. Several tokens of a row count as drafts (assisted decoding) if the cache
records what it reads, to be able to crop it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

from ovq.convert.attention import IMPLEMENTATION
from ovq.convert.cache import MemoryCache, MemoryLayer
from ovq.convert.cache_step import MOST_ROWS, CacheStep, read_pieces
from ovq.convert.compiled import is_compiled
from ovq.convert.packed import PACKED, PackedLinear
from ovq.convert.unchanged import Part, Unchanged
from ovq.hf.cache import CACHE_KEY
from ovq.layers.products import has_own_forward, is_plain
from ovq.ops.backends.cpu.kernels import DTYPES, is_available
from ovq.ops.backends.cpu.layer import HeadsLayer
from ovq.ops.backends.cpu.weights import Matrix, matrix_product, packed
from ovq.ops.transforms import needs_operations
from ovq.ops.uncompiled import uncompiled

#: Formats of the weights for decoding, as `attach` takes them.
WEIGHT_DTYPES = ("float32", "bfloat16", "int8", "int4")

_code_of = attrgetter("forward.__module__")
_SILU = type(ACT2FN["silu"])
_FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
# Values of other arguments of `forward` that request nothing beyond logits.
_PLAIN_VALUES = {
    "use_cache": (True, None),
    "return_dict": (True, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "labels": (None,),
    "inputs_embeds": (None,),
}


def checked_weight_dtype(weight_dtype: str | None) -> str | None:
    """Format of the weights for decoding; None for the model's own.

    Raises:
        ValueError: an unknown format.

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


@uncompiled
def token_output(model: Any, own_class: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Output of a converted model's `forward` from the kernel; None if the modules must run.

    `own_class` is the model's class before conversion.
    """
    call = _call_of(model, args, kwargs)
    if (
        call is None
        or (step := _step_of(model, own_class, call)) is None
        or (stream := step.stream(call)) is None
    ):
        return None
    kept: dict[str, Any] = {CACHE_KEY: call.cache}
    logits = step.logits(stream[:, -call.num_logits :])
    return CausalLMOutputWithPast(logits=logits, **kept)  # type: ignore[arg-type]  # a float tensor


def num_drafts(model: Any, kwargs: dict[str, Any]) -> int:
    """How many of the last tokens of a call are drafts beside a prompt; 0 if they need no call of their own.

    Assisted decoding begins with both in one call. Packed weights round the inputs of prompts, but drafts
    must be read as single tokens are.
    """
    tokens, cache = kwargs.get("input_ids"), kwargs.get(CACHE_KEY)
    if model.weights_digest is None or not isinstance(tokens, Tensor) or not isinstance(cache, MemoryCache):
        return 0
    if cache.num_prompt is None or tokens.numel() <= MOST_ROWS:
        return 0
    num = cache.get_seq_length() + tokens.shape[1] - cache.num_prompt
    return num if 0 < num < tokens.shape[1] else 0


def read_apart(model: Any, num: int, kwargs: dict[str, Any]) -> Any:
    """Output of `forward` for a prompt and then for its `num` drafts, which alone can be cropped."""
    both = [x for x in ("input_ids", "position_ids") if kwargs.get(x) is not None]
    mask, layers = kwargs.get("attention_mask"), kwargs[CACHE_KEY].layers
    prompt = kwargs | {x: kwargs[x][:, :-num] for x in both} | {"logits_to_keep": 1}
    for layer in layers:
        layer.record_past = False
    first = model.forward(**prompt | {"attention_mask": None if mask is None else mask[:, :-num]})
    for layer in layers:
        layer.activate_past_recording()
    found = model.forward(**kwargs | {x: kwargs[x][:, -num:] for x in both})
    found.logits = torch.cat([first.logits, found.logits], 1)
    if found.hidden_states is not None:
        states = zip(first.hidden_states, found.hidden_states, strict=True)
        found.hidden_states = tuple(torch.cat(pair, 1) for pair in states)
    return found


def token_stream(model: Any, own_class: type, **inputs: Any) -> Tensor | None:
    """Input `[B, T, D]` of a converted model's final norm, for engines that compute logits themselves.

    `inputs` are those of `forward`; their cache then contains the tokens. None, with the cache unchanged, if
    the modules must run.
    """
    call = _call_of(model, (), inputs)
    if call is None or (step := _step_of(model, own_class, call)) is None:
        return None
    return step.stream(call)


class _Call(NamedTuple):
    tokens: Tensor
    positions: Tensor | None
    cache: MemoryCache
    num_logits: int
    is_prompt: bool


def _call_of(model: Any, args: tuple, kwargs: dict[str, Any]) -> _Call | None:
    """The call, if it requests only the logits of real tokens; else None."""
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
        if not any(value is plain for plain in _PLAIN_VALUES.get(name, ())):
            return None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not tokens.is_cpu:
        return None
    rows, num = tokens.shape
    is_prompt = rows * num > MOST_ROWS or not (num == 1 or _are_drafts(cache, num))
    if not rows * num or cache.num_rows not in ((rows, 0) if is_prompt else (rows,)):
        return None
    if is_prompt and model.weight_dtype not in PACKED:
        return None
    if positions is not None and getattr(positions, "shape", None) not in ((1, num), (rows, num)):
        return None
    if positions is not None and num > 1 and not bool((positions.diff() > 0).all()):
        # Packed rows, or positions that the modules refuse.
        return None
    if mask is not None and not _is_all_real(mask, rows, num):
        return None
    return _Call(tokens, positions, cache, num_logits, is_prompt)


def _are_drafts(cache: MemoryCache, num: int) -> bool:
    """Whether `num` tokens may be cropped later, and cause at most one merge."""
    return all(layer.record_past and num <= layer.config.budgets[0].chunk_size for layer in cache.layers)


def _is_all_real(mask: Any, num_rows: int, num: int) -> bool:
    """Whether a mask has no padding among the new tokens."""
    is_mask = isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == num_rows and mask.shape[1] >= num
    return is_mask and bool(mask[:, -num:].all())


# Not attributes of the models, because models are copied and pickled.
_STEPS: weakref.WeakKeyDictionary[nn.Module, _Step] = weakref.WeakKeyDictionary()


def _step_of(model: Any, own_class: type, call: _Call) -> _Step | None:
    """The step of a model in its current state; None if kernels cannot run it."""
    if _has_any_global_hook() or torch.is_autocast_enabled("cpu") or needs_operations() or not is_available():
        return None
    step = _STEPS.get(model)
    if step is None or not (step.is_current() and step.has_same_numbers(call.cache)):
        # Free the old copy of the weights before another is made.
        _STEPS.pop(model, None)
        step = _made_step(model, own_class)
        if step is not None:
            _STEPS[model] = step
    return step


def _made_step(model: Any, own_class: type) -> _Step | None:
    """A new step for a model; None for an unsupported architecture or changed modules."""
    modules = [f"transformers.models.{family}.modeling_{family}" for family in _FAMILIES]
    if own_class.__module__ not in modules or not own_class.__name__.endswith("ForCausalLM"):
        return None
    name = own_class.__name__.removesuffix("ForCausalLM")
    try:
        parts = _parts(model, lambda part: getattr(sys.modules[own_class.__module__], name + part))
    except (AttributeError, KeyError):
        # The user has removed modules, or transformers has renamed classes.
        return None
    step = _Step(model, own_class, parts)
    if not (step.is_current() and step.fits()):
        return None
    step.pack_()
    return step


def _parts(model: nn.Module, class_of: Callable[[str], type[nn.Module]]) -> list[Part]:
    """The modules that the step replaces. `class_of` maps a suffix such as "MLP" to the model's class."""

    def part(owner: nn.Module, name: str, kind: type[nn.Module] | str) -> Part:
        module = owner._modules[name]
        assert module is not None
        return Part(owner._modules, name, module, class_of(kind) if isinstance(kind, str) else kind)

    def linear(owner: nn.Module, name: str) -> Part:
        is_packed = type(owner._modules[name]) is PackedLinear
        return part(owner, name, PackedLinear if is_packed else nn.Linear)

    base = model._modules["model"]
    assert base is not None
    layers = part(base, "layers", nn.ModuleList)
    found = [layers, part(base, "norm", "RMSNorm"), part(base, "rotary_emb", "RotaryEmbedding")]
    found.append(linear(model, "lm_head"))
    for index in layers.module._modules:
        block = part(layers.module, index, "DecoderLayer")
        attention, mlp = part(block.module, "self_attn", "Attention"), part(block.module, "mlp", "MLP")
        found += [block, attention, mlp, part(mlp.module, "act_fn", _SILU)]
        norms = [(block, "input_layernorm"), (block, "post_attention_layernorm")]
        norms += [(attention, x) for x in ("q_norm", "k_norm") if x in attention.module._modules]
        found += [part(owner.module, name, "RMSNorm") for owner, name in norms]
        found += [linear(attention.module, f"{x}_proj") for x in "qkvo"]
        found += [linear(mlp.module, f"{x}_proj") for x in ("gate", "up", "down")]
    return found


def _is_own(function: Any, source: str) -> bool:
    """Whether a function of the module `source` is still its own.

    Where the library `kernels` is installed, it makes modules of functions.
    """
    if isinstance(function, nn.Module) and type(function).__module__.partition(".")[0] == "kernels":
        return is_plain(function, type(function))
    return getattr(function, "__module__", None) == source


class _Step:
    """Runs the layers of one model by kernels, with its own (possibly narrower) copy of the weights."""

    def __init__(self, model: Any, own_class: type, parts: list[Part]) -> None:
        # A weak reference, so that `_STEPS` does not keep models alive.
        self._model: Callable[[], Any] = weakref.ref(model)
        self._base = model.model
        self._unchanged = Unchanged(parts)
        kinds = dict.fromkeys(part.kind for part in parts if part.kind is not nn.ModuleList)
        # Classes of the modules that the kernels replace, and where their code must be from: other libraries,
        # such as Liger, put theirs in its place.
        self._kinds, self._source = [own_class, type(self._base), *kinds], own_class.__module__
        self._sources = {self._source, *(x.__module__ for x in (nn.Linear, PackedLinear, _SILU))}
        self._weight_dtype, self._dtype = model.weight_dtype, self._unchanged.weights[0].dtype
        self._caches: weakref.WeakKeyDictionary[MemoryCache, CacheStep] = weakref.WeakKeyDictionary()

    def fits(self) -> bool:
        """Whether the kernels support the model's sizes, dtypes and attention."""
        model, weights = self._model(), self._unchanged.weights
        blocks = model.model.layers
        attentions = [block.self_attn for block in blocks]
        return (
            all(type(x) is nn.Parameter and x.is_cpu and x.is_contiguous() for x in weights)
            and all(x.dtype == self._dtype for x in weights)
            and self._dtype in DTYPES
            and len(blocks) == model.config.num_hidden_layers
            and [x.layer_idx for x in attentions] == list(range(len(blocks)))
            and all(getattr(x, "sliding_window", None) is None for x in attentions)
            and len({(x.head_dim, x.q_proj.out_features, x.k_proj.out_features) for x in attentions}) == 1
        )

    def is_current(self) -> bool:
        """Whether modules and weights are still the same as when the step was made, without hooks."""
        model = self._model()
        if model.weight_dtype != self._weight_dtype or model.config._attn_implementation != IMPLEMENTATION:
            return False
        config = model.config
        has_more = config.output_attentions or config.output_hidden_states
        if has_more or not getattr(config, "return_dict", True):
            return False
        # The one expected hook is that of `attach`.
        base = model.model
        if base is not self._base or len(base._forward_pre_hooks) != 1 or base._forward_hooks:
            return False
        rotation = getattr(sys.modules[self._source], "apply_rotary_pos_emb", None)
        if not _is_own(rotation, self._source):
            return False
        if not all(map(self._sources.__contains__, map(_code_of, self._kinds))):
            return False
        return has_own_forward(base) and bool(self._unchanged)

    def has_same_numbers(self, cache: MemoryCache) -> bool:
        """Whether `Unchanged.samples` are those of the copies; looked at once per cache."""
        return cache in self._caches or torch.equal(self._samples, self._unchanged.samples())

    def pack_(self) -> None:
        """Prepare the weights for the kernels, as copies where the model's own cannot be used."""
        self._samples = self._unchanged.samples()
        model, format = self._model(), checked_weight_dtype(self._weight_dtype)

        def matrix(linear: nn.Linear | PackedLinear, format: str | None = format) -> Matrix:
            if isinstance(linear, PackedLinear):
                return linear.matrix
            return packed(linear.weight, linear.bias, format)

        self._layers: list[HeadsLayer] = []
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            norms = {"mixer_norm": block.input_layernorm, "mlp_norm": block.post_attention_layernorm}
            norms |= {x: getattr(attention, x, None) for x in ("q_norm", "k_norm")}
            mixer_eps, mlp_eps, head_eps, _ = (getattr(x, "variance_epsilon", 0.0) for x in norms.values())
            weights: dict[str, Any] = {x: matrix(getattr(attention, f"{x}_proj")) for x in "qkvo"}
            weights |= {x: matrix(getattr(mlp, f"{x}_proj")) for x in ("gate", "up", "down")}
            weights |= {x: None if m is None else m.weight.detach().float() for x, m in norms.items()}
            layer = HeadsLayer(
                **weights,
                eps=(mixer_eps, mlp_eps, head_eps),
                head_dim=attention.head_dim,
                score_scale=attention.scaling,
            )
            self._layers.append(layer)
        final = model.model.norm
        self._norm, self._eps = final.weight.detach().float(), final.variance_epsilon
        # More bits for the output layer, as in GGUF files.
        self._output = matrix(model.lm_head, "int8" if format == "int4" else format)

    def stream(self, call: _Call) -> Tensor | None:
        """Hidden states `[B, T, D]`; updates the cache. None if the kernels do not support the cache."""
        model, cache, num = self._model(), call.cache, call.tokens.shape[1]
        if len(cache.layers) != len(self._layers):
            return None
        # All layers re-position after the same tokens.
        in_pieces = call.is_prompt or cache.layers[0].until_reposition() <= num
        if not (self._fits_pieces(call) if in_pieces else self._fits_tokens(call)):
            return None
        # Raises ValueError if layers have read different numbers of columns.
        num_columns, positions = cache.num_columns, call.positions
        if positions is None:
            positions = torch.arange(num_columns, num_columns + num, device=call.tokens.device)[None]
        x = model.model.embed_tokens(call.tokens)
        cos, sin = model.model.rotary_emb(x, position_ids=positions)
        if cos.shape[-1] != self._layers[0].head_dim:
            return None
        if in_pieces:
            return read_pieces(cache, self._layers, x.float(), cos, sin, x.dtype)
        return self._caches[cache].run(x.float(), cos, sin)

    def _fits_pieces(self, call: _Call) -> bool:
        """Whether kernels can read the call's tokens into its cache, for any number of tokens."""
        layers = call.cache.layers
        return not any(layer.record_past or layer.has_staged for layer in layers) and all(
            self._can_read(layer, len(call.tokens)) for layer in layers
        )

    def _fits_tokens(self, call: _Call) -> bool:
        """Whether kernels can read a few tokens before the next re-positioning; prepares `self._caches`."""
        cache, num = call.cache, call.tokens.shape[1]
        for layer in cache.layers:
            # The cache must not be empty, and no call may have stopped half-way.
            if layer.state is None or layer.has_staged or not layer.can_record(num):
                return False
        for layer in cache.layers:
            layer.own_()
        own = self._caches.get(cache)
        if own is None or not own.is_current(cache):
            if not all(self._can_read(layer, len(call.tokens)) for layer in cache.layers):
                return False
            self._caches[cache] = CacheStep(cache, self._layers)
        return True

    def logits(self, stream: Tensor) -> Tensor:
        """Logits `[B, T, V]` of hidden states `[B, T, D]`."""
        return matrix_product(stream, self._output, self._norm, self._eps).to(self._dtype)

    def _can_read(self, layer: MemoryLayer, num_rows: int) -> bool:
        """Whether a layer's memory fits this model, and kernels can update it."""
        first, dim = self._layers[0], self._layers[0].head_dim
        num_heads = layer.config.num_kv_heads
        wrong = layer.config.misfits(first.q.shape[0] // dim, dim, dim)
        if num_heads * dim != first.k.shape[0] or any(wrong):
            return False
        like = torch.empty(num_rows, num_heads, 1, dim, dtype=self._dtype, device="cpu")
        return layer.state is None or all(
            memory.state.pending_keys.shape
            == memory.state.pending_values.shape
            == (num_rows, len(memory.budget.heads), memory.budget.num_exact, dim)
            and is_compiled([memory], like, like)
            and all(x.is_cpu for x in memory.kernel_tensors().values())
            for memory in layer.state
        )
