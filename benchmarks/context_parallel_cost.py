"""Tables of `docs/use/scaling.md`: bytes sent and idle time of context parallelism, beside ring attention.

`python benchmarks/context_parallel_cost.py`; all numbers are computed from the config, none is measured.
"""

from __future__ import annotations

import typer

from ovq.hf import OVQConfig
from ovq.parallel.cost import bubble, cost

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


def bytes_table() -> str:
    """Markdown table of what each rank sends for one document."""
    lines = [
        "| ranks | slots | state sent, MiB | gradient back, MiB | ring attention: forward, GiB "
        "| backward, GiB | ratio |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for num_ranks, num_slots in ((2, 1024), (8, 1024), (8, 4096), (64, 1024)):
        found = cost(model(num_slots), num_tokens=NUM_TOKENS, num_ranks=num_ranks)
        ours = found.state_bytes + found.gradient_bytes
        ring = found.ring_bytes + found.ring_gradient_bytes
        lines.append(
            f"| {num_ranks} | {num_slots} | {found.state_bytes / MIB:.0f} | "
            f"{found.gradient_bytes / MIB:.0f} | {found.ring_bytes / GIB:.1f} | "
            f"{found.ring_gradient_bytes / GIB:.1f} | {ring / ours:.0f} |"
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
