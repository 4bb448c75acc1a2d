"""Configuration of the OVQ language model: one backbone, with the mixer of each layer in `mixer_types`."""

import copy
import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Optional, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ovq.fields import SAVED_WITH_ALL, ConfigField, is_finite, with_new_names
from ovq.hf.auto_map import AUTO_MAP, MODULE, MODULE_FILE, without_own_entries
from ovq.hf.equal_sizes import equal_sizes
from ovq.layers import defaults
from ovq.layers.logn import check_logn_length
from ovq.layers.ovq import LEARNING_OPTIONS
from ovq.layers.registry import MIXERS, fields_of_mixers, mixer_class
from ovq.layers.sizes import check_conv_size, check_rotary, checked_head_dim
from ovq.ops.ablation import NAMES, Ablation, with_ablation, with_earlier_names
from ovq.ops.options import Options, current_merge, default_growth
from ovq.plugins import usable_names
from ovq.runtime.files import write_atomic

TO_TRAIN: dict[str, Any] = {"merge": "existing", "init": "novelty", "ablation": None}
"""Fields with which to train the layer that recalls most, of all that were measured."""

# What transformers' own models may be told to do otherwise, and ours always do.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}

T = TypeVar("T")

if TYPE_CHECKING:

    class Filled(Generic[T]):
        """An optional field that is filled in if left out, so that reading it never gives None."""

        def __get__(self, config: object, owner: type | None = None) -> T:
            """The value in the config."""

        def __set__(self, config: object, value: T | None) -> None:
            """Set the value; None to have it filled in."""

else:
    Filled = Optional


@strict
class OVQConfig(PreTrainedConfig):
    r"""Configuration of `OVQModel` and `OVQForCausalLM`.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU layers.
        num_hidden_layers: number of layers.
        num_attention_heads: query heads H of every mixer.
        num_key_value_heads: key/value heads Hkv; divides H. None: as many as query heads.
        head_dim: size of a head. None: `hidden_size / num_attention_heads`.
        rms_norm_eps: epsilon of the RMSNorm layers.
        rope_theta: base of the rotary frequencies, also as `rope_parameters={"rope_type": "default",
            "rope_theta": ...}`.
        rope_mixers: the mixer types whose layers get rotary embedding, out of `"sliding_attention"`,
            `"full_attention"` and `"ovq"`. None: only `"sliding_attention"`.
        logn_length: length in tokens beyond which full-attention and OVQ layers scale their logits by
            log(position) / log(`logn_length`); None for no scaling. Best the length of the training texts
            (docs/method/math.md, section 9).
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: use the embedding as the output layer too.
        mixer_types: one mixer per layer, from `ovq.layers.MIXERS`. None: `"sliding_attention"` and `"ovq"`
            alternate.
        sliding_window: tokens that a `"sliding_attention"` layer attends to, including the current one.
        num_slots: N, the largest number of slots per head of an `"ovq"` or a `"kvm"` layer; the slots per
            head of a `"vq"` layer.
        chunk_size: C, tokens per chunk of `"ovq"` layers, which attend to a chunk exactly before merging it,
            and of `"vq"` layers.
        conv_size: taps of the causal depthwise convolution in every mixer; 0 for none.
        growth: schedule of the dictionary: `"plateau"`, `"linear"` or `"immediate"`; None for the default of
            `merge`.
        init: which keys open slots: `"novelty"` or `"random"`.
        merge: slots that a key may be merged into: `"existing"` or `"updated"`; or `"nearest"`, which merges
            pairs of slots and tokens. `"ward"` and `"ward-sqrt"` of earlier versions run as `"nearest"`.
        ablation: ablated options, by the names of `ovq.ops.options.Ablation`; None for none. Until version
            0.2 these were fields.
        value_weight: weight of distances between values relative to those between keys, in rules that merge
            pairs.
        merge_gate: whether `"ovq"` layers learn a weight per token in the dictionary.
        forget_gate: whether `"ovq"` layers learn how fast earlier tokens fade.
        use_cache: whether a forward pass outside of training returns a cache by default.
        pad_token_id: for `generate`.
        bos_token_id: for `generate`.
        eos_token_id: for `generate`.
        kwargs: fields that mixers in `mixer_types` declare (`Mixer.config_fields`, docs/method/mixers.md). A
            config only has and saves the fields of its own mixers. Others are kept as in transformers.

    Raises:
        ValueError: a value out of range, an unknown mixer, a misspelt field, a field of a mixer that the
            model does not have, or one of transformers' fields with a value that the model does not support.

    Example:
        >>> config = OVQConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=2)
        >>> config.mixer_types
        ['sliding_attention', 'ovq', 'sliding_attention', 'ovq']
        >>> config.head_dim
        32
    """

    model_type = "ovq"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: Filled[int] = None  # type: ignore[assignment]  # see Filled
    head_dim: Filled[int] = None  # type: ignore[assignment]  # see Filled
    rms_norm_eps: float = 1e-6
    rope_theta: float | int = defaults.ROPE_THETA
    rope_mixers: Filled[list[str]] = None  # type: ignore[assignment]  # see Filled
    logn_length: int | None = defaults.LOGN_LENGTH
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    mixer_types: Filled[list[str]] = None  # type: ignore[assignment]  # see Filled
    sliding_window: int = defaults.SLIDING_WINDOW
    num_slots: int = defaults.NUM_SLOTS
    chunk_size: int = defaults.CHUNK_SIZE
    conv_size: int = defaults.CONV_SIZE
    growth: str | None = defaults.GROWTH
    init: str = defaults.INIT
    merge: str = defaults.MERGE
    ablation: dict[str, Any] | None = None
    value_weight: float | int = defaults.VALUE_WEIGHT
    merge_gate: bool = defaults.MERGE_GATE
    forget_gate: bool = defaults.FORGET_GATE
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the fields that depend on others, and check all fields."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.mixer_types is None:
            pattern = ("sliding_attention", "ovq")
            self.mixer_types = [pattern[i % 2] for i in range(self.num_hidden_layers)]
        if self.rope_mixers is None:
            self.rope_mixers = ["sliding_attention"]
        self.merge = current_merge(self.merge)
        if self.growth is None:
            self.growth = default_growth(self.merge)
        kwargs = with_new_names(kwargs)
        earlier_names = {name: kwargs.pop(name) for name in NAMES if name in kwargs}
        ablation = with_earlier_names(self.ablation, earlier_names, OVQConfig)
        self.ablation = ablation.changes
        for name in _fields_of(self.mixer_types):
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
        # A field that was set to its default looks like one that was not.
        is_given = self.rope_theta != defaults.ROPE_THETA
        self.rope_theta = _pop_rope_theta(kwargs, self.rope_theta, is_given=is_given)
        _pop_unused_fields(kwargs, self.mixer_types)
        self.check_fields()
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; setting `mixer_types` adds the fields of the new mixers and removes those of the old.

        Setting `rope_parameters`, as transformers calls it, sets `rope_theta`.

        Raises:
            ValueError: an unknown mixer, or a value that a field of a mixer cannot have.
        """
        if name == "rope_parameters":
            name, value = "rope_theta", _pop_rope_theta({name: value}, self.rope_theta, is_given=False)
        fields = _fields_of(self.__dict__.get("mixer_types"))
        if name in fields:
            fields[name].check(name, value)
        new = _fields_of(value) if name == "mixer_types" else fields
        super().__setattr__(name, value)
        for removed in fields.keys() - new.keys():
            self.__dict__.pop(removed, None)
        for added in new.keys() - fields.keys():
            self.__dict__[added] = copy.copy(new[added].default)

    @classmethod
    def recommended(cls, **fields: Any) -> "OVQConfig":
        """The config for training a new model: the OVQ layer that recalls most, of all that were measured.

        It trains with the paper's merge rule and a merge gate, which learns the weight of each token in
        merges. After training, `OVQForCausalLM.ask_as_recommended` switches to the rule that recalls most
        (docs/use/training.md).

        Args:
            fields: all other fields, such as sizes. `forget_gate=True` lowers the loss of a language model,
                `output_gate=True` further; each costs recall beyond the training length.

        Raises:
            ValueError: as for `OVQConfig`, or if a recommended field is given another value.

        Example:
            >>> config = OVQConfig.recommended(num_hidden_layers=2, hidden_size=64, num_attention_heads=2)
            >>> config.merge, config.merge_gate, config.mixer_types
            ('existing', True, ['sliding_attention', 'ovq'])
        """
        for name, value in TO_TRAIN.items():
            if fields.get(name, value) != value:
                expected = f"{value!r}, as is recommended, or OVQConfig(...)"
                raise ValueError(f"{name}: expected {expected}, found {fields[name]!r}")
        # The merge gate improves recall in two tasks, on three seeds each, and changes nothing on text
        # (docs/results/rivals.md); on the forget gate, see docs/results/forgetting.md.
        return cls(**{"merge_gate": True} | fields | TO_TRAIN)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config from a dictionary, as `from_pretrained` reads it from a file; see `upgraded`.

        With `merge` alone among `kwargs`, `growth` becomes the default of that rule, as in `set_merge`.

        Raises:
            ValueError: the config of another model type, or a field of a wrong type.

        Example:
            >>> OVQConfig.from_dict({"model_type": "llama"})
            Traceback (most recent call last):
            ValueError: expected the config of a model of type 'ovq', found 'llama'
        """
        if (found := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"expected the config of a model of type {cls.model_type!r}, found {found!r}")
        if "auto_map" in config_dict:
            # Ours as they are saved, without the repository that transformers puts before them.
            config_dict = config_dict | {"auto_map": AUTO_MAP | without_own_entries(config_dict["auto_map"])}
        # The mixers first, because they determine the fields.
        kwargs = dict(sorted(kwargs.items(), key=lambda item: item[0] != "mixer_types"))
        if "merge" in kwargs and kwargs.get("growth") is None:
            kwargs["growth"] = default_growth(kwargs["merge"])
        try:
            return super().from_dict(cls.upgraded(config_dict, **kwargs), **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"expected fields of the types of OVQConfig, found others: {error}") from error

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save the config as transformers does, with the module that its `auto_map` names.

        The Auto classes can then load the config, and a model beside it, with `trust_remote_code=True` in a
        process that has not imported `ovq.hf`; see `ovq.hf.auto_map`.
        """
        if not os.path.isfile(save_directory):
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / MODULE_FILE, MODULE)
        # A copy, as the config in memory stays unchanged.
        saved = copy.copy(self)
        saved.auto_map = AUTO_MAP | (getattr(self, "auto_map", None) or {})
        super(OVQConfig, saved).save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing for this class, since every saved config names it; see `ovq.hf.auto_map`.

        The file of a derived class is copied beside a saved config, as in transformers.
        """
        if cls is not OVQConfig:
            super().register_for_auto_class(auto_class)

    @classmethod
    def field_defaults(cls, mixer_types: Iterable[str] | None = None) -> dict[str, Any]:
        """Defaults of all fields of a config with these mixers, except those of transformers.

        Example:
            >>> sorted(OVQConfig.field_defaults(["mamba2"]).keys() - OVQConfig.field_defaults().keys())
            ['mamba_head_dim', 'mamba_state_size']
        """
        fields = {field.name: field.default for field in dataclasses.fields(OVQConfig)}
        of_mixers = {name: field.default for name, field in _fields_of(mixer_types).items()}
        return {name: fields[name] for name in fields if name in OVQConfig.__annotations__} | of_mixers

    @classmethod
    def upgraded(cls, fields: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
        """The fields of a config saved by an earlier version, as this version would save them.

        Renamed fields get their current names, removed fields are left out, those of `Ablation` are
        collected, and a merge rule that only the reference has is replaced (`current_merge`). Until version
        0.2 configs had the fields of all mixers; those of mixers that the model does not have are left out,
        as no layer uses them. Before mixer sizes were fields, they followed from other fields such that a
        layer had as many parameters, or a state of as many bytes, as an `"ovq"` layer. Missing sizes are
        filled in by that rule (`equal_sizes`).

        Args:
            fields: the saved fields.
            changes: fields that will be set to other values.

        Raises:
            ValueError: a field under both of its names, a removed field that is not off, or invalid values.

        Example:
            >>> OVQConfig.upgraded({"hidden_size": 64, "slot_rate": 0.1})["ablation"]
            {'rate': 0.1}
        """
        fields = with_ablation(with_new_names(fields))
        if "rope_theta" in fields:
            _pop_rope_theta(dict(fields), fields["rope_theta"], is_given=True)
        if "merge" in fields:
            fields["merge"] = current_merge(fields["merge"])
        mixer_types = fields.get("mixer_types")
        if not (isinstance(mixer_types, list) and all(isinstance(name, str) for name in mixer_types)):
            # A value of another type is refused, with its name, when the config is made.
            mixer_types = []
        own = _fields_of(mixer_types)
        fields = {name: value for name, value in fields.items() if name in own or name not in SAVED_WITH_ALL}
        # An unset size was saved as None, or not at all.
        is_open = {
            name
            for name, field in own.items()
            if name not in fields or (fields[name] is None and not field.accepts(None))
        }
        if not is_open:
            return fields
        given = {name: value for name, value in fields.items() if name not in is_open}
        known = cls.field_defaults(mixer_types)
        changes = {name: value for name, value in changes.items() if name in known}
        config = cls(**given | changes)
        if "delta_head_dim" in is_open:
            # Keys of Gated DeltaNet were as wide as those of the other mixers.
            config.delta_head_dim = config.head_dim
        sizes = equal_sizes(config)
        return fields | {name: size for name, size in sizes.items() if name in is_open}

    def check_fields(self) -> None:
        """Raise ValueError unless the fields fit together, also after some were set."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for name in (*sizes, "sliding_window", "num_slots", "chunk_size"):
            bound = 2 if name == "sliding_window" else 1
            if (found := getattr(self, name)) is not None and found < bound:
                raise ValueError(f"{name}: expected at least {bound}, found {found}")
        for name in ("rms_norm_eps", "rope_theta"):
            if not (is_finite(found := getattr(self, name)) and found > 0):
                raise ValueError(f"{name}: expected a finite number above 0, found {found}")
        if not (is_finite(self.initializer_range) and self.initializer_range >= 0):
            raise ValueError(
                f"initializer_range: expected a finite number of at least 0, found {self.initializer_range}"
            )
        if len(self.mixer_types) != self.num_hidden_layers:
            raise ValueError(
                f"mixer_types: expected one name per layer, num_hidden_layers={self.num_hidden_layers}, "
                f"found {len(self.mixer_types)}"
            )
        try:
            fixed = sorted(name for name in self.rope_mixers if not mixer_class(name).supports_rope)
        except ValueError as error:
            raise ValueError(f"rope_mixers: {error}") from error
        if fixed:
            raise ValueError(f"rope_mixers: expected mixers that have rotary embedding, found {fixed}")
        self.head_dim = checked_head_dim(
            self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        )
        check_conv_size(self.conv_size)
        check_logn_length(self.logn_length)
        if any(name in self.rope_mixers for name in self.mixer_types):
            check_rotary(self.head_dim)
        for name in dict.fromkeys(self.mixer_types):
            mixer_class(name).check_config(self)
        options: dict[str, Any] = {name: getattr(self, name) for name in LEARNING_OPTIONS}
        options["ablation"] = ablation = Ablation.of(self.ablation)
        # Refuse what the op would refuse.
        Options(num_slots=self.num_slots, chunk_size=self.chunk_size, seed=0, **options)
        for name in ("merge_gate", "forget_gate"):
            if getattr(self, name) and ablation.rate != "count":
                raise ValueError(f"{name}: expected False with a constant rate, found True")


def _fields_of(mixer_types: Iterable[str] | None) -> dict[str, ConfigField]:
    """The config fields of these mixers, by name; ValueError for unknown mixers or names that are taken."""
    try:
        fields = fields_of_mixers(mixer_types or ())
    except ValueError as error:
        raise ValueError(f"mixer_types: {error}") from error
    if taken := sorted(name for name in fields if hasattr(OVQConfig, name)):
        raise ValueError(
            f"mixer_types: expected fields of mixers with names that are free, found {taken[0]!r}, "
            "which every config has"
        )
    return fields


def _pop_rope_theta(fields: dict[str, Any], own: Any, *, is_given: bool) -> Any:
    """Remove the fields in which transformers keeps the base of the rotary frequencies; returns the base.

    Args:
        own: the base without such a field. If it `is_given`, they must not name another one.

    Raises:
        ValueError: another base, or other rotary frequencies than `rope_theta` alone gives.
    """
    plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    for name in ("rope_parameters", "rope_scaling"):
        if (found := fields.pop(name, None)) is None:
            continue
        theta = found.get("rope_theta", own) if isinstance(found, Mapping) else own
        if not isinstance(found, Mapping) or not found.items() <= (plain | {"rope_theta": theta}).items():
            raise ValueError(f"{name}: expected rope_type 'default' and rope_theta alone, found {found!r}")
        if is_given and theta != own:
            raise ValueError(f"{name}: expected rope_theta {own}, as beside it, found {theta}")
        own = theta
    return own


def _pop_unused_fields(kwargs: dict[str, Any], mixer_types: list[str]) -> None:
    """Remove fields of mixers that the config does not have from the unknown keyword arguments.

    Other unknown arguments are kept, because a config saved by another version of transformers may have
    fields that the installed version does not know.

    Raises:
        ValueError: a field of such a mixer with another value than its default, a name that resembles a
            field (transformers silently stores unknown names), or something that the model cannot do.
    """
    fixed = _FIXED | {"layer_types": mixer_types}
    for name, value in kwargs.items():
        if name in fixed and value not in (None, fixed[name]):
            raise ValueError(f"{name}: expected {fixed[name]!r}, as the model has, found {value!r}")
    # Every saved config has an `auto_map`, and some versions of transformers pass a `_commit_hash`.
    known = {*fixed, "auto_map", "_commit_hash"}
    unknown = [name for name in kwargs if not (name in known or hasattr(OVQConfig, name))]
    # Finding all mixers imports the laboratory, so only do it for unknown names.
    mixers = usable_names(MIXERS, what="mixer") if unknown else []
    fields = {name: (f, mixer) for mixer in mixers for name, f in mixer_class(mixer).own_fields().items()}
    for name in unknown:
        if name in fields:
            field, mixer = fields[name]
            if kwargs.pop(name) != field.default:
                raise ValueError(
                    f"{name}: expected {mixer!r} among mixer_types beside this field ({field.doc}), "
                    f"found {sorted(set(mixer_types))}"
                )
        elif close := difflib.get_close_matches(name, {*OVQConfig.__annotations__, *fields}, 1, 0.85):
            raise ValueError(f"expected a field of OVQConfig such as {close[0]!r}, found {name!r}")
