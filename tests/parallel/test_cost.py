"""What is computed about the cost, against formulae and against the documentation."""

import runpy
from pathlib import Path

import pytest

from ovq.hf import OVQConfig

ROOT = Path(__file__).parent.parent.parent
PROGRAM = runpy.run_path(str(ROOT / "benchmarks" / "context_parallel_cost.py"))


def test_bytes_and_bubbles_are_those_of_the_formulae():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8}
    config = OVQConfig(
        num_hidden_layers=6, num_slots=16, chunk_size=8, sliding_window=5, conv_size=3, **sizes
    )
    state, sent_back, forward, backward = PROGRAM["bytes_sent"](config, num_tokens=4096, num_ranks=4)
    # Of bfloat16 activations: 3 layers of 2 heads of 16 with a window, 3 with a dictionary, all with a
    # convolution over 128 channels that looks back 2 tokens.
    window, convolution = 2 * 4 * (16 + 16) * 2, 128 * 2 * 2
    # After 3072 tokens 15 of 16 slots are open.
    sums, counts, pending = 2 * 15 * (16 + 16) * 4, 2 * 15 * 8, 2 * 8 * (16 + 16) * 2
    gradient = 3 * (window + convolution) + 3 * (sums + pending + convolution)
    assert (state, sent_back) == (gradient + 3 * (counts + 8), gradient)
    # Keys and values of 1024 tokens, 3 times, in 3 layers.
    assert (forward, backward) == (3 * 3 * 1024 * 2 * (16 + 16) * 2, 2 * forward)
    sizes = {"num_micro_batches": 2, "num_layers": 6}
    assert PROGRAM["bubble"](num_ranks=4, **sizes) == pytest.approx(3 / (2 * 6 + 3))
    assert PROGRAM["bubble"](num_ranks=1, **sizes) == 0


def test_the_tables_of_the_documentation_are_those_of_the_program():
    text = (ROOT / "docs" / "use" / "scaling.md").read_text()
    assert PROGRAM["bytes_table"]() in text
    assert PROGRAM["bubble_table"]() in text
