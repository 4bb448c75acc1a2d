"""Reads on a second stream: streams that run as late as they may give what one stream gives."""

import contextlib

import pytest
import torch

from tests.ops.common import assert_same_state, attend, inputs

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")


class Event:
    """Remembers how much had been launched on a stream."""

    def record(self, stream):
        self.stream, self.num = stream, stream.num


class Stream:
    """Runs what is launched on it only when another stream has to wait for it."""

    def __init__(self, _=None):
        self.num, self.waiting, self.seen = 0, [], {}

    def launch(self, work):
        self.num += 1
        self.waiting.append(work)

    def run(self, num):
        while self.num - len(self.waiting) < num:
            self.waiting.pop(0)()

    def wait_event(self, event):
        event.stream.run(event.num)
        self.seen[event.stream] = event.num

    def wait_stream(self, stream):
        stream.run(stream.num)


class Cuda:
    """Two streams in the place of `torch.cuda`: the current one runs at once, the other one late."""

    Event, Stream = Event, Stream

    def __init__(self):
        self.main = self.current = Stream()

    def current_stream(self, _):
        return self.main

    @contextlib.contextmanager
    def stream(self, side):
        self.current = side
        yield
        self.current = self.main


@pytest.fixture
def cuda(monkeypatch):
    """Segments of one chunk, read beside the recurrence by streams of this file."""
    from ovq.ops.backends.triton import beside, launch, work

    cuda, original, step = Cuda(), launch.read, launch.Recurrence.step

    class Read:
        def __getitem__(self, grid):
            def run(*args, **options):
                # All that has been written so far must have been waited for.
                assert cuda.current.seen[cuda.main] == cuda.main.num
                cuda.current.launch(lambda: original[grid](*args, **options))

            return run

    def counted(self, *args):
        cuda.main.launch(lambda: step(self, *args))
        cuda.main.run(cuda.main.num)

    monkeypatch.setattr(launch, "read", Read())
    monkeypatch.setattr(launch.Recurrence, "step", counted)
    monkeypatch.setattr(work, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(beside, "cuda", cuda)
    monkeypatch.setattr(beside, "reads", beside.Beside)
    return cuda


def test_reads_beside_the_recurrence_give_the_same(request):
    from ovq.ops.backends.triton import beside

    tokens = inputs(1, 15, 2, 1, 5, 4, dtype=torch.float32)
    options = {"num_slots": 6, "chunk_size": 3, "backend": "triton"}
    expected, state = attend(*tokens, **options)
    request.getfixturevalue("cuda")
    o, found = attend(*tokens, **options)
    assert torch.equal(o, expected)
    assert_same_state(found, state, tolerance=0)
    # The controls: a set that is written before it was read, and outputs that nothing waits for.
    for name in ("begin_writing", "join"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(beside.Beside, name, lambda *_: None)
            assert not torch.equal(attend(*tokens, **options)[0], expected)


def test_it_is_off_and_for_gpus_alone(monkeypatch):
    from ovq.ops.backends.triton import beside

    assert isinstance(beside.reads(torch.ones(1)), beside.Inline)
    monkeypatch.setattr(beside, "IS_ON", True)
    assert isinstance(beside.reads(torch.ones(1)), beside.Inline)
