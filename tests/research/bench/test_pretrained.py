"""`ovq bench --what converted`: every way runs in a process of its own, and the report can be shown."""

import json
import os
import signal
import sys

import pytest
import torch
import transformers

import ovq
from ovq.cli.signals import EndedBySignal
from ovq_lab.bench import pretrained_peer
from ovq_lab.bench.pretrained_suite import PretrainedSuite, _run, run_pretrained
from ovq_lab.bench.show import save_figures, tables
from tests.convert.common import converted
from tests.progress import Seen
from tests.test_cli import fail

# Stands in for an interpreter: it prints what a peer prints.
FAKE = """#!/bin/sh
echo loading
echo '{"length": 8, "read_seconds": 1.0, "write_seconds": 2.0, "bytes": 3, "peak_bytes": 4, "version": "5"}'
echo '{"length": 16, "read_seconds": 6.0, "write_seconds": 7.0, "bytes": 8, "peak_bytes": 9, "version": "5"}'
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    converted().save_pretrained(folder)
    return folder


def script(path, text):
    path.write_text(text)
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize("kind", ["ovq", "transformers"])
def test_a_way_reads_up_to_each_length_and_writes_there(kind, folder, tmp_path, capsys, monkeypatch):
    # Pieces that no length is a multiple of.
    monkeypatch.setattr(pretrained_peer, "PIECE", 5)
    (tmp_path / "tokens.json").write_text(json.dumps([i * 17 % 64 for i in range(40)]))
    options = {"dtype": "float32"} | ({"weight_dtype": "int8"} if kind == "ovq" else {})
    pretrained_peer.main(
        kind,
        str(folder),
        str(tmp_path / "tokens.json"),
        [8, 16],
        3,
        threads=torch.get_num_threads(),
        **options,
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["length"] for row in rows] == [8, 16]
    assert {row["version"] for row in rows} == {
        ovq.__version__ if kind == "ovq" else transformers.__version__
    }
    for row in rows:
        assert min(row["read_seconds"], row["write_seconds"]) > 0
        assert row["peak_bytes"] >= row["bytes"]


class Settings:
    """Takes any settings."""

    def __init__(self, *args, **options):
        self.args = args
        vars(self).update(options)


def test_openvino_keeps_as_many_rows_as_it_is_told(monkeypatch):
    engines = []

    class Pipeline(Settings):
        def generate(self, given, **options):
            # The first token comes with reading.
            found = Settings(
                m_times_to_first_token=[5e6], m_durations=[9e6, *[2e6] * (options["max_new_tokens"] - 1)]
            )
            engines.append((self, given.args[0].args[0].tolist()))
            return Settings(perf_metrics=Settings(raw_metrics=found))

    genai = dict.fromkeys(("SchedulerConfig", "CacheEvictionConfig", "TokenizedInputs"), Settings)
    fake = Settings(
        **genai, AggregationMode=Settings(NORM_SUM="sum"), LLMPipeline=Pipeline, __version__="1.2-3"
    )
    monkeypatch.setitem(sys.modules, "openvino", Settings(Tensor=Settings))
    monkeypatch.setitem(sys.modules, "openvino_genai", fake)
    peer = pretrained_peer.openvino("folder", most_tokens=9, threads=2, rows=256)
    assert (peer.version, peer.measure([3, 4, 5], 2)) == ("1.2", (5.0, [2.0, 2.0]))
    [(engine, read)] = engines
    assert read == [[3, 4, 5]]
    assert engine.scheduler_config.cache_eviction_config.args == (32, 64, 256, "sum")
    everything = pretrained_peer.openvino("folder", most_tokens=9, threads=2, rows=0)
    everything.measure([3], 1)
    assert not hasattr(engines[-1][0].scheduler_config, "cache_eviction_config")


def test_every_way_is_measured_at_every_length(folder, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_text("")
    peer = script(tmp_path / "python", FAKE)
    monkeypatch.setattr("sys.executable", peer)
    suite = PretrainedSuite(
        model=folder,
        tokens=[i * 17 % 64 for i in range(40)],
        lengths=[16, 8],
        gguf=tmp_path / "model.gguf",
        llama_cpp=peer,
        openvino=tmp_path,
        genai=peer,
    )
    report = json.loads(json.dumps(run_pretrained(suite, seen := Seen())))
    rows = report["rows"]
    assert list(dict.fromkeys((row["label"], row["mixer"]) for row in rows)) == [
        ("ovq, float32", "ovq"),
        ("ovq, float32, weights in int8", "ovq"),
        ("ovq, bfloat16, weights in int8", "ovq"),
        ("ovq, bfloat16, weights in int4", "ovq"),
        ("llama.cpp, model, f16 cache", "llama_cpp"),
        # As many rows as the model has by its blocks, and as many bytes.
        *(
            (f"OpenVINO, {tmp_path.name}, {kept}", "openvino")
            for kept in ("full cache", "128 rows", "512 rows")
        ),
        ("transformers, float32, full cache", "transformers"),
    ]
    assert seen.done[-1] == seen.total == 18
    for what, found in (("read", [1.0, 6.0]), ("write", [2.0, 7.0]), ("memory", [4, 9])):
        of = [row for row in rows if row["what"] == f"converted_{what}"]
        assert [row.get("seconds", row.get("peak_bytes")) for row in of] == found * 9
        assert [row["length"] for row in of] == [8, 16] * 9
    assert [len(table.rows) for table in tables(report)] == [9, 9, 9]
    assert save_figures(report, tmp_path)[0].is_file()
    assert report["environment"]["threads"] == torch.get_num_threads()


def test_a_way_that_fails_says_why(folder, tmp_path):
    (tmp_path / "model.gguf").write_text("")
    peer = script(tmp_path / "python", "#!/bin/sh\necho no such module >&2\nexit 3\n")
    suite = PretrainedSuite(
        model=folder,
        tokens=[1] * 8,
        lengths=[8],
        dtypes=[],
        gguf=tmp_path / "model.gguf",
        llama_cpp=peer,
    )
    with pytest.raises(ValueError, match=r"llama_cpp: expected .* found exit code 3, no such module"):
        run_pretrained(suite, Seen())
    with pytest.raises(ValueError, match="--text: expected at least 9 tokens, found 8"):
        PretrainedSuite(model=folder, tokens=[1] * 8, lengths=[9])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_of_a_way_at_once(number, tmp_path):
    error = KeyboardInterrupt() if number == signal.SIGINT else EndedBySignal(number)
    text = f"#!/bin/sh\necho $$ > '{tmp_path}/number'\n{FAKE}sleep 5\ntouch '{tmp_path}/ended'\n"
    peer = script(tmp_path / "python", text)
    rows = _run(peer, {"kind": "llama_cpp"})
    next(rows)
    with pytest.raises(type(error)):
        rows.throw(error)
    # Nobody has waited for its last line, and it is not left at work.
    assert not (tmp_path / "ended").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "number").read_text()), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--what converted", "--what converted: expected --model and --text, found"),
        ("--what converted --model {tmp} --text {tmp}/t", "--model: expected a folder that ovq convert"),
        ("--what converted --model {model} --text {tmp}/t --gguf {tmp}/no", "--gguf: expected a file"),
        ("--what converted --model {model} --text {tmp}/t --llama-cpp sh", "--llama-cpp: expected --gguf"),
        ("--what converted --model {model} --text {tmp}/t --llama-cpp no-such", "--llama-cpp: expected an"),
        (
            "--what converted --model {model} --text {tmp}/t --openvino {tmp}/t",
            "--openvino: expected a folder",
        ),
        ("--what converted --model {model} --text {tmp}/t --genai sh", "--genai: expected --openvino"),
        ("--what converted --model {model} --text {tmp}/t", "--model: expected a tokenizer"),
        ("--what forward --model {model}", "--model: expected none with --what forward, found"),
    ],
)
def test_bad_input_costs_one_line(options, message, folder, capsys, tmp_path):
    (tmp_path / "t").write_text("1 2 3")
    out = ["--out", tmp_path / "out"]
    found = fail(capsys, "bench", *options.format(tmp=tmp_path, model=folder).split(), *out)
    assert found.startswith(message)
    assert not (tmp_path / "out").exists()
