"""Decode steps of the compiled kernels: against the `torch` backend, and what one step tells the next."""

import copy
import dataclasses
import itertools

import pytest
import torch

from ovq.ops import OVQState, backend_used, cpu_kernels, ovq_attention
from tests.ops.common import assert_same_state, attend, inputs
from tests.processes import handed_over

pytestmark = pytest.mark.skipif("compiled" not in cpu_kernels(), reason=cpu_kernels())

# batch, heads, kv_heads, key_dim, value_dim: less than a vector, more than one, grouped heads.
SIZES = [(2, 4, 2, 7, 3), (1, 6, 2, 64, 64), (3, 2, 2, 33, 70), (1, 1, 1, 1, 1), (2, 2, 1, 130, 20)]
OPTIONS = {"num_slots": 24, "chunk_size": 16}


def steps(state, tensors, first, num, **options):
    """Outputs of `num` steps from token `first` on, and the state after them."""
    outputs = []
    for t in range(first, first + num):
        o, state = attend(*(x[:, t : t + 1] for x in tensors), initial_state=state, **options)
        outputs.append(o)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_steps_equal_those_of_torch(sizes, dtype):
    """Rows at different places, of which some complete a chunk when others do not."""
    batch, *heads = sizes
    tensors = inputs(batch, 90, *heads, dtype=dtype)
    lengths = [61, 50, 70][:batch]
    mask = torch.arange(70) < torch.tensor(lengths)[:, None]
    start = attend(*(x[:, :70] for x in tensors), attention_mask=mask, **OPTIONS)[1]
    results = [steps(start, tensors, 70, 20, backend=name, **OPTIONS) for name in ("torch", "cpu")]
    bound = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=bound, atol=bound)
    assert_same_state(results[1][1], results[0][1], tolerance=0)


@pytest.mark.parametrize("num", [0, 1, 200])
@torch.no_grad()
def test_a_step_with_few_or_many_slots(num):
    """From no token at all; and with more slots than are read at once."""
    tensors = inputs(1, num + 3, 2, 1, 16, 16, dtype=torch.float32)
    options = {"num_slots": 300, "chunk_size": 100, "growth": "immediate"}
    state = attend(*(x[:, :num] for x in tensors), **options)[1]
    (o_torch, by_torch), (o, after) = (
        steps(state, tensors, num, 3, backend=name, **options) for name in ("torch", "cpu")
    )
    torch.testing.assert_close(o, o_torch)
    assert_same_state(after, by_torch, tolerance=0)


@torch.no_grad()
def test_what_another_continuation_wrote_is_not_read():
    tensors = inputs(1, 12, 2, 1, 8, 8, dtype=torch.float32)
    state = steps(attend(*(x[:, :8] for x in tensors), **OPTIONS)[1], tensors, 8, 1, **OPTIONS)[1]
    expected = steps(state, tensors, 9, 3, **OPTIONS)[0]
    spoilt = [torch.full_like(x, torch.nan) for x in tensors]
    assert steps(state, spoilt, 9, 3, **OPTIONS)[0].isnan().all()
    assert torch.equal(steps(state, tensors, 9, 3, **OPTIONS)[0], expected)


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf])
@torch.no_grad()
def test_steps_after_tokens_that_are_not_finite(spoilt):
    q, k, v = inputs(2, 40, 2, 1, 8, 8, dtype=torch.float32)
    v[0, 3, 0, 2] = v[0, 33, 0, 5] = k[1, 34, 0, 1] = spoilt
    state = attend(q[:, :36], k[:, :36], v[:, :36], backend="torch", **OPTIONS)[1]
    (by_torch, _), (o, _) = (
        steps(state, (q, k, v), 36, 4, backend=name, **OPTIONS) for name in ("torch", "cpu")
    )
    torch.testing.assert_close(o, by_torch, equal_nan=True)


@torch.no_grad()
def test_scores_of_any_size():
    q, k, v = inputs(1, 60, 1, 1, 8, 4, dtype=torch.float32)
    state = attend(q[:, :56], k[:, :56], v[:, :56], **OPTIONS)[1]
    for scale in (-5.0, 0.0, 1e-3, 1e4):
        options = {**OPTIONS, "scale": scale}
        (by_torch, _), (o, _) = (
            steps(state, (q, k, v), 56, 4, backend=name, **options) for name in ("torch", "cpu")
        )
        torch.testing.assert_close(o, by_torch, rtol=1e-3, atol=1e-5)


def a_step():
    """A state after a decode step, and the arguments of the next one."""
    tensors = inputs(2, 40, 4, 2, 8, 8, dtype=torch.float32)
    state = attend(*(x[:, :38] for x in tensors), **OPTIONS)[1]
    state = steps(state, tensors, 38, 1, **OPTIONS)[1]
    assert state._step is not None
    return state, [x[:, 39:] for x in tensors]


@torch.no_grad()
def test_a_step_like_the_last_one_is_not_checked_again(monkeypatch):
    state, tensors = a_step()
    expected = attend(*tensors, initial_state=state, **OPTIONS)[0]
    monkeypatch.setattr("ovq.ops.attention.check_qkv", None)
    attend(*tensors, initial_state=copy.copy(state), **OPTIONS)
    attend(*tensors, initial_state=state, **OPTIONS, scale=1.0)
    with pytest.raises(TypeError):
        attend(*tensors, initial_state=state, **OPTIONS, growth="linear")
    monkeypatch.undo()
    torch.testing.assert_close(attend(*tensors, initial_state=state, **OPTIONS)[0], expected)
    assert backend_used() == "cpu"


@torch.no_grad()
def test_a_step_unlike_the_last_one_is_checked():
    state, (q, k, v) = a_step()
    for options in ({"num_slots": 25}, {"chunk_size": 8}, {"ablation": {"rate": 2.0}}, {"merge": "none"}):
        with pytest.raises(ValueError, match="expected"):
            attend(q, k, v, initial_state=state, **{**OPTIONS, **options})
    for wrong in (
        (q[:, :, :1], k, v),
        (q, k, v[..., :3]),
        (q[:1], k[:1], v[:1]),
        (q.double(), k, v),
        (q, k, None),
    ):
        with pytest.raises(ValueError, match="expected"):
            attend(*wrong, initial_state=state, **OPTIONS)
    with pytest.raises(ValueError, match="scale: expected"):
        attend(q, k, v, initial_state=state, scale=torch.ones(3), **OPTIONS)


@torch.no_grad()
def test_a_step_with_other_arguments_gives_what_they_ask_for():
    state, (q, k, v) = a_step()
    plain = dataclasses.replace(state)
    assert plain._step is None
    for options in ({"scale": 1.0}, {"scale": torch.tensor([1.0, 2, 3, 4])}, {"backend": "torch"}, {}):
        options = {**OPTIONS, **options}
        o, expected = (attend(q, k, v, initial_state=before, **options)[0] for before in (state, plain))
        torch.testing.assert_close(o, expected)
        assert backend_used() == options.get("backend", "cpu")
    o, none = ovq_attention(q, k, v, initial_state=state, **OPTIONS)
    assert none is None
    torch.testing.assert_close(o, expected)


CHANGES = [
    {"scale": 1.0},
    {"scale": torch.tensor([1.0, 2, 3, 4])},
    {},
    {"ablation": {"rate": 0.5}},
    {"growth": "immediate"},
    {"backend": "torch"},
    {"value_weight": 0.1, "merge": "nearest"},
    {"merge": "nearest"},
]


@pytest.mark.parametrize("pair", [*itertools.permutations(CHANGES, 2)], ids=str)
@torch.no_grad()
def test_what_one_kind_of_step_tells_the_next_is_not_told_to_others(pair):
    """Each kind of step twice, so that the second is like the one before it, through chunks that merge."""
    tensors = inputs(2, 58, 4, 2, 8, 8, dtype=torch.float32)
    state = plain = attend(*(x[:, :38] for x in tensors), **OPTIONS)[1]
    for i, options in enumerate(2 * [pair[0], pair[0], pair[1], pair[1], pair[1]] * 2):
        step = [x[:, 38 + i : 39 + i] for x in tensors]
        o, state = attend(*step, initial_state=state, **{**OPTIONS, **options})
        expected, plain = attend(*step, initial_state=dataclasses.replace(plain), **{**OPTIONS, **options})
        torch.testing.assert_close(o, expected)
    assert_same_state(state, plain, tolerance=0)


@torch.no_grad()
def test_a_step_after_a_merge_is_not_checked_again(monkeypatch):
    tensors = inputs(2, 60, 4, 2, 8, 8, dtype=torch.float32)
    start = attend(*(x[:, :38] for x in tensors), **OPTIONS)[1]
    expected, after = steps(start, tensors, 38, 20, backend="torch", **OPTIONS)
    _, state = steps(start, tensors, 38, 1, **OPTIONS)
    monkeypatch.setattr("ovq.ops.attention.check_qkv", None)
    o, state = steps(state, tensors, 39, 19, **OPTIONS)
    torch.testing.assert_close(o, expected[:, 1:], rtol=2e-6, atol=2e-6)
    assert_same_state(state, after, tolerance=0)


def test_a_step_with_gradients_has_a_graph():
    with torch.no_grad():
        state, (q, k, v) = a_step()
    o, _ = attend(q.requires_grad_(), k, v, initial_state=state, **OPTIONS)
    assert o.requires_grad


@torch.no_grad()
def test_a_state_that_was_changed_or_copied_is_read_as_it_is():
    state, tensors = a_step()
    changed = copy.copy(state)
    changed.value_sum = 2 * state.value_sum
    copied = copy.deepcopy(state)
    copied.value_sum.mul_(2)
    plain = dataclasses.replace(state, value_sum=2 * state.value_sum)
    o, *others = (attend(*tensors, initial_state=s, **OPTIONS)[0] for s in (plain, changed, copied))
    assert not torch.equal(o, attend(*tensors, initial_state=state, **OPTIONS)[0])
    for other in others:
        torch.testing.assert_close(other, o)


@torch.no_grad()
def test_states_between_steps_stay_as_they_were():
    tensors = inputs(1, 60, 2, 1, 8, 8, dtype=torch.float32)
    state = attend(*(x[:, :40] for x in tensors), **OPTIONS)[1]
    states: list[OVQState] = [state]
    for t in range(40, 60):
        states.append(attend(*(x[:, t : t + 1] for x in tensors), initial_state=states[-1], **OPTIONS)[1])
    for t, (before, after) in enumerate(itertools.pairwise(states)):
        o, again = attend(*(x[:, 40 + t : 41 + t] for x in tensors), initial_state=before, **OPTIONS)
        assert_same_state(again, after, tolerance=0)
        assert o.isfinite().all()


@torch.no_grad()
def test_steps_go_on_where_tensors_were_moved_to_be_shared():
    tensors = inputs(1, 60, 2, 1, 8, 8, dtype=torch.float32)
    state = attend(*(x[:, :40] for x in tensors), **OPTIONS)[1]
    _, state = attend(*(x[:, 40:41] for x in tensors), initial_state=state, **OPTIONS)
    alone = state.clone()
    _other = handed_over(state)
    for t in range(41, 60):
        token = [x[:, t : t + 1] for x in tensors]
        o, state = attend(*token, initial_state=state, **OPTIONS)
        expected, alone = attend(*token, initial_state=alone, **OPTIONS)
        assert torch.equal(o, expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@torch.no_grad()
def test_states_may_be_changed_in_place_between_steps(backend):
    """As a server does that starts a row anew, or takes a token back, in tensors that stay."""
    tensors = inputs(2, 60, 4, 2, 8, 6, dtype=torch.float32)

    def reset(state):
        for name in ("key_sum", "value_sum", "count", "num_seen"):
            getattr(state, name)[0] = 0

    for change in (reset, lambda state: state.num_seen.sub_(1)):
        state = steps(None, tensors, 0, 39, backend=backend, **OPTIONS)[1]
        change(state)
        expected = steps(state.clone(), tensors, 39, 20, backend="naive", **OPTIONS)
        found = steps(state, tensors, 39, 20, backend=backend, **OPTIONS)
        torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=2e-6)
        assert_same_state(found[1], expected[1], tolerance=2e-6)


@pytest.mark.parametrize("name", ["num_slots", "chunk_size"])
@torch.no_grad()
def test_states_of_another_size_do_not_go_on(name):
    tensors = inputs(1, 20, dtype=torch.float32)
    state = steps(None, tensors, 0, 19, **OPTIONS)[1]
    setattr(state, name, getattr(state, name) + 1)
    with pytest.raises(ValueError, match=f"initial_state: {name}: expected"):
        steps(state, tensors, 19, 1, **OPTIONS)
