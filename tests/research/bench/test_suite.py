"""The measurements measure what they say, and the report is whole; how fast anything is, no test asks."""

import dataclasses
import json
import re
import subprocess

import pytest
import torch

import ovq_lab.bench.suite
from ovq.cli import main
from ovq.ops import cpu_kernels, ovq_attention
from ovq_lab.bench import measure
from ovq_lab.bench.measure import interleaved, peak_bytes
from ovq_lab.bench.show import save_figures, sentences, tables
from ovq_lab.bench.suite import Suite, run_suite
from ovq_lab.bench.workloads import Workload
from tests.progress import Seen

SMALL = {"chunk_size": 16, "num_heads": 2, "head_dim": 8}
WHOLE = ["--what", "model"]


def test_the_workloads_compute_what_they_are_called():
    exact = Workload(mixer="sdpa", length=64, dtype="float32", **SMALL)
    window = Workload(mixer="window", length=64, dtype="float32", **SMALL)
    ovq = Workload(mixer="ovq", length=64, dtype="float32", num_slots=8, **SMALL)
    outputs = {w.mixer: w.forward("cpu")() for w in (exact, window, ovq)}
    outputs["ovq"] = outputs["ovq"].transpose(1, 2)
    # All see the first chunk whole, and differ after it.
    for mixer in ("window", "ovq"):
        torch.testing.assert_close(outputs[mixer][:, :, :16], outputs["sdpa"][:, :, :16])
        assert not torch.allclose(outputs[mixer][:, :, 32:], outputs["sdpa"][:, :, 32:], atol=1e-3)
    assert [g.shape for g in ovq.forward_backward("cpu")()] == [(1, 64, 2, 8)] * 3


def test_flops_of_ovq_are_those_of_the_formula():
    workload = Workload(mixer="ovq", length=64, dtype="float32", num_slots=16, **SMALL)
    sizes = [0, 8, 10, 12]  # of a plateau of 16 slots, before each chunk of 16
    expected = 2 * 2 * 16 * sum(n * 3 * 8 + 16 * 16 / 2 for n in sizes)
    assert workload.flops() == expected


def test_a_rule_is_measured_with_the_growth_that_it_is_meant_for():
    workload = Workload(mixer="ovq", length=64, dtype="float32", num_slots=24, merge="nearest", **SMALL)
    output = workload.forward("cpu")()
    sizes = {"num_slots": 24, "chunk_size": 16, "scale": 8**0.5}
    expected, _ = ovq_attention(*workload.inputs(), merge="nearest", growth="immediate", **sizes)
    assert torch.equal(output, expected)
    assert not torch.equal(output, dataclasses.replace(workload, merge="existing").forward("cpu")())
    # Before each chunk of 16 there are 0, 16, 24 and 24 slots, each of 8 + 8 float32 sums and a count.
    assert workload.flops() == 2 * 2 * 16 * sum(n * 3 * 8 + 16 * 16 / 2 for n in (0, 16, 24, 24))
    assert workload.bytes("decode") == 24 * 2 * (2 * 8 * 4 + 8) + 16 * 2 * 8 * 4


def test_functions_take_turns():
    calls = []
    times = interleaved([lambda: calls.append("a"), lambda: calls.append("b")], max_rounds=3, run=2)
    assert "".join(calls) == "ab" + "aabb" * 3
    assert [len(t) for t in times] == [6, 6]


def test_peak_memory_sees_what_a_call_holds(tmp_path, monkeypatch):
    # Files of the working directory are not run.
    (tmp_path / "statistics.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    small, large = (
        peak_bytes(
            "forward_backward", Workload(mixer="ovq", num_slots=16, length=n, dtype="float32", **SMALL)
        )["peak_bytes"]
        for n in (256, 32768)
    )
    # q, k, v, their gradients, the output and its gradient: eight tensors of 2 MiB. Linux counts resident
    # pages on each processor and adds them up later, so that either figure may be off by some hundred KiB.
    # Without the gradients it would be five tensors.
    assert 7 * 2**21 <= large - small <= 16 * 2**21


def test_a_report_is_whole_and_can_be_shown(tmp_path, monkeypatch):
    # Seconds of products are of no use here.
    few = {"max_rounds": 1}
    monkeypatch.setattr(
        measure, "interleaved", lambda functions, **options: interleaved(functions, **options | few)
    )
    sizes = {"lengths": (32, 64), "dtypes": ("float32",), "num_slots": (4, 8), **SMALL}
    suite = Suite(parts=("forward", "decode"), merges=("existing", "nearest"), **sizes)
    report = run_suite(suite, seen := Seen())
    assert seen.done[-1] == seen.total == 4
    assert len(report["rows"]) == 2 * 2 * 6
    rules = {row["label"]: row["merge"] for row in report["rows"]}
    assert rules.pop("exact (SDPA)") is rules.pop("window of 16") is None
    existing = {"OVQ, 4 slots": "existing", "OVQ, 8 slots": "existing"}
    assert rules == existing | {f"OVQ, nearest, {n} slots": "nearest" for n in (4, 8)}
    assert all(row["seconds"] > 0 for row in report["rows"])
    assert {row["speedup"] for row in report["rows"] if row["mixer"] == "sdpa"} == {1.0}
    compiled = "cpu" if cpu_kernels().startswith("compiled") else "torch"
    backends = json.loads(json.dumps(report))["environment"]["backends"]
    assert backends == {"forward": compiled, "decode": compiled}
    assert len(tables(report)) == 2
    assert len(sentences(report)) == 8
    (path,) = save_figures(report, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_every_size_and_rule_reads_the_stream(monkeypatch):
    monkeypatch.setattr(ovq_lab.bench.suite, "peak_bytes", lambda what, workload, piece: {})
    sizes = {"lengths": (32,), "dtypes": ("float32",), "num_slots": (4, 8), **SMALL}
    rows = run_suite(Suite(parts=("stream",), merges=("existing", "nearest"), **sizes), Seen())["rows"]
    found = [(row["what"], row["num_slots"], row["merge"]) for row in rows]
    assert found == [("stream", n, rule) for n in (4, 8) for rule in ("existing", "nearest")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--what", "speed"], "--what: expected some of .* found speed"),
        (["--what", "model,decode"], "--what: expected model or converted alone, found model,decode"),
        (["--dtypes", "int8"], "--dtypes: expected some of .* found int8"),
        (["--merge", "existing,wart"], "--merge: expected rules among .* found 'wart'"),
        (["--lengths", "many"], "--lengths: expected positive integers .* found 'many'"),
        (["--device", "tpu"], "--device: expected cpu or cuda, found 'tpu'"),
        ([*WHOLE, "--models", "gpt"], "--models: expected some of llama, .* found gpt"),
        ([*WHOLE, "--sizes", "1T"], "--sizes: expected some of 2M, .* found 1T"),
        ([*WHOLE, "--prompts", "1"], "--prompts: expected at least 2 tokens, found 1"),
        ([*WHOLE, "--device", "cuda"], "--device: expected cpu with --what model, found cuda"),
        ([*WHOLE, "--dtypes", "bfloat16"], "--dtypes: expected none with --what model, found bfloat16"),
        (["--what", "stream", "--lengths", "64"], "--lengths: expected none with --what stream, found 64"),
    ],
)
def test_bad_arguments_are_one_line(arguments, expected, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(expected, error)
    assert not (tmp_path / "out").exists()


def test_a_process_that_dies_is_told_in_one_line(monkeypatch):
    ended = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(ValueError, match="expected a process that ends with code 0, found -9 "):
        peak_bytes("stream", Workload(mixer="ovq", num_slots=16, length=64, dtype="float32"))
