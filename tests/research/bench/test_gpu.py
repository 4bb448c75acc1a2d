"""What `ovq bench --device cuda` does besides running kernels: tested without a GPU, on the CPU's timings."""

from types import SimpleNamespace

import pytest
import torch

from ovq_lab.bench import gpu
from ovq_lab.bench.rivals import RIVALS
from ovq_lab.bench.show import sentences, tables
from ovq_lab.bench.suite import Suite, run_suite
from ovq_lab.bench.workloads import Workload
from tests.progress import Seen

SMALL = {"length": 48, "dtype": "float32", "chunk_size": 16, "num_heads": 2, "head_dim": 16}


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_rivals_compute_what_they_are_called(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    mixers = ("sdpa", "window", "sdpa_flash", "flex_window")
    outputs = {mixer: Workload(mixer=mixer, **SMALL).forward("cpu")() for mixer in mixers}
    torch.testing.assert_close(outputs["sdpa_flash"], outputs["sdpa"])
    torch.testing.assert_close(outputs["flex_window"], outputs["window"])
    decode = Workload(mixer="sdpa_flash", **SMALL).decode("cpu")
    # A chunk of tokens, one after the other, and again from the first.
    decoded = torch.cat([decode() for _ in range(16)], dim=2)
    whole = Workload(mixer="sdpa", **SMALL | {"length": 48 + 16}).forward("cpu")()
    torch.testing.assert_close(decoded, whole[:, :, 48:])
    torch.testing.assert_close(decode(), whole[:, :, 48:49])
    assert [w for w in RIVALS if not Workload(mixer=w, **SMALL).has_decode] == ["flex_window"]


def test_flops_and_bytes():
    delta = Workload(mixer="gated_deltanet", **SMALL)
    assert delta.flops() == 2 * 2 * 48 * 3 * 16 * 16
    assert Workload(mixer="sdpa_cudnn", **SMALL).flops() == Workload(mixer="sdpa", **SMALL).flops()
    ovq = Workload(mixer="ovq", num_slots=48, **SMALL)
    # 24 slots of 16 keys, 16 values and a count, and half a chunk of keys and values.
    assert ovq.bytes("decode") == 2 * (24 * (2 * 16 * 4 + 8) + 8 * 2 * 16 * 4)
    assert delta.bytes("decode") == 2 * 2 * 16 * 16 * 4


def test_kernels_of_a_trace_are_those_of_the_device_longest_first():
    kinds = torch.autograd.DeviceType
    events = [
        SimpleNamespace(key="aten::add", device_type=kinds.CPU, self_device_time_total=9),
        SimpleNamespace(key="add", device_type=kinds.CUDA, self_device_time_total=1),
        SimpleNamespace(key="flash_fwd", device_type=kinds.CUDA, self_device_time_total=5),
    ]
    assert [event.key for event in gpu.slowest_first(events)] == ["flash_fwd", "add"]


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """The CPU in the place of the GPU; the kernels of all but OVQ are the intended ones."""
    for part in ("forward", "decode"):
        original = getattr(Workload, part)
        monkeypatch.setattr(Workload, part, lambda self, device, original=original: original(self, "cpu"))
    monkeypatch.setattr(
        gpu,
        "kernel_events",
        lambda function: [SimpleNamespace(key=key) for key in (str(type(function())), "flash_fwd")],
    )
    monkeypatch.setattr(gpu, "flushed_times", lambda functions, **_: [[2.0, 1.0, 3.0] for _ in functions])
    monkeypatch.setattr(gpu, "copy_rate", lambda: 1e9)
    monkeypatch.setattr("ovq_lab.bench.suite.matrix_rate", lambda *_, **__: 1e9)
    monkeypatch.setattr("ovq_lab.bench.measure.environment", lambda device: {"device": device})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("sdpa_cudnn", "sdpa_efficient", "flex_window"):
        monkeypatch.delitem(RIVALS, name)


def test_a_report_tells_what_ran_and_what_did_not(as_if_on_a_gpu):
    small = {name: SMALL[name] for name in ("chunk_size", "num_heads", "head_dim")}
    suite = Suite(
        parts=("forward", "decode"),
        lengths=(48,),
        dtypes=("float32",),
        num_slots=(8,),
        device="cuda",
        **small,
    )
    report = run_suite(suite, Seen())
    by_mixer = {(r["what"], r["mixer"]): r for r in report["rows"]}
    assert {mixer for _, mixer in by_mixer} == {"sdpa_flash", "ovq"}
    row = by_mixer["forward", "sdpa_flash"]
    assert (row["seconds"], row["seconds_max"], row["speedup"], row["is_intended"]) == (2.0, 3.0, 1.0, True)
    assert row["roofline_share"] == pytest.approx(2 * 2 * 48 * 24 * 32 / 1e9 / 2.0)
    # Bound by memory: the cache is read once.
    assert by_mixer["decode", "sdpa_flash"]["roofline_share"] == pytest.approx(2 * 48 * 2 * 16 * 4 / 1e9 / 2)
    assert not by_mixer["forward", "ovq"]["is_intended"]
    reasons = {found["label"]: found["reason"] for found in report["left_out"]}
    assert reasons.keys() == {"Gated DeltaNet, fla", "Mamba2, fla"}
    assert all("fla" in reason for reason in reasons.values())
    said = "\n".join(sentences(report))
    assert "! forward float32 48, OVQ, 8 slots: not the intended kernels" in said
    assert "Left out: decode float32 48, Mamba2, fla (ModuleNotFoundError" in said
    assert len(tables(report)) == 2


def test_what_is_refused_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fields = {"lengths": (48,), "dtypes": ("float32",), "num_slots": (8,), "device": "cuda"}
    with pytest.raises(ValueError, match="expected no stream with --device cuda"):
        Suite(parts=("stream",), **fields)


def test_out_of_memory_leaves_one_row_out(as_if_on_a_gpu, monkeypatch):
    def exhausted(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(Workload, "forward", exhausted)
    left_out = []
    assert gpu.measure("forward", [Workload(mixer="sdpa_flash", **SMALL)], 1e10, 1e9, left_out) == []
    assert left_out[0]["reason"] == "OutOfMemoryError: CUDA out of memory."
