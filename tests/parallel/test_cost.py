"""What is computed about the cost, against formulae and against the documentation."""

import runpy
from pathlib import Path

import pytest

from ovq.hf import OVQConfig
from ovq.parallel.cost import bubble, cost

ROOT = Path(__file__).parent.parent.parent


def test_bytes_and_bubbles_are_those_of_the_formulae():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8}
    config = OVQConfig(
        num_hidden_layers=6, num_slots=16, chunk_size=8, sliding_window=5, conv_size=3, **sizes
    )
    found = cost(config, num_tokens=4096, num_ranks=4, num_micro_batches=2)
    # Of bfloat16 activations: 3 layers of 2 heads of 16 with a window, 3 with a dictionary, all with a
    # convolution over 128 channels that looks back 2 tokens.
    window, convolution = 2 * 4 * (16 + 16) * 2, 128 * 2 * 2
    # After 3072 tokens 15 of 16 slots are open.
    sums, counts, pending = 2 * 15 * (16 + 16) * 4, 2 * 15 * 8, 2 * 8 * (16 + 16) * 2
    gradient = 3 * (window + convolution) + 3 * (sums + pending + convolution)
    assert found.gradient_bytes == gradient
    assert found.state_bytes == gradient + 3 * (counts + 8)
    # Keys and values of 1024 tokens, 3 times, in 3 layers.
    assert found.ring_bytes == 3 * 3 * 1024 * 2 * (16 + 16) * 2
    assert found.ring_gradient_bytes == 2 * found.ring_bytes
    assert found.bubble == pytest.approx(3 / (2 * 6 + 3))
    assert found.bubble_by_model == pytest.approx(3 / (2 + 3))


def test_one_rank_has_nothing_to_send():
    with pytest.raises(ValueError, match="num_ranks: expected at least 2, found 1"):
        cost(OVQConfig(num_hidden_layers=2), num_tokens=64, num_ranks=1)
    assert bubble(num_ranks=1, num_micro_batches=3, num_layers=2) == 0


def test_the_tables_of_the_documentation_are_those_of_the_program():
    program = runpy.run_path(str(ROOT / "benchmarks" / "context_parallel_cost.py"))
    text = (ROOT / "docs" / "use" / "scaling.md").read_text()
    assert program["bytes_table"]() in text
    assert program["bubble_table"]() in text
