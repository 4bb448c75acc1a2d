"""Padding masks and packed rows: what is accepted, what is refused, and what the layers are told."""

import pytest
import torch

from ovq.layers import SequenceLayout, SlidingWindowAttention


def layout(mask=None, *, batch_size=1, num_past=0, num_new=4, cu_seqlens=None):
    return SequenceLayout.of(
        mask, batch_size=batch_size, num_past=num_past, num_new=num_new, cu_seqlens=cu_seqlens
    )


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 0, 1, 1]],
        [[1, 1, 0, 0]],
        [[0, 1, 1, 0]],
        [[0, 0, 0, 0]],
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_contiguous_masks_are_taken_as_they_are(mask, dtype):
    mask = torch.tensor(mask)
    found = layout(mask.to(dtype))
    assert torch.equal(found.mask, mask.bool())
    assert torch.equal(found.new_mask, mask.bool())
    assert torch.equal(found.segments(4), mask - 1)


def test_a_mask_of_ones_is_no_mask_but_is_remembered():
    found = layout(torch.ones(1, 4))
    assert found.mask is None
    assert found.new_mask is None
    assert found.segments(4) is None
    assert found.has_mask
    assert not layout().has_mask


def test_the_mask_of_new_columns_is_dropped_when_only_cached_ones_are_padding():
    found = layout(torch.tensor([[0, 1, 1, 1, 1, 1]]), num_past=2)
    assert found.new_mask is None
    assert found.segments(5).tolist() == [[0, 0, 0, 0, 0]]
    assert found.segments(6).tolist() == [[-1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, None),
        ({"mask": torch.ones(1, 4)}, None),
        ({"mask": torch.tensor([[0, 1, 1, 1, 1]]), "num_past": 1}, None),
        (
            {"mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]), "batch_size": 3},
            [[2, 4, 8], [2, 3, 0]],
        ),
        (
            {"mask": torch.tensor([[0, 1, 1], [1, 1, 0]]), "batch_size": 2, "num_past": 1, "num_new": 2},
            [[0, 2], [2, 1]],
        ),
        ({"cu_seqlens": torch.tensor([0, 3, 3, 4], dtype=torch.int32)}, [[0, 3, 3], [3, 0, 1]]),
    ],
)
def test_the_bounds_of_the_new_tokens_of_each_row(arguments, expected):
    bounds = layout(**arguments).bounds
    assert (bounds and bounds.bounds.tolist()) == expected


def test_a_layout_is_not_checked_again():
    found = layout(torch.tensor([[0, 1, 1, 1]]))
    assert layout(found) is found


def test_packed_rows():
    found = layout(num_new=6, cu_seqlens=torch.tensor([0, 2, 2, 6], dtype=torch.int32))
    assert found.row_index().tolist() == [0, 0, 2, 2, 2, 2]
    assert found.offset_in_row().tolist() == [0, 1, 0, 1, 2, 3]
    assert found.segments(6).tolist() == [[0, 0, 2, 2, 2, 2]]


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        ({"cu_seqlens": torch.tensor([0, 1, 1, 91, 93, 100])}, [[1, 2], [90], [7]]),
        ({"cu_seqlens": torch.tensor([0, 20, 40, 43, 100])}, [[20, 20, 3, 57]]),
        ({"mask": torch.ones(9, 100).tril(), "batch_size": 9}, [list(range(1, 10))]),
        ({}, [None]),
    ],
)
def test_only_packed_rows_of_very_different_lengths_run_in_groups(arguments, calls):
    found, x, seen = layout(num_new=100, **arguments), torch.arange(900.0).view(9, 100), []

    def run(columns, part):
        seen.append(part.bounds and part.bounds.bounds[1].tolist())
        return 2 * columns

    x = x[: arguments.get("batch_size", 1)]
    assert torch.equal(found.in_groups(run, x), 2 * x)
    assert seen == calls
    assert found.to("meta").in_groups(run, x.to("meta")).is_meta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.ones(1, 3)}, r"shape \[batch, cached \+ new\] = \[1, 4\].*found \[1, 3\]"),
        ({"mask": torch.ones(1, 4), "num_past": 2}, r"\[1, 6\].*2 columns are cached.*found \[1, 4\]"),
        ({"mask": torch.ones(1, 1, 4, 4)}, r"found \[1, 1, 4, 4\]"),
        ({"mask": torch.ones(1, 4).to_sparse()}, "attention_mask: expected a dense tensor"),
        ({"mask": torch.tensor([[0, 1, 2, 1]])}, r"0 and 1 only, found \[0, 1, 2\]"),
        ({"mask": torch.tensor([[0.0, 0.5, 1.0, 1.0]])}, r"0 and 1 only, found \[0.0, 0.5, 1.0\]"),
        ({"mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]), "batch_size": 2}, "found a hole in row 1"),
        ({"mask": torch.ones(1, 4), "cu_seqlens": torch.tensor([0, 4])}, r"found both"),
        ({"cu_seqlens": torch.tensor([0, 4]), "batch_size": 2}, "batch of 1, found a batch of 2"),
        ({"cu_seqlens": torch.tensor([0, 4]), "num_past": 3}, r"no cache .* found 3"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"rise from 0 to 4, found \[0, 3\]"),
        ({"cu_seqlens": torch.tensor([1, 4])}, r"found \[1, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, r"found \[0, 3, 2, 4\]"),
        ({"cu_seqlens": torch.tensor([4])}, r"shape \[rows \+ 1\], found \(1,\)"),
        ({"cu_seqlens": torch.tensor([[0, 4]])}, r"found \(1, 2\)"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "int32 or int64 tensor, found torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        layout(**arguments)


@pytest.mark.parametrize(
    ("mask", "cu_seqlens", "num_past", "num_new"),
    [
        (None, None, 0, 5),
        (None, None, 0, 12),
        (None, None, 3, 9),
        (torch.ones(1, 9).index_fill(1, torch.tensor([0]), 0), None, 0, 9),
        (None, torch.tensor([0, 4, 9]), 0, 9),
    ],
)
def test_a_layout_of_other_columns_is_refused(mask, cu_seqlens, num_past, num_new):
    """Kernels would read beyond its tables of positions, and positions would be those of another call."""
    layer, x = SlidingWindowAttention(16, 2, sliding_window=4), torch.randn(2, 9, 16)
    sizes = {"batch_size": 1, "num_past": num_past, "num_new": num_new}
    found = layout(mask, **sizes, cu_seqlens=cu_seqlens)
    expected = "expected a layout of 2 rows with 0 cached and 9 new columns, found one of "
    with pytest.raises(ValueError, match=f"{expected}. rows with {num_past} and {num_new}"):
        layer(x, found)
