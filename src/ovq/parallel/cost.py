"""Communication and waiting time of context parallelism, compared with ring attention.

They are computed from the shapes of a model, which is not run and takes no memory. `docs/use/scaling.md` has
the formulae and the numbers for a million tokens; `benchmarks/context_parallel_cost.py` prints them.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ovq.hf.configuration_ovq import OVQConfig
from ovq.hf.modeling_ovq import OVQForCausalLM
from ovq.layers import Mixer
from ovq.layers.memory import num_bytes
from ovq.ops.parts import of_rows
from ovq.parallel.context import even_bounds
from ovq.parallel.transfer import floating


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one optimizer step with M micro-batches of one document each, split over R ranks.

    Attributes:
        num_parameters: Number of parameters of the model.
        state_bytes: Bytes that a rank sends to the next in the forward, for one document; largest of all
            ranks.
        gradient_bytes: Bytes of the gradients that are sent back.
        ring_bytes: Bytes that a rank sends in the forward if ring attention replaces the long-range layers.
        ring_gradient_bytes: Bytes that it then sends in the backward.
        bubble: Share of the step's time in which a rank waits, if all layers take equal time and messages
            none.
        bubble_by_model: The same if each rank started only after the previous one had finished all layers.
    """

    num_parameters: int
    state_bytes: int
    gradient_bytes: int
    ring_bytes: int
    ring_gradient_bytes: int
    bubble: float
    bubble_by_model: float


def handover_bytes(
    mixers: list[Mixer], *, num_tokens: int, num_rows: int = 1, dtype: torch.dtype = torch.bfloat16
) -> tuple[int, int]:
    """Bytes of the states of all layers after `num_tokens` tokens, and of their gradients."""
    specs = [of_rows(mixer.state_spec(num_tokens, dtype), num_rows) for mixer in mixers]
    return sum(map(num_bytes, specs)), sum(num_bytes(floating(spec)) for spec in specs)


def cost(
    config: OVQConfig,
    *,
    num_tokens: int,
    num_ranks: int,
    num_micro_batches: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Cost:
    """Communication and waiting cost of an optimizer step.

    With ring attention, each rank passes on its own keys and values and those that it receives, R - 1 times
    per layer; in the backward again, together with their gradients. Only the long-range layers are counted:
    a sliding window needs the same messages either way.

    Args:
        config: Config of the model.
        num_tokens: Tokens of a document, T.
        num_ranks: R, at least 2.
        num_micro_batches: M.
        dtype: Dtype of the activations; gradients of keys and values are sent in it too.

    Raises:
        ValueError: If there are fewer than two ranks, or the model cannot be split (see `ContextParallel`).

    Example:
        >>> config = OVQConfig(num_hidden_layers=24, hidden_size=128, num_attention_heads=2, num_slots=64)
        >>> found = cost(config, num_tokens=2**20, num_ranks=8)
        >>> found.ring_bytes > 100 * found.state_bytes, round(found.bubble, 3), found.bubble_by_model
        (True, 0.226, 0.875)
    """
    if num_ranks < 2:
        raise ValueError(f"num_ranks: expected at least 2, found {num_ranks}")
    bounds = even_bounds(num_tokens, num_ranks, multiple=config.chunk_size)
    with torch.device("meta"):
        model = OVQForCausalLM(config)
    # States never shrink, so the second-to-last rank sends the most.
    state_bytes, gradient_bytes = handover_bytes(model.mixers(), num_tokens=bounds[-2], dtype=dtype)
    num_long = sum(name != "sliding_attention" for name in config.mixer_types)
    per_token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    ring = num_long * (num_ranks - 1) * math.ceil(num_tokens / num_ranks) * per_token
    sizes = {"num_ranks": num_ranks, "num_micro_batches": num_micro_batches}
    return Cost(
        num_parameters=sum(p.numel() for p in model.parameters()),
        state_bytes=state_bytes,
        gradient_bytes=gradient_bytes,
        ring_bytes=ring,
        ring_gradient_bytes=2 * ring,
        bubble=bubble(**sizes, num_layers=config.num_hidden_layers),
        bubble_by_model=bubble(**sizes, num_layers=1),
    )


def bubble(*, num_ranks: int, num_micro_batches: int, num_layers: int) -> float:
    """Share of a step's time in which a rank waits with `steps_of_rank`: (R - 1) / (M L + R - 1).

    Example:
        >>> bubble(num_ranks=8, num_micro_batches=2, num_layers=3)  # 7 / (2 * 3 + 7)
        0.5384615384615384
    """
    return (num_ranks - 1) / (num_micro_batches * num_layers + num_ranks - 1)
