"""Steps in CUDA graphs: what a stand-in records and runs again gives what launches one by one give."""

import contextlib
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.common import attend, inputs
from tests.ops.test_parity import gradients

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")
# numpy, which the interpreter computes with, warns of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Nothing(TorchDispatchMode):
    """While a graph is recorded, nothing may run but launches: no allocation, no copy to or from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise RuntimeError(f"expected launches alone, found {func}")


class Cuda:
    """In the place of `torch.cuda`: graphs that keep the launches of Triton's interpreter."""

    def __init__(self):
        self.recorded, self.num_replays, self.is_on_side = None, 0, False

    def Stream(self, device):
        return device

    @contextlib.contextmanager
    def stream(self, _):
        self.is_on_side = True
        yield
        self.is_on_side = False

    def CUDAGraph(self):
        return CUDAGraph(self)


class CUDAGraph:
    def __init__(self, cuda):
        self.cuda, self.launches, self.mode = cuda, [], Nothing()

    def capture_begin(self, *, capture_error_mode):
        # The default stream cannot be recorded.
        assert self.cuda.is_on_side
        assert capture_error_mode == "thread_local"
        self.cuda.recorded = self.launches
        self.mode.__enter__()

    def capture_end(self):
        self.mode.__exit__(None, None, None)
        self.cuda.recorded = None

    def replay(self):
        self.cuda.num_replays += 1
        for launch in self.launches:
            launch()


@pytest.fixture
def cuda(monkeypatch):
    """Graphs of this file where two steps are alike; segments of a few chunks, in two sets by turns."""
    from triton.runtime.interpreter import InterpretedFunction

    from ovq.ops.backends.triton import beside, graph, work

    cuda, run = Cuda(), InterpretedFunction.run

    def run_or_record(self, *args, **options):
        launch = partial(run, self, *args, **options)
        return launch() if cuda.recorded is None else cuda.recorded.append(launch)

    monkeypatch.setattr(InterpretedFunction, "run", run_or_record)
    monkeypatch.setattr(graph, "cuda", cuda)
    monkeypatch.setattr(graph, "FEWEST", 2)
    monkeypatch.setattr(graph, "steps_of", graph.Replayed)
    monkeypatch.setattr(beside.Inline, "num_sets", 2)
    monkeypatch.setattr(work, "SEGMENT_BYTES", 1600)
    return cuda


def attended(lengths, is_kept=False):
    """Outputs, the state, and, if what the backward needs is kept, the gradients."""
    tokens = inputs(len(lengths), max(lengths), 1, 1, 4, 3, dtype=torch.float32)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    options = {"num_slots": 4, "chunk_size": 2, "attention_mask": mask}
    if is_kept:
        return gradients("triton", *tokens, torch.ones(1), options)
    return *attend(*tokens, **options, backend="triton"), ()


def is_same(found, expected):
    (o, state, grads), (o_expected, state_expected, grads_expected) = found, expected
    names = ("key_sum", "value_sum", "count", "pending_keys")
    parts = [(o, o_expected), *zip(grads, grads_expected, strict=True)]
    parts += [(getattr(state, name), getattr(state_expected, name)) for name in names]
    return all(torch.equal(a, b) for a, b in parts)


# Steps 1 to 5 are of two rows, 7 and 8 of the longer one; the first of a kind in each set is launched.
@pytest.mark.parametrize("is_kept", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_replayed_steps_give_the_same(is_kept, request):
    lengths = (19, 12)
    expected = attended(lengths, is_kept)
    cuda = request.getfixturevalue("cuda")
    assert is_same(attended(lengths, is_kept), expected)
    assert cuda.num_replays >= 2
    from ovq.ops.backends.triton import graph

    class Stuck(graph.Replayed):
        """The control: launches with the entries of the step that was recorded."""

        def step(self, i, shown, base):
            self.base = base
            super().step(i, shown, base)

        def _launch(self, i, shown):
            self._recurrence.step(i, shown, self._recurrence.work.at(i, self.base))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "steps_of", Stuck)
        assert not is_same(attended(lengths, is_kept), expected)


def test_where_recording_fails_steps_are_launched(request):
    expected = attended((15,))
    cuda = request.getfixturevalue("cuda")
    from ovq.ops.backends.triton import graph

    class Allocating(graph.Replayed):
        def _launch(self, i, shown):
            torch.zeros(1)
            super()._launch(i, shown)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "steps_of", Allocating)
        with pytest.warns(
            RuntimeWarning, match="launched one by one, as recording one failed: expected launches"
        ) as caught:
            assert is_same(attended((15,)), expected)
    # Once, as it would not go better the next time.
    assert len(caught) == 1
    assert cuda.num_replays == 0


def test_it_is_off_and_for_gpus_whose_stream_nobody_records(monkeypatch):
    from ovq.ops.backends.triton import graph

    monkeypatch.setattr(graph, "Replayed", lambda *_: "replayed")
    on_gpu, on_cpu = Mock(), Mock()
    on_gpu.work.table.is_cuda, on_cpu.work.table.is_cuda = True, False
    cuda = Mock()
    monkeypatch.setattr(graph, "cuda", cuda)
    cuda.is_current_stream_capturing.return_value = False
    assert isinstance(graph.steps_of(on_gpu, []), graph.Launched)
    monkeypatch.setattr(graph, "IS_ON", True)
    assert graph.steps_of(on_gpu, []) == "replayed"
    assert isinstance(graph.steps_of(on_cpu, []), graph.Launched)
    # What is launched there depends on what was computed before.
    by_host = Mock()
    by_host.work.table.is_cuda, by_host.work.options.merge = True, "nearest"
    assert isinstance(graph.steps_of(by_host, []), graph.Launched)
    cuda.is_current_stream_capturing.return_value = True
    assert isinstance(graph.steps_of(on_gpu, []), graph.Launched)
