"""Slots in bfloat16 and int8: every backend rounds the same sums, and states stay values."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ovq.ops import OVQState, backend_used, ovq_attention, slot_assignments
from ovq.ops.fading import LEAST_LOG, LEAST_WEIGHT
from ovq.ops.narrow import STATE_DTYPES, narrowed, rounded_, widened
from ovq.ops.state import forgetting, tensors_of

NARROW = STATE_DTYPES[1:]
BACKENDS = ("naive", "torch", "cpu")
K, V, N, C = 8, 6, 12, 8


def empty(state_dtype: str, *, rows: int = 2, dtype: torch.dtype = torch.float32) -> OVQState:
    sizes = {"num_kv_heads": 2, "key_dim": K, "value_dim": V, "num_slots": N, "chunk_size": C}
    return OVQState.empty(batch_size=rows, dtype=dtype, **sizes).to_state_dtype(state_dtype)


def tokens(num: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, num, h, d, generator=random, dtype=torch.float64) for h, d in ((4, K), (2, K), (2, V))
    )
    return q.to(dtype), torch.nn.functional.normalize(k, dim=-1).to(dtype), v.to(dtype)


def logs(num: int, rate: float) -> dict[str, Tensor]:
    """`log_forget` of two rows, `-rate` on the mean; nothing without a rate."""
    draw = torch.rand(2, num, 2, generator=torch.Generator().manual_seed(2))
    return {"log_forget": -2 * rate * draw} if rate else {}


def attend(
    q: Tensor, k: Tensor, v: Tensor, state: OVQState | None, **options: object
) -> tuple[Tensor, OVQState]:
    sizes = {"num_slots": N, "chunk_size": C}
    return ovq_attention(q, k, v, initial_state=state, output_final_state=True, **sizes | options)


def assert_equal(state: OVQState, other: OVQState) -> None:
    found, expected = tensors_of(state), tensors_of(other)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        # The places of tokens that are not pending are undefined.
        assert name.startswith("pending") or torch.equal(found[name], x), name


@pytest.mark.parametrize("merge", ["existing", "nearest"])
@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.1, 30.0])
def test_backends_round_the_same_sums_however_a_text_is_split(merge, state_dtype, dtype, rate):
    q, k, v = tokens(60, dtype=dtype)
    gates = logs(60, rate)
    if dtype == torch.float32:
        gates["token_weights"] = torch.rand(2, 60, 2, generator=torch.Generator().manual_seed(3))

    def read(backend: str, *ends: int) -> tuple[Tensor, OVQState]:
        state, outputs = empty(state_dtype, dtype=dtype), []
        for start, end in zip((0, *ends), (*ends, 60), strict=True):
            part = slice(start, end)
            own = {name: x[:, part] for name, x in gates.items()}
            new = (x[:, part] for x in (q, k, v))
            o, state = attend(*new, state, merge=merge, backend=backend, **own)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    reference, expected = read("naive")
    assert expected.state_dtype == state_dtype
    assert int((expected.count > 1).sum()) > 0
    for backend in BACKENDS:
        # In one call, in pieces, and in pieces and then token by token.
        for ends in ((), (3, 30), (20, *range(25, 50))):
            o, state = read(backend, *ends)
            assert_equal(state, expected)
            atol = 4e-2 if dtype == torch.bfloat16 else 2e-5 if rate else 2e-6
            torch.testing.assert_close(o, reference, atol=atol, rtol=0)


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_rows_of_packed_and_padded_calls_are_those_of_rows_alone(state_dtype, rate):
    q, k, v = tokens(40)
    gates = logs(40, rate)
    lengths = [40, 17]
    alone = [
        attend(
            *(x[r : r + 1, :n] for x in (q, k, v)),
            empty(state_dtype, rows=1),
            **{name: x[r : r + 1, :n] for name, x in gates.items()},
        )
        for r, n in enumerate(lengths)
    ]
    expected = OVQState.concatenate([state for _, state in alone])
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]

    def packed(x: Tensor) -> Tensor:
        return torch.cat([x[r, :n] for r, n in enumerate(lengths)])[None]

    new = tuple(packed(x) for x in (q, k, v))
    own = {name: packed(x) for name, x in gates.items()}
    ends = torch.tensor([0, 40, 57])
    for backend in BACKENDS:
        o, state = attend(q, k, v, empty(state_dtype), attention_mask=mask, backend=backend, **gates)
        assert_equal(state, expected)
        torch.testing.assert_close(o[1, :17], alone[1][0][0], atol=2e-6, rtol=0)
        o, state = attend(*new, empty(state_dtype), cu_seqlens=ends, backend=backend, **own)
        assert_equal(state, expected)
        torch.testing.assert_close(o[0, 40:], alone[1][0][0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_state_in_another_format_is_the_same_memory_in_fewer_bytes(rate):
    _, state = attend(*tokens(100), None, **logs(100, rate))
    bytes_of_sums = {}
    for state_dtype, error in (("bfloat16", 2**-8), ("int8", 2**-7)):
        narrow = state.to_state_dtype(state_dtype)
        assert f"slots in {state_dtype}, {narrow.nbytes:,} bytes" in repr(narrow)
        bytes_of_sums[state_dtype] = narrow.key_sum.nbytes
        for name in ("keys", "values"):
            exact, found = getattr(state, name), getattr(narrow, name)
            largest = exact.abs().amax(-1, keepdim=True)
            assert bool(((found - exact).abs() <= error * largest).all()), name
        # Rounding again changes nothing, and nothing else has changed.
        wide = narrow.to_state_dtype("float32")
        assert_equal(wide.to_state_dtype(state_dtype), narrow)
        assert_equal(dataclasses.replace(wide, key_sum=state.key_sum, value_sum=state.value_sum), state)
    assert state.key_sum.nbytes == 2 * bytes_of_sums["bfloat16"] == 4 * bytes_of_sums["int8"]


def test_a_bfloat16_slot_of_one_token_is_that_token():
    q, k, v = tokens(C, dtype=torch.bfloat16)
    _, state = attend(q, k, v, empty("bfloat16", dtype=torch.bfloat16), merge="nearest")
    assert state.count.tolist() == [[[1] * C] * 2] * 2
    assert torch.equal(state.keys, k.transpose(1, 2).float())
    assert torch.equal(state.values, v.transpose(1, 2).float())
    # With forgetting, slots hold means: those tokens, whatever they weigh by now.
    state = empty("bfloat16", dtype=torch.bfloat16)
    _, state = attend(q, k, v, state, merge="nearest", **logs(C, 0.3))
    assert torch.equal(state.key_sum, k.transpose(1, 2))
    assert torch.equal(state.value_sum, v.transpose(1, 2))


@pytest.mark.parametrize("state_dtype", NARROW)
def test_means_are_rounded_once_however_little_slots_weigh(state_dtype):
    random = torch.Generator().manual_seed(0)
    # Sums of all sizes, those most often that have only a few bits.
    for power in (*range(-150, -130), *range(-130, 0, 5)):
        weight = torch.tensor([-125.0, -109, -60, -40, 0, 30]).exp2().repeat_interleave(1500)
        weight *= 1 + torch.rand(len(weight), generator=random)
        draw = torch.randn(len(weight), 16, generator=random, dtype=torch.float64)
        sums = (draw * 2.0**power).float()
        rounded_(sums, state_dtype, weight)
        again = sums.clone()
        rounded_(again, state_dtype, weight)
        assert torch.equal(again, sums), power
    # Sums fade with weights, which may become as low for a while; the bits of the means stay.
    numbers, scales = narrowed(draw, state_dtype)
    for faded in (weight, torch.full_like(weight, LEAST_WEIGHT * math.exp(LEAST_LOG / 2))):
        found, own = narrowed(widened(numbers, scales, torch.float32, faded), state_dtype, faded)
        assert torch.equal(found[weight > 1e-20], numbers[weight > 1e-20])
        assert scales is own is None or torch.equal(own, scales)
    # A slot without weight holds zeros.
    rounded_(sums, state_dtype, weight, torch.zeros_like(weight))
    assert not bool(sums.any())


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_without_new_tokens_keep_their_bits_however_much_they_fade(state_dtype, backend):
    q, k, v = tokens(40)
    _, before = attend(q, k, v, empty(state_dtype), backend=backend, **logs(40, 0.1))
    # The same key again and again.
    same = [x[:, :1].expand(-1, 10 * C, -1, -1) for x in (q, k, v)]
    _, after = attend(*same, before, backend=backend, **logs(10 * C, 0.1))
    places = before.count.shape[2]
    stay = (after.count[..., :places] == before.count) & (before.count > 0)
    assert int(stay.sum()) > 4
    assert bool((after.weight[..., :places][stay] < 2e-3 * before.weight[stay]).all())
    for name in ("key_sum", "value_sum", "key_step", "value_step"):
        if getattr(before, name) is not None:
            assert torch.equal(getattr(after, name)[:, :, :places][stay], getattr(before, name)[stay]), name


def test_int8_sums_near_the_smallest_floats_are_zero():
    # A scale of 1.3e-40 would have been rounded to 0.9e-40, and 185 steps are more than an int8 holds.
    sums = torch.tensor([[1.7e-38, -1e-38], [2e-36, -1e-36]])
    rounded_(sums, "int8")
    torch.testing.assert_close(sums, torch.tensor([[0, 0], [2e-36, -1e-36]]), rtol=0.01, atol=0)


@pytest.mark.parametrize("state_dtype", NARROW)
def test_a_stream_goes_on_with_forgetting(state_dtype):
    q, k, v = tokens(60)
    parts = [tuple(x[:, part] for x in (q, k, v)) for part in (slice(0, 20), slice(20, 60))]
    _, plain = attend(*parts[0], empty(state_dtype), backend="naive")
    _, expected = attend(*parts[1], plain, backend="naive", **logs(40, 0.3))
    # Sums become means, in float32.
    start = forgetting(plain.to_state_dtype("float32")).to_state_dtype(state_dtype)
    for backend in BACKENDS:
        for state in (plain, start):
            _, after = attend(*parts[1], state, backend=backend, **logs(40, 0.3))
            assert_equal(after, expected)
    # Rows that do not forget yet may join those that do.
    joined = OVQState.concatenate([plain, expected])
    assert_equal(joined.select([2, 3]), expected)
    torch.testing.assert_close(joined.keys[:2, :, : plain.count.shape[2]], plain.keys, atol=0.02, rtol=0)


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_rows_join_leave_and_are_saved(state_dtype, rate, tmp_path):
    q, k, v = tokens(50)
    gates = logs(50, rate)
    _, long = attend(q, k, v, empty(state_dtype), **gates)
    few = {name: x[:, :10] for name, x in gates.items()}
    _, short = attend(*(x[:, :10] for x in (q, k, v)), empty(state_dtype), **few)
    assert long.count.shape[2] > short.count.shape[2]
    both = OVQState.concatenate([short, long])
    assert_equal(both.select([2, 3]), long)
    path = tmp_path / "state"
    both.save(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["version"] == "4"
    assert_equal(OVQState.load(path), both)
    # Rows go on as alone.
    new, gates = tokens(20, seed=1), logs(20, rate)
    _, alone = attend(*new, long, **gates)
    doubled = {name: torch.cat([x, x]) for name, x in gates.items()}
    _, together = attend(*(torch.cat([x, x]) for x in new), both, **doubled)
    assert_equal(together.select([2, 3]), alone)
    smaller = long.resize(4)
    assert smaller.state_dtype == state_dtype
    expected = long.to_state_dtype("float32").resize(4).to_state_dtype(state_dtype)
    assert_equal(smaller, expected)
    assert int(smaller.num_open.max()) == 4
    with pytest.raises(ValueError, match=f"expected state_dtype {state_dtype} in all, found float32"):
        OVQState.concatenate([long, long.to_state_dtype("float32")])


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("rate", [0.0, 0.02])
@pytest.mark.parametrize("merge", ["existing", "nearest"])
def test_assignments_are_those_of_the_op(state_dtype, backend, rate, merge):
    # So many that sums which differ in their last bits would be rounded differently at times.
    q, k, v = tokens(1000)
    options = {"merge": merge, "backend": backend, **logs(1000, rate)}
    _, expected = attend(q, k, v, empty(state_dtype), **options)
    found = slot_assignments(k, v, num_slots=N, chunk_size=C, initial_state=empty(state_dtype), **options)
    assert_equal(found.state, expected)


@torch.no_grad()
def test_tokens_one_by_one_repeat_a_prepared_step_that_reads_narrow_sums_in_place():
    q, k, v = tokens(40)
    _, state = attend(*(x[:, :33] for x in (q, k, v)), empty("int8"), backend="cpu", merge="nearest")
    one = [tuple(x[:, i : i + 1] for x in (q, k, v)) for i in range(33, 39)]
    _, first = attend(*one[0], state, merge="nearest")
    assert backend_used() == "cpu"
    _, second = attend(*one[1], first, merge="nearest")
    assert second._step is first._step
    assert second.key_sum is state.key_sum
    # Two continuations of a state do not disturb each other.
    other, _ = attend(*one[5], first, merge="nearest")
    o, third = attend(*one[2], second, merge="nearest")
    assert third._step is first._step
    again, _ = attend(*(torch.cat(x, 1) for x in zip(*one[:3], strict=True)), state, merge="nearest")
    torch.testing.assert_close(o, again[:, 2:], atol=2e-6, rtol=0)
    assert not torch.equal(other, o)
    # Nor does a merge into a full dictionary.
    after, kept = third, third.clone()
    for token in (*one[3:], *one[:2]):
        _, after = attend(*token, after, merge="nearest")
    assert int(after.count.sum()) > int(third.count.sum())
    assert_equal(third, kept)


def test_what_narrow_sums_cannot_do_is_refused_by_name():
    q, k, v = tokens(20)
    state = empty("int8")
    with pytest.raises(ValueError, match="expected one of float32, bfloat16, int8, found 'int4'"):
        state.to_state_dtype("int4")
    with pytest.raises(
        ValueError, match=r"gradients: expected sums in float32 .* or torch.no_grad\(\), found int8"
    ):
        attend(q.requires_grad_(), k, v, state)
    # Integers would drop them without a word.
    _, learned = attend(q, k.requires_grad_(), v, None)
    with pytest.raises(ValueError, match=r"gradients: expected sums in float32 .*found int8"):
        learned.to_state_dtype("int8")
    assert learned.detach().to_state_dtype("int8").state_dtype == "int8"
    q, k = q.detach(), k.detach()
    with pytest.raises(ValueError, match=r"rate: expected sums in float32 .*found int8"):
        attend(q, k, v, state, ablation={"rate": 0.5})
    with pytest.raises(ValueError, match=r"key_step: expected .* in torch.bfloat16 on cpu, found NoneType"):
        attend(q, k, v, dataclasses.replace(state, key_step=None))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_compiled_graphs_break_around_narrow_sums(rate):
    q, k, v = tokens(20)
    gates = logs(20, rate)

    def run(state: OVQState) -> tuple[Tensor, OVQState]:
        return attend(q, k, v, state, **gates)

    with torch.no_grad():
        o, state = torch.compile(run, backend="eager")(empty("int8"))
        expected_o, expected = run(empty("int8"))
    assert torch.equal(o, expected_o)
    assert_equal(state, expected)
