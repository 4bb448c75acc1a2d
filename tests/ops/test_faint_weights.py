"""Weights next to which scores are small, and the other way round: decode steps give what one call gives."""

import pytest
import torch

from tests.ops.common import BACKENDS, CPU, attend, by_turns, inputs, read_in_pieces

LENGTH, CHUNK = 40, 8


def drawn(dtype=torch.float32, seed=0):
    """Each query asks for its own token, so that the highest score is that of the newest."""
    _, k, v = inputs(1, LENGTH, 1, 1, 8, 8, dtype=dtype, seed=seed)
    return k, k, v


def decoded(tensors, given, options):
    """Outputs token by token."""
    by_name = dict(zip("qkv", tensors, strict=True)) | given
    return read_in_pieces(by_name, [1] * LENGTH, **options)[0]


@pytest.mark.parametrize(
    ("scale", "dtype", "backend"),
    by_turns([30.0, 36.0, 70.0, 1000.0], [torch.float32, torch.bfloat16, torch.float16], [*BACKENDS, *CPU]),
    ids=str,
)
def test_tokens_of_weight_zero_are_decoded_as_they_are_read_in_one_call(scale, dtype, backend):
    """A token that forgets is read with its weight, at least 1e-37: no score may be divided by that."""
    tensors = drawn(dtype)
    weights = torch.ones(1, LENGTH, 1)
    weights[:, [1, 5, 9, 10, 11, 12, 13, 20]] = 0
    given = {"token_weights": weights, "log_forget": torch.full((1, LENGTH, 1), -0.1)}
    options = {"num_slots": 12, "chunk_size": CHUNK, "scale": scale, "growth": "immediate"}
    found = decoded(tensors, given, options | {"backend": backend})
    expected, _ = attend(*tensors, **given, **options, backend="naive")
    assert bool(expected.isfinite().all())
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("merge", "scale", "forgets", "backend"),
    by_turns(["existing", "nearest"], [20.0, 88.0, 130.0], [False, True], ["torch", *CPU]),
)
def test_logs_of_weights_as_large_as_scores(merge, scale, forgets, backend):
    """The most of a softmax may be where the score is lowest: weights of 1e-30 to 1e30."""
    tensors = drawn(seed=1)
    generator = torch.Generator().manual_seed(2)
    given = {"token_weights": 10 ** (60 * torch.rand(1, LENGTH, 1, generator=generator) - 30)}
    if forgets:
        given["log_forget"] = torch.full((1, LENGTH, 1), -0.2)
    options = {"num_slots": 12, "chunk_size": CHUNK, "scale": scale, "merge": merge}
    found = decoded(tensors, given, options | {"backend": backend})
    expected = decoded(tensors, given, options | {"backend": "naive"})
    # Scores of 130 are exact to 1e-5 in float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
