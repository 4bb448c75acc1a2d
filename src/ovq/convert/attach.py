"""`attach` gives a pretrained model a memory of constant size; `load` loads a converted model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from ovq.convert.attention import IMPLEMENTATION, LAYER_CONFIG, check_implementation, packed_arguments
from ovq.convert.cache import MemoryCache
from ovq.convert.cache_step import MOST_ROWS
from ovq.convert.config import CONFIG_KEY, MemoryConfig, as_table, check_heads
from ovq.convert.context import KIND
from ovq.convert.equality import check_equal, some_logits
from ovq.convert.packed import PACKED, can_pack, pack_
from ovq.convert.rotary import rotary_buffers, with_reach
from ovq.convert.step import checked_weight_dtype, num_drafts, read_apart, token_output
from ovq.hf.cache import CACHE_KEY, one_of
from ovq.hf.context_file import digest, weights_of
from ovq.hf.generation import CachedGeneration, execution_device
from ovq.hf.hub import check_loaded
from ovq.hf.pretrained import PLACES
from ovq.ops import cpu_kernels
from ovq.ops.uncompiled import uncompiled
from ovq.runtime.files import read_json


def _of_own_weights(name: str, does: str) -> Any:
    """The method `name` of a model's own class, refused for packed weights."""

    def method(self: ConvertedMixin, *args: Any, **kwargs: Any) -> Any:
        self._check_not_packed(name)
        return getattr(super(ConvertedMixin, self), name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"{does}, as its own class does; ValueError for packed weights."
    return method


class ConvertedMixin(CachedGeneration):
    """Methods that conversion adds to a model's own class.

    Attributes:
        weight_dtype: format of the weights, see `attach`.
        weights_digest: SHA-256 of the base model's weights before packing; None if they are not packed.
    """

    context_kind = KIND
    weight_dtype: str | None = None
    weights_digest: str | None = None

    @property
    def device(self) -> torch.device:
        """Device for inputs, which differs from that of weights offloaded by accelerate."""
        own: Any = super()
        return execution_device(self, own.device)

    @property
    def most_drafts(self) -> int:
        """As many as are not read like a prompt, whose inputs are rounded where weights are packed."""
        return super().most_drafts if self.weights_digest is None else MOST_ROWS - 1

    @property
    def memory_config(self) -> MemoryConfig:
        """Sizes and settings of the memory, which are fixed once the model is converted."""
        own: Any = self
        return own.base_model._ovq_memory_config

    def make_cache(self) -> MemoryCache:
        """An empty cache, to be passed to `forward` or `generate` as `past_key_values`."""
        return MemoryCache(self.memory_config)

    def memory_fields(self) -> dict[str, Any]:
        """Everything besides the weights that a memory depends on: the fields of its config."""
        return self.memory_config.to_dict()

    def row_inputs(self, cache: MemoryCache, lengths: Sequence[int], num_new: int) -> dict[str, Tensor]:
        """Arguments of `forward` for `num_new` tokens of rows that have read `lengths` tokens each."""
        first = torch.tensor(lengths, device=self.device)[:, None]
        return {"position_ids": first + torch.arange(num_new, device=self.device)}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the model. Rotary frequencies are not rounded, as keys are re-positioned by them."""
        before = rotary_buffers(self)
        own: Any = super()
        own._apply(*args, **kwargs)
        for module, exact in before:
            if module.inv_freq.dtype != exact.dtype:
                module.inv_freq = exact.to(module.inv_freq.device)
        return self

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse any implementation but the memory's.

        Raises:
            ValueError: another implementation, with which the model would have full attention.
        """
        given = attn_implementation
        check_implementation(given.get("") if isinstance(given, dict) else given)
        own: Any = super()
        own.set_attn_implementation(attn_implementation, *args, **kwargs)

    save_pretrained = _of_own_weights("save_pretrained", "Save the model")
    # Before it creates a repository.
    push_to_hub = _of_own_weights("push_to_hub", "Upload the model")
    resize_token_embeddings = _of_own_weights("resize_token_embeddings", "Change the size of the vocabulary")
    # Contexts would go on as if of the weights before.
    load_state_dict = _of_own_weights("load_state_dict", "Replace the weights")

    def _check_not_packed(self, what: str) -> None:
        if self.weights_digest is not None:
            raise ValueError(
                f"{what}: expected a model with its own weights, found them rounded to "
                f"{self.weight_dtype}: load it without weight_dtype"
            )

    def checked_cache(self, cache: Any) -> MemoryCache:
        """`cache`; ValueError unless it is a `MemoryCache` for the same numbers of layers and heads."""
        return _checked(cache, self.memory_config)

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        """Support pickle and copy: the class is created again, as it cannot be imported by name."""
        classes = type(self).__mro__
        own_class = classes[classes.index(CachedGeneration) + 1]
        if type(self) is not _converted_class(own_class):
            # The class was changed after `attach`, which re-creating it would lose.
            return super().__reduce_ex__(protocol)
        return _empty, (own_class,), super().__reduce_ex__(max(int(protocol), 2))[2]


def attach(
    model: PreTrainedModel,
    *,
    num_slots: int | Sequence[Sequence[int]] = 256,
    window: int | Sequence[Sequence[int]] = 256,
    num_sinks: int = 4,
    chunk_size: int = 32,
    merge: str = "nearest",
    value_weight: float = 1.0,
    max_distance: int | None = None,
    state_dtype: str | None = None,
    config: MemoryConfig | None = None,
    weight_dtype: str | None = None,
) -> Any:
    """Replace the growing KV cache of a pretrained decoder by a memory of constant size, without training.

    Each key/value head keeps the first `num_sinks` and the last `window` tokens exactly. Tokens that leave
    the window are merged into `num_slots` slots. Until the first merge, the outputs are those of the original
    model. `forward` and `generate` are called as before; the cache is a `MemoryCache`.

    Args:
        model: a causal language model of transformers, such as `AutoModelForCausalLM` loads. Its attention
            must go through transformers' attention functions, without soft caps, sliding windows or learned
            sinks: Llama, Qwen2, Qwen3, Mistral (without `sliding_window`) and models like them. It is changed
            in place.
        num_slots: slots per head: one number, or one per layer and key/value head.
        window: last tokens per head, a multiple of `chunk_size`: one number, or one per layer and head.
        num_sinks, chunk_size, value_weight: see `MemoryConfig`.
        merge: update rule of the slots, `"nearest"` or the paper's `"existing"`.
        max_distance: largest distance, in tokens, at which queries see sinks and slots once a text exceeds
            the trained length of the model (its `max_position_embeddings`). None for a quarter of that
            length, or for no limit if the model's rotary frequencies are not known.
        state_dtype: format of the slots: `"float32"` (the default, needed for gradients), `"bfloat16"`
            or `"int8"`, a half and 28 % of its bytes. A slot is rounded each time tokens are merged into it.
        config: all of the above in one object instead, as `ovq.convert.load` and `probe` use it.
        weight_dtype: format of the weights on a CPU with compiled kernels. `"int8"` or `"int4"` (the output
            layer then in int8) replace the model's own weights, after which it can be neither saved nor
            trained. `"float32"` or `"bfloat16"` make a copy that is used for decoding. None or `"auto"` for
            the model's own, which it keeps, with a warning, elsewhere. It is not saved.

    Returns:
        The same model; its class is now a subclass of the original class, with `ConvertedMixin`.

    Raises:
        ValueError: a number out of range, or a model that cannot be converted (the message says why).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
        >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)
        >>> model = LlamaForCausalLM(config).eval()
        >>> model = attach(model, num_slots=8, window=16, num_sinks=2, chunk_size=8)
        >>> cache = model.make_cache()
        >>> _ = model(torch.arange(200)[None] % 32, past_key_values=cache)
        >>> cache
        MemoryCache(layers=2, rows=1, columns=200, 3,736 bytes)
    """
    checked_weight_dtype(weight_dtype)
    heads = kv_heads(model)
    given: dict[str, Any] = {
        **{"num_slots": num_slots, "window": window, "num_sinks": num_sinks, "chunk_size": chunk_size},
        **{"merge": merge, "value_weight": value_weight, "max_distance": max_distance},
    }
    if config is None:
        tables = {name: as_table(name, given[name], heads) for name in ("num_slots", "window")}
        config = MemoryConfig(**given | tables)
    elif not isinstance(config, MemoryConfig):
        raise ValueError(f"config: expected a MemoryConfig, found {type(config).__name__}")
    else:
        if others := [name for name, x in given.items() if x != (attach.__kwdefaults__ or {})[name]]:
            raise ValueError(f"config: expected all settings in it, found {', '.join(others)} beside it")
        check_heads("config", config.num_slots, heads)
    if state_dtype is not None:
        config = dataclasses.replace(config, state_dtype=state_dtype)
    config = with_reach(config, model)
    before = some_logits(model)
    shared = _own_config_(model)
    implementation = model.config._attn_implementation
    own_class: Any = type(model)
    # The hook is called with the base model only.
    base: Any = model.base_model
    attentions: list[Any] = [x for x in model.modules() if isinstance(getattr(x, "layer_idx", None), int)]
    hook = base.register_forward_pre_hook(_with_cache, with_kwargs=True)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        setattr(model.config, CONFIG_KEY, config.to_dict())
        base._ovq_memory_config = config
        for module in attentions:
            setattr(module, LAYER_CONFIG, config.layer(module.layer_idx))
        model.__class__ = _converted_class(own_class)
        check_equal(model, before)
    except BaseException:
        hook.remove()
        model.__class__ = own_class
        model.set_attn_implementation(implementation)
        for module, given in shared:
            module.config = given
        vars(base).pop("_ovq_memory_config", None)
        for module in attentions:
            vars(module).pop(LAYER_CONFIG, None)
        raise
    return set_weight_dtype(model, weight_dtype)


def load(folder: str | os.PathLike, *, weight_dtype: str | None = None, **options: Any) -> PreTrainedModel:
    """Load a converted model: its weights, and the saved settings of its memory.

    The folder holds the original model with one more field in its config, so
    `AutoModelForCausalLM.from_pretrained` loads it too, with full attention.

    Args:
        folder: where `save_pretrained` of a converted model, or `ovq convert`, has written, or the name of a
            repository on the hub.
        weight_dtype: the format of the weights, see `attach`.
        options: those of `AutoModelForCausalLM.from_pretrained`, such as `dtype` and `device_map`. As there,
            `output_loading_info=True` returns the model and a report.

    Raises:
        OSError: no model there.
        ValueError: a model that is not converted, sizes or weights that do not fit it, or an unknown
            `weight_dtype`.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> model = attach(LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval(), num_slots=8)
        >>> folder = tempfile.mkdtemp()
        >>> model.save_pretrained(folder)
        >>> load(folder).memory_config == model.memory_config
        True
    """
    checked_weight_dtype(weight_dtype)
    found = memory_config_in(folder, **{name: options[name] for name in PLACES if name in options})
    if found is None:
        raise ValueError(
            f"{folder}: expected a converted model, found no {CONFIG_KEY} in its config.json: convert it "
            "with ovq.convert.attach, or ovq convert"
        )
    # Neither transformers' types nor the one above know of the report.
    auto: Any = AutoModelForCausalLM
    # `check_loaded` refuses weights of other shapes, and names them.
    reporting = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = auto.from_pretrained(folder, **options | reporting)
    check_loaded(folder, report, allow_extra=True)
    model = set_weight_dtype(attach(model.eval(), config=found), weight_dtype)
    both: Any = model, report
    return both if options.get("output_loading_info") else model


def memory_config_in(folder: str | os.PathLike, **places: Any) -> MemoryConfig | None:
    """The `MemoryConfig` of the model in a folder or repository; None if it has none.

    Args:
        folder: as in `load`.
        places: options of `from_pretrained` for locating files, such as `subfolder`.

    Raises:
        OSError: no config there.
        ValueError: a damaged config.
    """
    missing = f"{folder}: expected a converted model, found no config.json"
    try:
        path = cached_file(folder, "config.json", **places)
    except OSError as error:
        raise FileNotFoundError(missing) from error
    if path is None:
        raise FileNotFoundError(missing)
    fields = read_json(Path(path))
    if not isinstance(fields, dict) or CONFIG_KEY not in fields:
        return None
    return MemoryConfig.from_dict(fields[CONFIG_KEY])


def set_weight_dtype(model: Any, weight_dtype: str | None) -> Any:
    """Apply `weight_dtype` (see `attach`) to a converted model with its own weights; returns the model."""
    model.weight_dtype = checked_weight_dtype(weight_dtype)
    if model.weight_dtype is not None and not can_pack(model):
        warnings.warn(
            f"weight_dtype={weight_dtype!r}: expected compiled kernels and a model on the CPU, found kernels "
            f"{cpu_kernels()} and a model on {model.device}, which keeps its own weights",
            stacklevel=3,
        )
    elif weight_dtype in PACKED:
        # Contexts belong to the original model, whatever format its weights are rounded to.
        model.weights_digest = digest(weights_of(model.base_model))
        pack_(model, weight_dtype)
    return model


def _empty(own_class: Any) -> Any:
    """An uninitialised converted model, which pickle fills."""
    return object.__new__(_converted_class(own_class))


@functools.cache
def _converted_class(own_class: type[PreTrainedModel]) -> type:
    """A subclass of a model's class with the same name, so that the saved config names the original class."""

    @functools.wraps(own_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Versions of transformers differ in the name of the cache argument; both are accepted.
        if kwargs.keys() & {"past_key_values", "cache"}:
            kwargs[CACHE_KEY] = one_of(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if self.training and torch.is_grad_enabled() and any(x.requires_grad for x in self.parameters()):
            # Only embeddings and norms would learn.
            self._check_not_packed("training")
        if num := num_drafts(self, kwargs):
            return read_apart(self, num, kwargs)
        done = token_output(self, own_class, args, kwargs)
        if done is not None:
            return done
        return own_class.forward(self, *args, **kwargs)

    body = {"__module__": own_class.__module__, "__doc__": own_class.__doc__, "forward": forward}
    return type(own_class.__name__, (ConvertedMixin, own_class), body)


def kv_heads(model: PreTrainedModel) -> list[int]:
    """Number of key/value heads of each layer.

    Raises:
        ValueError: the model is not a decoder with full attention in every layer, or converted already.
    """
    if isinstance(model, ConvertedMixin):
        raise ValueError("model: expected one that is not converted yet, found a converted one")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a model of transformers, found {type(model).__name__}")
    config, name = model.config, type(model).__name__
    if config.model_type == "ovq":
        raise ValueError(
            f"{name}: expected a model of transformers, such as LlamaForCausalLM, found one of this library: "
            "its mixers have slots already (set_num_slots changes their number)"
        )
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        raise ValueError(
            f"{name}: expected a decoder of text, found an encoder-decoder or a model of several modalities"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"{name}: expected full attention in every layer, found layer_types {sorted(kinds)}: such models "
            "cannot be converted"
        )
    is_sliding = getattr(config, "use_sliding_window", True)
    if is_sliding and (found := getattr(config, "sliding_window", None)) is not None:
        raise ValueError(
            f"{name}: expected sliding_window None in the config, found {found}: set it to None, and slots "
            "keep the tokens that leave that window"
        )
    if (found := getattr(config, "attn_logit_softcapping", None)) is not None:
        raise ValueError(
            f"{name}: expected attn_logit_softcapping None in the config, found {found}: soft caps cannot be "
            "converted"
        )
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        raise ValueError(
            f"{name}: expected num_hidden_layers and num_attention_heads in its config, found none"
        )
    if not model._supports_attention_backend:
        raise ValueError(
            f"{name}: expected a model whose attention goes through transformers' attention functions, found "
            "one that has its own"
        )
    if not model.can_generate():
        raise ValueError(f"{name}: expected a causal language model, found one that cannot generate text")
    # Hooks of accelerate load weights that it has offloaded.
    if any(x.is_meta for m in model.modules() if not hasattr(m, "_hf_hook") for x in m.parameters(False)):
        raise ValueError(f"{name}: expected a model with its weights, found them on the meta device")
    return [heads] * layers


def _own_config_(model: Any) -> list[tuple[Any, Any]]:
    """Give the model and its modules a copy of their config, which other models may share.

    Returns the modules with the configs that they had.
    """
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    had = [(m, vars(m)["config"]) for m in model.modules() if id(vars(m).get("config")) in copies]
    for module, given in had:
        module.config = copies[id(given)]
    return had


@uncompiled
def _with_cache(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the base model: check the given cache, or make a `MemoryCache` if one is used."""
    check_implementation(module.config._attn_implementation)
    if torch.compiler.is_exporting():
        raise ValueError(
            "expected no torch.export of a converted model, found one: a graph cannot hold its memory, which "
            "torch.compile runs beside its graphs"
        )
    names = list(inspect.signature(module.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if (packed := packed_arguments(given)) is not None:
        return (), packed
    found = one_of(given.get("past_key_values"), given.get("cache"))
    is_checkpointing = module.training and getattr(module, "gradient_checkpointing", False)
    if found is not None:
        if is_checkpointing:
            # transformers would run the layers without it.
            raise ValueError("expected no cache while training with gradient checkpointing, found one")
        _checked(found, module._ovq_memory_config)
        return args, kwargs
    if given.get("use_cache") is None:
        # None in training: checkpointing from outside, as of FSDP, calls layers again, which would add to it.
        given["use_cache"] = module.config.use_cache and not (module.training and torch.is_grad_enabled())
    if given["use_cache"] and not is_checkpointing:
        given.pop("past_key_values", None)
        given.pop("cache", None)
        return (), {**given, CACHE_KEY: MemoryCache(module._ovq_memory_config)}
    inputs, positions = given.get("input_ids"), given.get("position_ids")
    inputs = given.get("inputs_embeds") if inputs is None else inputs
    is_plain = positions is None or bool((positions.diff() == 1).all())
    if is_plain and inputs is not None and given.get("attention_mask") is None:
        # Under torch.compile, transformers takes rows without a mask for packed ones.
        given["attention_mask"] = torch.ones(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
    return (), given


def _checked(cache: Any, config: MemoryConfig) -> MemoryCache:
    """`cache`; ValueError unless it is a `MemoryCache` with the layers and heads of the config."""
    if not isinstance(cache, MemoryCache):
        raise ValueError(
            f"expected a MemoryCache (model.make_cache()) as cache of a converted model, "
            f"found {type(cache).__name__}"
        )
    expected, found = (list(map(len, x.num_slots)) for x in (config, cache.config))
    if found != expected:
        raise ValueError(
            f"expected a cache of this model (model.make_cache()), with {expected} key/value heads per "
            f"layer, found one with {found}"
        )
    return cache
