"""The configuration of a training run: frozen dataclasses, validated on construction, stored as JSON.

Fields are named by their path, on the command line (`--set train.steps=300`) and in errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ovq.fields import LARGEST_SEED, ConfigField, check_at_least, check_fields, did_you_mean, with_new_names
from ovq.layers import defaults
from ovq.layers.registry import mixer_class
from ovq.layers.sinks import NUM_SINKS
from ovq.ops.ablation import UNCHANGED
from ovq.ops.options import current_merge, default_growth
from ovq.runtime.files import write_atomic
from ovq_lab.mixers import MIXERS, kvm, mesanet, raven, vq
from ovq_lab.mixers.kvm_state import KVM_GROWTH
from ovq_lab.tasks import Task, TextTask, task_class
from ovq_lab.train.values import parse_value, type_of_field

CONFIG_FILE = "run_config.json"

SECTIONS = ("task", "model", "train")

SMALL_MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "conv_size": 3,
    "sliding_window": 32,
    "num_slots": 64,
    "chunk_size": 64,
    "initializer_range": 0.1,
}
"""Defaults of a run that differ from those of `OVQConfig`: a small model, which learns a task in minutes on
two cores. Because it is narrow, its initial weights are larger, so that products are as large as in a wide
model."""


def _declared(mixer_types: Iterable[str]) -> dict[str, ConfigField]:
    """Fields declared by these mixers and by all others that are loaded or registered."""
    for name in mixer_types:
        # Unknown names are refused when the model is built.
        with contextlib.suppress(ValueError):
            mixer_class(name)
    return {name: field for mixer in MIXERS.values() for name, field in mixer.own_fields().items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The model to train; the fields are those of `OVQConfig` that a run may want to change.

    Those of the dictionary from `growth` to `value_weight` are options of `ovq.ops.ovq_attention`.

    Attributes:
        mixer_types: The mixer of each layer, first layer first; there are as many layers as names.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU.
        num_attention_heads: Query heads per layer.
        num_key_value_heads: Key/value heads per layer; `None` for as many as query heads.
        head_dim: Components per head; `None` for `hidden_size / num_attention_heads`.
        conv_size: Tokens that the short convolution on queries, keys and values sees; 0 for none.
        sliding_window: Tokens that a sliding-window layer sees.
        num_sinks: First tokens that stay visible to a layer with attention sinks.
        sink_window: Tokens that such a layer sees besides; `None` for the bytes of an OVQ layer.
        mamba_state_size: Numbers of state per channel of Mamba2; `None` for as many parameters as OVQ has.
        mixer_fields: Other fields that mixers declare, as `NAME=VALUE`; `--set model.NAME=VALUE` adds one.
        num_slots: Slots of the dictionary of an OVQ layer, N.
        chunk_size: Tokens per chunk of an OVQ layer, C.
        kvm_chunk_size: Tokens per chunk of KVM; `None` for half of `chunk_size`, so that its window of two
            chunks has as many tokens as a chunk of OVQ.
        kvm_growth: Growth schedule of KVM's slots, see `ovq_lab.mixers.KVMAttention`.
        kvm_norm_leak: Whether KVM's slots are as in its published code, see `ovq_lab.mixers.KVMAttention`.
        raven_slots: Slots per head of Raven; `None` for as many as components per head.
        raven_top_k: Slots that Raven writes a token to; `None` for one in eight.
        raven_noise: Whether the router of Raven adds Gumbel noise in training.
        mesa_steps: Steps of MesaNet's conjugate-gradient solver.
        vq_decay: Decay of the moving averages that are the slots of VQ-attention.
        commitment_weight: Factor of the commitment loss of VQ-attention.
        merge_gate: Whether an OVQ layer learns the weight of each token in the dictionary.
        forget_gate: Whether an OVQ layer learns how fast earlier tokens are forgotten.
        initializer_range: Standard deviation of the initial weights of the linear layers.
        embedding_std: Standard deviation of the initial embedding. At 1, a step of AdamW hardly turns an
            embedding. Tokens then stay as different as they were drawn, and the projections learn once, for
            all tokens, how to match them.
        tie_word_embeddings: Use the embedding as the output layer too, so that a model that has to repeat a
            token need not learn this separately for each of many tokens.

    Raises:
        ValueError: If a field is not of its type, or a number is not finite or out of range. `OVQConfig`
            checks the names of mixers and options, and whether the sizes of mixers fit each other.
    """

    mixer_types: tuple[str, ...] = ("sliding_attention", "ovq")
    hidden_size: int = SMALL_MODEL["hidden_size"]
    intermediate_size: int = SMALL_MODEL["intermediate_size"]
    num_attention_heads: int = SMALL_MODEL["num_attention_heads"]
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    conv_size: int = SMALL_MODEL["conv_size"]
    sliding_window: int = SMALL_MODEL["sliding_window"]
    num_sinks: int = NUM_SINKS
    sink_window: int | None = None
    mamba_state_size: int | None = None
    kvm_chunk_size: int | None = None
    kvm_growth: str = KVM_GROWTH
    kvm_norm_leak: bool = kvm.NORM_LEAK
    raven_slots: int | None = None
    raven_top_k: int | None = None
    raven_noise: bool = raven.NOISE
    mesa_steps: int = mesanet.STEPS
    vq_decay: float = vq.VQ_DECAY
    commitment_weight: float = vq.COMMITMENT_WEIGHT
    mixer_fields: tuple[str, ...] = ()
    num_slots: int = SMALL_MODEL["num_slots"]
    chunk_size: int = SMALL_MODEL["chunk_size"]
    growth: str | None = defaults.GROWTH
    init: str = defaults.INIT
    merge: str = defaults.MERGE
    bias: str = UNCHANGED.bias
    rate: float | str = UNCHANGED.rate
    value_weight: float = defaults.VALUE_WEIGHT
    merge_gate: bool = defaults.MERGE_GATE
    forget_gate: bool = defaults.FORGET_GATE
    initializer_range: float = SMALL_MODEL["initializer_range"]
    embedding_std: float = 1.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_fields(self, prefix="model.")
        object.__setattr__(self, "merge", current_merge(self.merge))
        if self.growth == default_growth(self.merge):
            # Giving the default explicitly is the same run; and when `merge` is overridden, growth follows.
            object.__setattr__(self, "growth", None)
        if not self.mixer_types:
            raise ValueError("model.mixer_types: expected at least one mixer, found none")
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        own = ("kvm_chunk_size", "raven_slots", "raven_top_k", "mesa_steps", "mamba_state_size")
        check_at_least(1, self, *sizes, "sliding_window", "num_sinks", "sink_window", prefix="model.")
        check_at_least(1, self, "num_slots", "chunk_size", *own, prefix="model.")
        factors = ("commitment_weight", "initializer_range", "embedding_std", "value_weight")
        check_at_least(0, self, "conv_size", *factors, prefix="model.")
        if not 0 <= self.vq_decay < 1:
            raise ValueError(f"model.vq_decay: expected a number in [0, 1), found {self.vq_decay}")
        if isinstance(self.rate, float) and not 0 < self.rate <= 1:
            raise ValueError(f"model.rate: expected 'count' or a number in (0, 1], found {self.rate}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size: expected a multiple of model.num_attention_heads "
                f"({self.num_attention_heads}), or model.head_dim, found {self.hidden_size}"
            )
        if wrong := [each for each in self.mixer_fields if not each.partition("=")[0].isidentifier()]:
            raise ValueError(f"model.mixer_fields: expected NAME=VALUE, found {wrong[0]!r}")

    @property
    def own_fields(self) -> dict[str, str]:
        """Values of `mixer_fields`, by name."""
        return {name: value for name, _, value in (each.partition("=") for each in self.mixer_fields)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Training settings.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples per optimizer step, over all processes and micro-batches.
        micro_batches: Micro-batches per step (gradient accumulation), which save memory.
        lengths: The length curriculum: example lengths in the order in which they are trained on.
        length_shares: The share of the steps for each length; positive, and they sum to 1.
        learning_rate: Peak learning rate of AdamW.
        learning_rate_decay: Its decay from the peak: `"cosine"`, or `"linear"`, to 0.
        min_learning_rate_share: Final learning rate of the cosine decay, as a share of the peak.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Decoupled weight decay, on matrices only.
        adam_beta2: Decay of AdamW's second moment.
        max_grad_norm: Norm to which gradients are clipped.
        precision: `"float32"`, or `"bfloat16"` for mixed precision.
        sharding: What several processes divide among them: `"none"`, only the batch, while each has the whole
            model; or `"fsdp"`, also weights, gradients and the state of the optimizer.
        use_gradient_checkpointing: Store only the activations between layers, and recompute the others in
            the backward pass.
        init_from: Folder, or name on the hub, of a model whose weights the run begins with; `None` for new
            weights.
        seed: Seed of the weights and of the data.
        log_every: Steps between two logged losses; a loss is logged with each checkpoint and at the end, too.
        eval_every: Steps between two evaluations of the loss on held-out text, the split `validation`; 0 for
            none. The last step is evaluated, too.
        save_every: Steps between two checkpoints; 0 for none but the final model.
        report_to: Where losses are logged besides `trainer_state.json`: `"auto"` for TensorBoard if it is
            installed, `"none"`, or installed integrations of transformers (`"wandb"`, `"trackio"`, ...),
            separated by commas.

    Raises:
        ValueError: If a field is not of its type, not finite or out of range; the message names the field and
            says what was expected and found.
    """

    steps: int = 800
    batch_size: int = 16
    micro_batches: int = 1
    lengths: tuple[int, ...] = (32, 64, 256)
    length_shares: tuple[float, ...] = (0.15, 0.15, 0.7)
    learning_rate: float = 4e-3
    learning_rate_decay: str = "cosine"
    min_learning_rate_share: float = 0.0
    warmup_steps: int = 20
    weight_decay: float = 0.0
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    precision: str = "float32"
    sharding: str = "none"
    use_gradient_checkpointing: bool = False
    init_from: str | None = None
    seed: int = 0
    log_every: int = 20
    eval_every: int = 0
    save_every: int = 0
    report_to: tuple[str, ...] = ("auto",)

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, prefix="train.")
        check_at_least(1, self, "steps", "batch_size", "micro_batches", "log_every", prefix="train.")
        not_negative = ("seed", "eval_every", "save_every", "warmup_steps", "weight_decay")
        check_at_least(0, self, *not_negative, prefix="train.")
        if self.seed > LARGEST_SEED:
            raise ValueError(f"train.seed: expected at most {LARGEST_SEED}, found {self.seed}")
        if not self.lengths:
            raise ValueError("train.lengths: expected at least one length, found none")
        if len(self.length_shares) != len(self.lengths):
            raise ValueError(
                f"train.length_shares: expected a share for each of the {len(self.lengths)} train.lengths, "
                f"found {len(self.length_shares)}"
            )
        if min(self.length_shares) <= 0 or abs(sum(self.length_shares) - 1) > 1e-6:
            raise ValueError(
                f"train.length_shares: expected positive numbers that sum to 1, found {self.length_shares}"
            )
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"train.batch_size: expected a multiple of train.micro_batches ({self.micro_batches}), "
                f"found {self.batch_size}"
            )
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name}: expected a positive number, found {getattr(self, name)}")
        for name in ("min_learning_rate_share", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name}: expected a number in [0, 1), found {getattr(self, name)}")
        for name, choices in (
            ("learning_rate_decay", ("cosine", "linear")),
            ("precision", ("float32", "bfloat16")),
            ("sharding", ("none", "fsdp")),
        ):
            if (found := getattr(self, name)) not in choices:
                raise ValueError(f"train.{name}: expected {' or '.join(choices)}, found {found!r}")
        if self.learning_rate_decay == "linear" and self.min_learning_rate_share:
            raise ValueError(
                "train.min_learning_rate_share: expected 0 with train.learning_rate_decay=linear, which ends "
                f"there, found {self.min_learning_rate_share}"
            )
        if not self.report_to or (len(self.report_to) > 1 and {"auto", "none"} & {*self.report_to}):
            raise ValueError(
                f"train.report_to: expected auto, none, or names of trackers, found {self.report_to}"
            )

    def length_at(self, step: int) -> int:
        """Example length at a step, counted from 0.

        Example:
            >>> args = TrainArgs(steps=10, lengths=(64, 128), length_shares=(0.3, 0.7))
            >>> [args.length_at(step) for step in (0, 2, 3, 9)]
            [64, 64, 128, 128]
        """
        done = 0.0
        for length, share in zip(self.lengths, self.length_shares, strict=True):
            done += share
            # `round`, so that rounding errors in the sum of the shares cannot shift a boundary.
            if step < round(done * self.steps):
                return length
        return self.lengths[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a training run depends on, except the code.

    Attributes:
        task: The data.
        model: The model.
        train: The training.

    Raises:
        ValueError: If the task cannot be built at one of the training lengths, or the sections contradict
            each other.

    Example:
        >>> from ovq_lab.tasks import RecallTask
        >>> config = RunConfig(task=RecallTask(), model=ModelArgs(), train=TrainArgs())
        >>> config.override(["train.lengths=32,64", "train.length_shares=0.5,0.5"]).train.lengths
        (32, 64)
        >>> RunConfig.from_json(config.to_json()) == config
        True
    """

    task: Task | TextTask
    model: ModelArgs
    train: TrainArgs

    def __post_init__(self) -> None:
        """Check that the task can be built at every length, and that the sections fit each other."""
        if self.train.sharding != "none" and "vq" in self.model.mixer_types:
            raise ValueError(
                "train.sharding: expected none with the mixer 'vq', whose dictionary each process learns for "
                f"itself, found {self.train.sharding!r}"
            )
        for length in self.train.lengths:
            try:
                self.task.at_length(length)
            except ValueError as error:
                raise ValueError(
                    f"train.lengths: expected lengths at which the task can be built, found {length}: {error}"
                ) from error
        if self.train.eval_every:
            self._check_held_out()
        if isinstance(self.task, TextTask) and self.task.carry_state:
            self._check_carry()

    def _check_held_out(self) -> None:
        """Check that some text is held out for evaluation."""
        if not isinstance(self.task, TextTask):
            raise ValueError(
                f"train.eval_every: expected 0 with the task {self.task.name}, whose examples never repeat "
                f"(the training loss is one on new examples), found {self.train.eval_every}"
            )
        if not self.task.held_out:
            raise ValueError(
                "train.eval_every: expected task.held_out above 0, found 0, which holds out no text"
            )

    def _check_carry(self) -> None:
        """Check that carried windows have one length and are read one at a time."""
        if len(self.train.lengths) > 1:
            raise ValueError(
                "task.carry_state: expected a single length in train.lengths, as documents are cut once, "
                f"found {self.train.lengths}"
            )
        if self.train.micro_batches > 1:
            raise ValueError(
                "task.carry_state: expected train.micro_batches=1, as each window is read by itself, "
                f"found {self.train.micro_batches}"
            )
        if self.train.use_gradient_checkpointing:
            raise ValueError(
                "task.carry_state: expected train.use_gradient_checkpointing=false, as "
                "recomputing a layer would update its state twice, found true"
            )

    @property
    def mixer(self) -> str:
        """The long-range mixer, which is that of the last layer."""
        return self.model.mixer_types[-1]

    def override(self, assignments: list[str], *, flag: str = "--set ") -> RunConfig:
        """A copy with some fields set from strings such as `"train.steps=300"`.

        Lists are written with commas (`train.lengths=64,128`), and a missing value as `none`. Error messages
        name `flag` before the field.

        Raises:
            ValueError: If a string is not an assignment, names no field, or its value is not of the field's
                type.
        """
        changes: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        own_texts = self.model.own_fields
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            section, _, name = path.strip().partition(".")
            if not equals or not name:
                raise ValueError(f"--set: expected SECTION.FIELD=VALUE, found {assignment!r}")
            if section not in changes:
                raise ValueError(
                    f"{flag}{path}: expected a section of {', '.join(changes)}, found {section!r}"
                    f"{did_you_mean(section, changes)}"
                )
            now = getattr(self, section)
            mixer_types = changes["model"].get("mixer_types", self.model.mixer_types)
            own = _declared(mixer_types) if section == "model" else {}
            kind = type_of_field(type(now), name, f"{flag}{path}", own)
            value = parse_value(text.strip(), kind, f"{flag}{path}")
            if hasattr(now, name):
                changes[section][name] = value
                if name == "mixer_fields":
                    own_texts = dict(each.partition("=")[::2] for each in value)
            else:
                own[name].check(f"{flag}{path}", value)
                own_texts[name] = text.strip()
                changes[section]["mixer_fields"] = tuple(map("=".join, own_texts.items()))
        changed = dataclasses.replace(
            self,
            **{
                section: dataclasses.replace(getattr(self, section), **fields)
                for section, fields in changes.items()
            },
        )
        lengths = changed.train.lengths
        if (length := changes["task"].get("length", lengths[0])) not in lengths:
            raise ValueError(
                f"{flag}task.length: expected one of train.lengths {lengths}, which examples have, "
                f"found {length}"
            )
        return changed

    def to_json(self) -> str:
        """The configuration as JSON, every field written out."""
        sections = {"task": {"name": self.task.name} | dataclasses.asdict(self.task)}
        sections |= {"model": dataclasses.asdict(self.model), "train": dataclasses.asdict(self.train)}
        # `from_json` refuses NaN and Inf.
        return json.dumps(sections, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: If the text is not JSON, or a section, a field or a value is missing or unknown.
        """
        try:
            sections = json.loads(text)
            task_fields = dict(sections["task"])
            task = task_class(task_fields.pop("name"))
            return cls(
                task=_from_dict(task, task_fields),
                model=_from_dict(ModelArgs, with_new_names(sections["model"])),
                train=_from_dict(TrainArgs, sections["train"]),
            )
        except (AttributeError, KeyError, RecursionError, TypeError) as error:
            raise ValueError(f"expected the configuration of a run, found something else: {error}") from error

    def save(self, folder: Path) -> None:
        """Write the configuration into the folder of the run, which is created if necessary."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / CONFIG_FILE, self.to_json() + "\n")

    @classmethod
    def load(cls, folder: Path) -> RunConfig:
        """Load the saved configuration from the folder of a run or of one of its checkpoints.

        Raises:
            ValueError: If there is none, or it cannot be read.
        """
        for place in (folder, folder.parent):
            path = place / CONFIG_FILE
            if path.is_file():
                try:
                    return cls.from_json(path.read_text(encoding="utf-8"))
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
        raise ValueError(f"{folder}: expected the folder of a training run, found no {CONFIG_FILE} in it")


def _from_dict(section: type, fields: dict[str, Any]) -> Any:
    """Build a section from JSON, in which tuples have become lists."""
    return section(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    )
