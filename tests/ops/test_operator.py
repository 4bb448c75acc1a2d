"""Calls in graphs of `torch.compile`: one operator, with a state or without, in and out."""

import contextlib

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.nn.functional import logsigmoid

from ovq.layers import OVQAttention
from ovq.ops import OVQState, backend_used, ovq_attention
from ovq.ops.state import tensors_of
from tests.ops.common import assert_same_state, attend, inputs

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
SIZES = {"num_slots": 6, "chunk_size": 4}


@pytest.fixture(autouse=True)
def forgotten_graphs():
    yield
    torch._dynamo.reset()


def whole(function):
    """The function as a single graph, run by PyTorch, which needs no compiler."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("merge", ["existing", "nearest"])
def test_sizes_and_numbers_of_a_graph_may_be_symbolic(merge):
    def call(q, scale, value_weight):
        options = {"num_slots": 4, "chunk_size": 4, "merge": merge, "value_weight": value_weight}
        return attend(q, q, q, scale=scale, **options)[0]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for length, dim, scale in ((9, 8, 1.5), (14, 16, 1.7), (14, 16, None)):
        q, given = torch.randn(2, length, 2, dim), (scale, 0.5 if dim == 8 else 0.25)
        torch.testing.assert_close(compiled(q, *given), call(q, *given), rtol=0, atol=0)


def test_a_graph_serves_several_rates():
    def call(q, rate):
        return attend(q, q, q, num_slots=4, chunk_size=4, ablation={"rate": rate})[0]

    compiled, q = whole(call), torch.randn(2, 14, 2, 8)
    for rate in (0.3, 0.5, 1, "count"):
        torch.testing.assert_close(compiled(q, rate), call(q, rate), rtol=0, atol=0)


def gates(length, *, kv_heads=1):
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(2, 2, length, kv_heads, dtype=torch.float64, generator=generator)
    return {"token_weights": draw[0].sigmoid(), "log_forget": logsigmoid(draw[1] + 2)}


def two_calls(q, k, v, weights, log_forget, options):
    """A call that returns a state, and one that continues from it."""
    first, second = slice(None, 11), slice(11, None)

    def of(part):
        given = {"token_weights": weights, "log_forget": log_forget}
        return {name: x[:, part] for name, x in given.items() if x is not None}

    o, state = attend(2 * q[:, first], k[:, first], v[:, first], **options, **of(first))
    more, state = attend(
        2 * q[:, second], k[:, second], v[:, second], initial_state=state, **options, **of(second)
    )
    return torch.cat([o, more], 1), state


@pytest.mark.parametrize(
    ("gated", "options"),
    [
        ((), {"ablation": {"bias": "count+norm", "rate": 0.3}, "growth": "linear"}),
        (("token_weights",), {"merge": "updated"}),
        (("log_forget",), {}),
        (("token_weights", "log_forget"), {"merge": "nearest"}),
    ],
)
def test_a_state_goes_in_and_out_of_a_whole_graph(gated, options):
    given = [gates(19).get(name) if name in gated else None for name in ("token_weights", "log_forget")]
    results = []
    for function in (two_calls, whole(two_calls)):
        leaves = [x.clone().requires_grad_() for x in (*inputs(2, 19), *given) if x is not None]
        tensors = iter(leaves)
        arguments = [next(tensors) for _ in "qkv"] + [x if x is None else next(tensors) for x in given]
        o, state = function(*arguments, {**SIZES, **options})
        total = o.square().sum() + state.key_sum.sin().sum() + state.pending_values.square().sum()
        results.append((o, state, torch.autograd.grad(total, leaves)))
    (expected, state, grads), (found, compiled, compiled_grads) = results
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled_grads, grads)
    # There is room for all slots in the state of a graph.
    assert compiled.count.shape[2] == SIZES["num_slots"] >= state.count.shape[2]
    assert_same_state(compiled, state)


def test_gradients_of_a_graph_that_are_a_graph_themselves():
    """PyTorch records nothing while it runs such a graph (compiled autograd), but this backward needs it."""
    results = []

    def step(q, k, v, weights, log_forget):
        o, state = two_calls(q, k, v, weights, log_forget, {**SIZES, "merge": "nearest"})
        (o.square().sum() + state.key_sum.sin().sum()).backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        for function in (step, torch.compile(step, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in (*inputs(2, 19), *gates(19).values())]
            function(*leaves)
            results.append([x.grad for x in leaves])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["auto", "naive"])
@pytest.mark.parametrize("is_exported", [False, True])
def test_gradients_of_gradients_of_a_graph_are_refused(is_exported, backend):
    """The reference has them, but graphs call its first gradients as one operator."""

    class Read(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, backend=backend, **SIZES)[0]

    leaves = [x.requires_grad_() for x in inputs(1, 9)]
    exported = torch.export.export(Read(), tuple(leaves)).module() if is_exported else None
    read = exported or torch.compile(Read(), backend="eager", fullgraph=True)
    (grad,) = torch.autograd.grad(read(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"graphs of torch.compile .* Outside of graphs, .*'naive'"):
        torch.autograd.grad(grad.square().sum(), leaves)


@pytest.mark.parametrize("device", ["fake", "meta"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_tensors_without_data_give_what_a_graph_gives_but_numbers(is_gated, device):
    def results(function, tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        o, state = function(*leaves, *[None] * (5 - len(leaves)), SIZES)
        grads = torch.autograd.grad(o.sum() + state.key_sum.sum(), leaves)
        return [(x.shape, x.dtype) for x in (o, *tensors_of(state).values(), *grads)], state

    given = [*inputs(2, 19), *(gates(19).values() if is_gated else ())]
    expected, known = results(whole(two_calls), given)
    with FakeTensorMode() if device == "fake" else contextlib.nullcontext() as mode:
        bare = [x.to("meta") if mode is None else mode.from_tensor(x) for x in given]
        found, state = results(two_calls, bare)
        with pytest.raises(ValueError, match=r"expected no init='random', .* without data"):
            attend(*bare[:3], init="random", **SIZES)
    assert found == expected
    for tensors, other in ((bare, known), (given, state)):
        with pytest.raises(ValueError, match=r"initial_state: (tensors with data|device): expected"):
            attend(*tensors[:3], initial_state=other, **SIZES)


@pytest.mark.parametrize("device", ["fake", "meta"])
@pytest.mark.parametrize("name", ["attention_mask", "cu_seqlens"])
def test_rows_without_data_have_shapes(name, device):
    layer = OVQAttention(8, num_heads=2, **SIZES)
    is_packed = name == "cu_seqlens"
    rows = torch.tensor([0, 4, 9]) if is_packed else torch.ones(2, 9, dtype=torch.int64)
    x, tensors = torch.randn(1 if is_packed else 2, 9, 8), inputs(1 if is_packed else 2, 9)
    with FakeTensorMode(allow_non_fake_inputs=True) if device == "fake" else torch.device("meta") as mode:
        strip = mode.from_tensor if device == "fake" else lambda x: x.to("meta")
        *bare, x, rows = map(strip, (*tensors, x, rows))
        layer = layer if device == "fake" else layer.to("meta")
        o, state = attend(*bare, **{name: rows}, **SIZES)
        assert (o.shape, len(state.num_seen)) == ((*tensors[2].shape[:2], 2, 5), 2)
        assert layer(x, **{name: rows})[0].shape == x.shape
    with pytest.raises(ValueError, match=f"{name}: expected a dense tensor with data, found"):
        attend(*tensors, **{name: rows}, **SIZES)


def test_how_many_tokens_a_state_without_data_has_seen_is_not_what_memory_held():
    bare = [x.to("meta") for x in inputs(1, 9)]
    # What is not initialised is then filled.
    torch.use_deterministic_algorithms(True)
    try:
        _, state = attend(*bare, **SIZES)
    finally:
        torch.use_deterministic_algorithms(False)
    assert state.num_seen.tolist() == [0]


def test_outputs_of_a_graph_may_be_changed_in_place():
    leaves = [x.requires_grad_() for x in inputs(1, 19, dtype=torch.float32)]
    # PyTorch runs the graph as it is; other backends of `torch.compile` copy.
    compiled = torch.compile(lambda *qkv: attend(*qkv, **SIZES)[0].mul_(2), backend="eager")
    results = []
    for o in (2 * attend(*leaves, **SIZES)[0], compiled(*leaves)):
        results.append((o, *torch.autograd.grad(o.square().sum(), leaves)))
    torch.testing.assert_close(*results)


def test_rows_of_a_whole_graph():
    q, k, v = inputs(2, 9, dtype=torch.float32)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0]])

    def read(q, k, v, **rows):
        return attend(q, k, v, **SIZES, **rows)

    graph = whole(read)
    for tensors, rows in (
        ((q, k, v), {"attention_mask": mask}),
        ((q[:1], k[:1], v[:1]), {"cu_seqlens": torch.tensor([0, 4, 4, 9])}),
    ):
        (expected, state), (found, compiled) = read(*tensors, **rows), graph(*tensors, **rows)
        assert torch.equal(found, expected)
        assert_same_state(compiled, state, tolerance=0)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="found a hole in row 0"):
        graph(q, k, v, attention_mask=mask)


def test_a_graph_serves_states_of_any_age_and_calls_go_on_without_it():
    q, k, v = inputs(1, 30, dtype=torch.float32)
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    def step(q, k, v, state):
        return attend(q, k, v, initial_state=state, **SIZES)

    compiled = torch.compile(step, backend=count, fullgraph=True)
    _, state = attend(q[:, :7], k[:, :7], v[:, :7], **SIZES)
    expected, _ = attend(q, k, v, **SIZES)
    outputs = []
    for t in range(7, 30):
        function = step if t > 20 else compiled
        o, state = function(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), expected[:, 7:])
    # One for the first state, which has as many slots as it needs, and one for those with room for all.
    assert len(graphs) == 2


def test_states_that_do_not_fit_are_refused_in_a_graph():
    q, k, v = inputs(1, 5)
    _, state = attend(q, k, v, **SIZES)

    def step(q, k, v, state):
        return attend(q, k, v, initial_state=state, num_slots=8, chunk_size=4)

    compiled = torch.compile(step, backend="aot_eager")
    with pytest.raises(ValueError, match="initial_state: num_slots: expected 8, found 6"):
        compiled(q, k, v, state)


def test_a_graph_is_exported_for_any_length():
    class Read(torch.nn.Module):
        def forward(self, q, k, v):
            return ovq_attention(q, k, v, **SIZES)[0]

    short, long = (inputs(1, n, dtype=torch.float32) for n in (6, 11))
    length = torch.export.Dim("length", min=4, max=64)
    program = torch.export.export(Read(), short, dynamic_shapes=[{1: length}] * 3)
    for qkv in (short, long):
        assert torch.equal(program.module()(*qkv), Read()(*qkv))


def test_random_slots_run_outside_of_graphs():
    q, k, v = inputs(1, 9)

    def read(q, k, v):
        return attend(2 * q, k, v, init="random", **SIZES)[0]

    torch.manual_seed(3)
    expected = read(q, k, v)
    torch.testing.assert_close(torch.compile(read, backend="aot_eager")(q, k, v), expected)
    assert backend_used() == "torch"


@pytest.mark.parametrize("name", ["init", "initial_state"])
def test_what_runs_outside_of_graphs_is_not_exported(name):
    class Read(torch.nn.Module):
        def forward(self, q, k, v):
            empty = {"batch_size": 1, "num_kv_heads": 1, "key_dim": q.shape[3], "value_dim": v.shape[3]}
            narrow = OVQState.empty(**empty, **SIZES).to_state_dtype("int8")
            options = {"init": "random", "initial_state": narrow}
            return attend(q, k, v, **{name: options[name]}, **SIZES)[0]

    q, k, v = (x[:, :, :1] for x in inputs(1, 9, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"expected no init=.*under torch.export, found some"):
        torch.export.export(Read(), (q, k, v))


@pytest.mark.parametrize("options", [{"init": "random"}, {"merge": "nearest"}], ids=["torch", "cpu"])
def test_backward_passes_that_a_compiled_step_calls_are_not_compiled(options):
    @torch.compiler.disable
    def loss_of(q, k, v):
        return attend(2 * q, k, v, **SIZES, **options)[0].square().sum()

    def step(qkv):
        loss_of(*qkv).backward()

    compiled = torch.compile(step, backend="aot_eager")
    counters.clear()
    for num_tokens in (19, 40):
        qkv = inputs(1, num_tokens, dtype=torch.float32)
        grads = []
        for run in (step, compiled):
            leaves = [x.detach().requires_grad_() for x in qkv]
            torch.manual_seed(0)
            run(leaves)
            grads.append([x.grad for x in leaves])
        assert all(map(torch.equal, *grads))
    assert counters["stats"]["unique_graphs"] == 0


def test_a_graph_returns_no_memory_that_it_was_given():
    q, k, v = inputs(1, 9, dtype=torch.float32)

    def step(q, k, v, state):
        return attend(q, k, v, initial_state=state, **SIZES)

    _, state = whole(lambda q, k, v: attend(q, k, v, **SIZES))(q[:, :8], k[:, :8], v[:, :8])
    # Nothing is merged, so that a call outside of a graph returns the sums as they are.
    token = q[:, 8:], k[:, 8:], v[:, 8:]
    assert step(*token, state)[1].key_sum is state.key_sum
    _, after = whole(step)(*token, state)
    for name in ("key_sum", "value_sum", "count", "pending_keys", "pending_values", "num_seen"):
        assert getattr(after, name).data_ptr() != getattr(state, name).data_ptr(), name


@pytest.mark.slow
def test_the_operator_is_what_pytorch_expects():
    from ovq.ops.operator import _pieces

    q, k, v = (x.requires_grad_() for x in inputs(1, 6, dtype=torch.float32))
    _, state = attend(*(x.detach() for x in inputs(1, 7, dtype=torch.float32)), **SIZES)
    scale, bounds = torch.ones(2), torch.tensor([[1], [5]])
    settings = (*SIZES.values(), "plateau", "existing", "count", None, 0.35)
    for pieces, rows, wants_state in (([None] * 9, None, False), (_pieces(state), bounds, True)):
        arguments = (q, k, v, scale, None, None, *pieces, rows, *settings, wants_state, "torch")
        torch.library.opcheck(torch.ops.ovq.call.default, arguments)
    assert isinstance(state, OVQState)
