"""Recipes: named training runs; `--set` on the command line changes any of their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from ovq.fields import did_you_mean
from ovq_lab.mixers.names import KNOWN
from ovq_lab.tasks import MQARTask, PositionalRecallTask, RecallTask, RegressionTask, TextTask
from ovq_lab.train.config import ModelArgs, RunConfig, TrainArgs


def _recall(long_range_mixer: str) -> RunConfig:
    """In-context recall: one layer finds the value, at any distance."""
    return RunConfig(
        task=RecallTask(vocab_size=66, key_length=2, value_length=1, pair_share=0.2),
        # The window is far shorter than the examples, so nearly all questions need the other layer. Heads as
        # wide as the model keep the keys of many pairs apart, which matters beyond the training lengths.
        model=ModelArgs(mixer_types=("sliding_attention", long_range_mixer), head_dim=64, sliding_window=16),
        train=TrainArgs(),
    )


def _positional(long_range_mixer: str) -> RunConfig:
    """Positional recall: one long-range layer numbers the occurrences of a key, a second finds the value."""
    return RunConfig(
        # Enough keys for examples of 64k tokens, which hold 1,092 keys.
        task=PositionalRecallTask(vocab_size=130, key_length=2, pair_share=0.2),
        model=ModelArgs(
            mixer_types=("sliding_attention", long_range_mixer) * 2, head_dim=64, sliding_window=16
        ),
        # The longest examples hold 4 keys; at half the length, the learned numbering extrapolates less far.
        train=TrainArgs(steps=1200, lengths=(64, 128, 256), length_shares=(0.3, 0.2, 0.5)),
    )


def _regression(long_range_mixer: str) -> RunConfig:
    """Linear regression: the long-range layer gathers the points of a function and infers the function."""
    return RunConfig(
        task=RegressionTask(vocab_size=1 + 7 + 21 + 128),
        model=ModelArgs(
            mixer_types=("sliding_attention", long_range_mixer),
            intermediate_size=256,
            head_dim=64,
            sliding_window=16,
        ),
        train=TrainArgs(steps=2000, lengths=(48, 96, 192), length_shares=(0.4, 0.2, 0.4)),
    )


def _mqar(long_range_mixer: str) -> RunConfig:
    """Zoology's multi-query associative recall, with chunks too short for OVQ to read it all exactly."""
    return RunConfig(
        task=MQARTask(),
        model=ModelArgs(
            mixer_types=("sliding_attention", long_range_mixer),
            head_dim=64,
            # With a window of 16, the other layer would learn nothing from the shortest examples.
            sliding_window=4,
            chunk_size=16,
            # As in Zoology. Otherwise each of the 4,096 values has to be learned separately.
            tie_word_embeddings=True,
        ),
        train=TrainArgs(
            steps=800,
            batch_size=32,
            lengths=(16, 32, 64, 128),
            length_shares=(0.3, 0.15, 0.25, 0.3),
            learning_rate=8e-3,
            weight_decay=0.5,
        ),
    )


def _lm(long_range_mixer: str) -> RunConfig:
    """Language modelling on a CPU: a byte-level model of 2 million parameters."""
    return RunConfig(
        task=TextTask(),
        model=ModelArgs(
            mixer_types=("sliding_attention", long_range_mixer) * 2,
            hidden_size=192,
            intermediate_size=512,
            num_attention_heads=3,
            conv_size=4,
            # Short, so that the other layers have to remember more than the last sentence.
            sliding_window=128,
            num_slots=512,
            chunk_size=128,
            initializer_range=0.05,
            embedding_std=0.05,
        ),
        train=TrainArgs(
            steps=1000,
            batch_size=4,
            lengths=(2048,),
            length_shares=(1.0,),
            learning_rate=3e-3,
            min_learning_rate_share=0.1,
            warmup_steps=50,
            weight_decay=0.1,
        ),
    )


def _lm_for_gpus(
    width: int,
    inner: int,
    num_pairs: int,
    micro_batches: int,
    steps: int,
    learning_rate: float,
    long_range_mixer: str,
    *,
    batch_size: int = 64,
    vocab_size: int = 32768,
    length: int = 4096,
    head_dim: int = 64,
    num_slots: int = 2048,
    chunk_size: int = 128,
    kvm_chunk_size: int | None = None,
    **train: Any,
) -> RunConfig:
    """Language modelling on books, for GPUs: windows of subword tokens.

    The model has `num_pairs` pairs of a sliding-window layer and a long-range layer, of hidden size `width`
    and SwiGLU size `inner`. `vocab_size` is the size of the BPE tokenizer, `length` the tokens per window;
    the other arguments are fields of `ModelArgs` and `TrainArgs`.
    """
    return RunConfig(
        task=TextTask(dataset="deepmind/pg19", tokenizer=f"bpe:{vocab_size}"),
        model=ModelArgs(
            mixer_types=("sliding_attention", long_range_mixer) * num_pairs,
            hidden_size=width,
            intermediate_size=inner,
            num_attention_heads=width // head_dim,
            conv_size=4,
            sliding_window=256,
            num_slots=num_slots,
            chunk_size=chunk_size,
            kvm_chunk_size=kvm_chunk_size,
            initializer_range=0.02,
            embedding_std=0.02,
            tie_word_embeddings=True,
        ),
        train=TrainArgs(
            steps=steps,
            batch_size=batch_size,
            micro_batches=micro_batches,
            lengths=(length,),
            length_shares=(1.0,),
            learning_rate=learning_rate,
            adam_beta2=0.95,
            precision="bfloat16",
            save_every=500,
            **{"min_learning_rate_share": 0.1, "warmup_steps": 500, "weight_decay": 0.1, **train},
        ),
    )


_KVM: dict[str, Any] = {
    "vocab_size": 50304,
    "length": 8192,
    "head_dim": 128,
    "num_slots": 1024,
    "chunk_size": 256,
    "kvm_chunk_size": 256,
    "learning_rate_decay": "linear",
    "min_learning_rate_share": 0.0,
    "warmup_steps": 200,
}
"""Settings shared by the sizes of KVM's comparison with OVQ (arXiv 2605.09877). Training is as its authors':
0.5 million tokens per step, 3.1 and 7.9 billion in all.

From their published configs `ovq_swa_ts_c256_s1024_wd.yaml` and `kvm_swa_saturate1024_wd.yaml`: sizes,
learning rates, decay, warm-up, windows and chunks of 256, up to 1,024 slots, sliding windows between the
layers of OVQ and of KVM. Different here: books and a tokenizer learned from them in place of ProLong-64k and
GPT-2's, a SwiGLU with as many weights as their MLP of four times the width, and the backbone, which has a
short convolution in place of their token shift."""

_SIZES: dict[str, tuple[Any, ...]] = {
    # Width, SwiGLU size, pairs of layers, micro-batches, steps, learning rate, and what else differs.
    "70m": (512, 1408, 8, 4, 10_000, 1e-3, {}),
    "150m": (768, 2048, 9, 8, 15_000, 8e-4, {}),
    "480m": (1280, 3456, 11, 16, 20_000, 5e-4, {"batch_size": 128}),
    "120m": (768, 2048, 6, 8, 6_000, 2e-3, {**_KVM, "weight_decay": 0.2}),
    "350m": (1024, 2736, 12, 16, 15_000, 1.26e-3, {**_KVM, "weight_decay": 0.126}),
}
"""Language models by millions of parameters: three sizes of the paper, two of KVM's authors."""


_BUILDERS: dict[str, Callable[[str], RunConfig]] = {
    RecallTask.name: _recall,
    PositionalRecallTask.name: _positional,
    RegressionTask.name: _regression,
    MQARTask.name: _mqar,
    TextTask.name: _lm,
    **{
        f"{TextTask.name}-{name}": partial(_lm_for_gpus, *sizes, **others)
        for name, (*sizes, others) in _SIZES.items()
    },
}

_MIXERS = {known.short: mixer for mixer, known in KNOWN.items()}
"""Long-range mixers by their short names in the names of recipes."""


def recipe_for(task: str, long_range_mixer: str) -> RunConfig:
    """The recipe of a task with the given long-range mixer; nothing else differs between mixers.

    Example:
        >>> recipe_for("recall", "sliding_attention").model.mixer_types
        ('sliding_attention', 'sliding_attention')
    """
    if task not in _BUILDERS:
        raise ValueError(
            f"task: expected one of {', '.join(_BUILDERS)}, found {task!r}{did_you_mean(task, _BUILDERS)}"
        )
    return _BUILDERS[task](long_range_mixer)


def beside(mixer: str, config: RunConfig) -> RunConfig:
    """The same run with another short-range mixer in place of its sliding windows.

    Example:
        >>> beside("mamba2", recipe_for("lm", "ovq")).model.mixer_types
        ('mamba2', 'ovq', 'mamba2', 'ovq')
    """
    mixers = tuple(mixer if name == "sliding_attention" else name for name in config.model.mixer_types)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mixer_types=mixers))


RECIPES: dict[str, RunConfig] = {
    f"{task}-{short}": recipe_for(task, mixer) for task in _BUILDERS for short, mixer in _MIXERS.items()
} | {
    f"{task}-ovq-mamba2": beside("mamba2", recipe_for(task, "ovq"))
    for task in _BUILDERS
    if task.startswith(TextTask.name)
}


def get_recipe(name: str) -> RunConfig:
    """The recipe of this name.

    Raises:
        ValueError: If there is none; lists the parts of valid names.

    Example:
        >>> get_recipe("recall-ovq").model.mixer_types
        ('sliding_attention', 'ovq')
    """
    if name not in RECIPES:
        # All combinations would be too long a list.
        meant = f"{name}-ovq" if name in _BUILDERS else name
        raise ValueError(
            f"recipe: expected a task ({', '.join(_BUILDERS)}) and a mixer ({', '.join(_MIXERS)}; lm also "
            f"ovq-mamba2) with - between them, found {name!r}{did_you_mean(meant, RECIPES)}"
        )
    return RECIPES[name]
