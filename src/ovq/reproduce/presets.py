"""The sizes that figures are made with: one set for two CPU cores, one for a GPU of 80 GB."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ovq.reproduce.plan import Evaluation
from ovq.tasks import RecallTask, Task
from ovq.train.config import ModelArgs, RunConfig, TrainArgs
from ovq.train.recipes import get_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of models, training and tests.

    Attributes:
        name: What the command line calls it.
        configs: The usual OVQ run of each task, by the name of the task. A figure puts another mixer in the
            place of OVQ, or changes a field.
        length_factors: Where to test, in lengths of the longest training example.
        far_lengths: Where to test beyond, in tokens.
        test_tokens: Tokens to test on, at each length; at least one example is.
        learning_rates: What each mixer is tried with where mixers are compared.
        slot_factors: Sizes of the dictionary to test, in sizes of the trained one.
        sizes: What makes the state of a mixer smaller or larger than usual, by its name: fields of the model
            and their values.
        chunk_sizes: Chunks to compare.
        rates: Constant rates of the slots to compare with 1/count.
        num_workers: Runs side by side; `None` for as many as there are cores to use.
        needs_gpu: Whether a CPU would take weeks.
    """

    name: str
    configs: Mapping[str, RunConfig]
    length_factors: tuple[int, ...]
    far_lengths: tuple[int, ...]
    test_tokens: int
    learning_rates: tuple[float, ...]
    slot_factors: tuple[int, ...]
    sizes: Mapping[str, tuple[Mapping[str, Any], ...]]
    chunk_sizes: tuple[int, ...]
    rates: tuple[float, ...]
    num_workers: int | None = None
    needs_gpu: bool = False

    def config(self, task: str, mixer: str = "ovq", **model_fields: Any) -> RunConfig:
        """The usual run of a task with another long-range mixer, and with fields of the model changed.

        Example:
            >>> CPU.config("recall", "full_attention").model.mixer_types
            ('sliding_attention', 'full_attention')
        """
        usual = self.configs[task]
        mixers = tuple(mixer if name == "ovq" else name for name in usual.model.mixer_types)
        return dataclasses.replace(
            usual, model=dataclasses.replace(usual.model, mixer_types=mixers, **model_fields)
        )

    def train_length(self, task: str) -> int:
        """The longest example that runs of a task train on, in tokens."""
        return max(self.configs[task].train.lengths)

    def lengths(self, task: str) -> list[int]:
        """The lengths that are tested as a matter of course."""
        return [self.train_length(task) * factor for factor in self.length_factors]

    def test(self, task: Task, *, num_slots: int | None = None) -> Evaluation:
        """A test on examples of a task, as many as `test_tokens` allow.

        Args:
            task: The task at the length to test at.
            num_slots: Slots while testing; `None` for as many as in training.
        """
        return Evaluation(
            task=task, num_examples=max(1, self.test_tokens // task.length), num_slots=num_slots
        )


_RECALL = get_recipe("recall-ovq")

CPU = Preset(
    name="cpu",
    configs={
        # More keys than the demonstration has: examples of 64k tokens hold 2,184 pairs.
        "recall": dataclasses.replace(
            _RECALL,
            task=dataclasses.replace(_RECALL.task, vocab_size=130),
            train=dataclasses.replace(_RECALL.train, save_every=100),
        ),
    },
    length_factors=(1, 2, 4, 8, 16),
    far_lengths=(16384, 65536),
    test_tokens=65536,
    learning_rates=(2e-3, 4e-3, 8e-3),
    slot_factors=(1, 4, 16, 64, 256),
    sizes={
        "ovq": ({"num_slots": 16}, {"num_slots": 256}),
        "sliding_attention": ({"sliding_window": 64}, {"sliding_window": 256}),
    },
    chunk_sizes=(16, 32, 64, 128),
    rates=(0.03, 0.1, 0.3),
)
"""Models of 2 layers, width 64, trained at up to 256 tokens: each figure takes about an hour on two cores."""


def _gpu_config(task: Task, *, num_layers: int, steps: int, lengths: tuple[int, ...]) -> RunConfig:
    """A run of width 512, in bfloat16, with batches of 128k tokens at the longest length."""
    return RunConfig(
        task=task,
        model=ModelArgs(
            mixer_types=("sliding_attention", "ovq") * (num_layers // 2),
            hidden_size=512,
            intermediate_size=1408,
            num_attention_heads=8,
            head_dim=64,
            conv_size=4,
            sliding_window=128,
            num_slots=1024,
            chunk_size=128,
            # As 0.1 at width 64: products of the same size.
            initializer_range=0.035,
        ),
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
            RecallTask(vocab_size=514, key_length=2, value_length=1, pair_share=0.2),
            num_layers=4,
            steps=6000,
            lengths=(256, 1024, 4096),
        ),
    },
    length_factors=(1, 2, 4, 8, 16),
    far_lengths=(),
    test_tokens=2**20,
    learning_rates=(5e-4, 1e-3, 2e-3),
    slot_factors=(1, 2, 4, 8, 16),
    sizes={
        "ovq": ({"num_slots": 256}, {"num_slots": 4096}),
        "sliding_attention": ({"sliding_window": 512}, {"sliding_window": 2048}),
    },
    chunk_sizes=(32, 64, 128, 256),
    rates=(0.01, 0.03, 0.1, 0.3),
    num_workers=1,
    needs_gpu=True,
)
"""Models of 4 layers, width 512, trained at up to 4,096 tokens and tested to 65,536, for one H100."""

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (CPU, GPU)}
"""Every preset by its name."""


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: If there is none; lists those there are.

    Example:
        >>> get_preset("cpu").train_length("recall")
        256
    """
    if name not in PRESETS:
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    return PRESETS[name]
