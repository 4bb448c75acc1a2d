"""Tables of `docs/use/scaling.md`: bytes sent and idle time of context parallelism, beside ring attention.

`python benchmarks/context_parallel_cost.py`; all numbers are computed from the config, none is measured.
"""

from __future__ import annotations

import math

import torch
import typer

from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.layers.memory import num_bytes
from ovq.parallel import even_bounds
from ovq.parallel.transfer import floating

NUM_TOKENS = 2**20
MIB, GIB = 2**20, 2**30


def model(num_slots: int) -> OVQConfig:
    """Config with 480 M parameters: 22 layers of width 1280, alternating sliding windows of 256 and OVQ."""
    return OVQConfig(
        vocab_size=32768,
        hidden_size=1280,
        intermediate_size=3456,
        num_hidden_layers=22,
        num_attention_heads=20,
        sliding_window=256,
        num_slots=num_slots,
        chunk_size=128,
        conv_size=4,
        tie_word_embeddings=True,
    )


def bytes_sent(config: OVQConfig, *, num_tokens: int, num_ranks: int) -> tuple[int, int, int, int]:
    """Bytes that a rank sends for one document in bfloat16: all states, and their gradients; and the keys and
    values of ring attention in place of the layers without a window, in the forward and in the backward.

    With ring attention each rank passes on its own keys and values and those that it receives, R - 1 times
    per layer; in the backward again, with their gradients.
    """
    # States never shrink, so the second-to-last rank sends the most.
    end = even_bounds(num_tokens, num_ranks, multiple=config.chunk_size)[-2]
    with torch.device("meta"):
        mixers = OVQForCausalLM(config).mixers()
    specs = [mixer.state_spec(end, torch.bfloat16) for mixer in mixers]
    num_long = sum(name != "sliding_attention" for name in config.mixer_types)
    per_token = 2 * config.num_key_value_heads * config.head_dim * torch.bfloat16.itemsize
    ring = num_long * (num_ranks - 1) * math.ceil(num_tokens / num_ranks) * per_token
    return sum(map(num_bytes, specs)), sum(num_bytes(floating(spec)) for spec in specs), ring, 2 * ring


def bubble(*, num_ranks: int, num_micro_batches: int, num_layers: int) -> float:
    """Share of a step's time in which a rank waits with `steps_of_rank`: (R - 1) / (M L + R - 1)."""
    return (num_ranks - 1) / (num_micro_batches * num_layers + num_ranks - 1)


def bytes_table() -> str:
    """Markdown table of what each rank sends for one document."""
    lines = [
        "| ranks | slots | state sent, MiB | gradient back, MiB | ring attention: forward, GiB "
        "| backward, GiB | ratio |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for num_ranks, num_slots in ((2, 1024), (8, 1024), (8, 4096), (64, 1024)):
        sent = bytes_sent(model(num_slots), num_tokens=NUM_TOKENS, num_ranks=num_ranks)
        state, gradient, forward, backward = sent
        lines.append(
            f"| {num_ranks} | {num_slots} | {state / MIB:.0f} | {gradient / MIB:.0f} | {forward / GIB:.1f} | "
            f"{backward / GIB:.1f} | {(forward + backward) / (state + gradient):.0f} |"
        )
    return "\n".join(lines)


def bubble_table() -> str:
    """Markdown table of the share of a step in which a rank is idle."""
    lines = ["| ranks | 1 document | 2 | 4 | 16 |", "| ---: | ---: | ---: | ---: | ---: |"]
    for num_ranks in (2, 8, 64):
        shares = [bubble(num_ranks=num_ranks, num_micro_batches=m, num_layers=22) for m in (1, 2, 4, 16)]
        lines.append(f"| {num_ranks} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables."""
    print(bytes_table(), bubble_table(), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
