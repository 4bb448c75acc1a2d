"""The demonstration: what it writes and says, by its quick form."""

import json
import os
import time

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForCausalLM

from ovq.runtime.files import claimed
from ovq_lab.eval.rows import ResultRow
from ovq_lab.figures import demo
from ovq_lab.figures.demo import conclusion, run_demo
from ovq_lab.train.config import CONFIG_FILE, RunConfig
from tests.test_cli import fail


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a quick demonstration, what it returned and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    # Something of an earlier demonstration, to be replaced.
    (out / "ovq").mkdir()
    (out / "ovq" / "old").write_text("")
    (out / "ovq" / CONFIG_FILE).write_text("{}")
    (out / "results.json").write_text("old")
    # And of one that was killed an hour ago.
    (out / ".ovq-runs-killed").mkdir()
    os.utime(out / ".ovq-runs-killed", (time.time() - 3600,) * 2)
    console = Console(record=True, width=200)
    with pytest.MonkeyPatch.context() as patch:
        # Processes would import everything; `tests/runtime/test_workers.py` tests them.
        patch.setattr(
            demo, "run_jobs", lambda function, jobs, reporter: [function(j, reporter) for j in jobs]
        )
        results = run_demo(out, seed=3, is_quick=True, console=console)
    return out, results, console.export_text()


# A folder of something else, and a run of `ovq train --out runs/ovq`.
@pytest.mark.parametrize("name", ["source.py", CONFIG_FILE])
def test_what_no_demonstration_left_is_not_replaced(name, tmp_path, monkeypatch):
    (tmp_path / "ovq").mkdir()
    (tmp_path / "ovq" / name).write_text("")
    monkeypatch.setattr(demo, "run_jobs", lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(ValueError, match=r"--out: expected a folder in which ovq/ .*, found something else"):
        run_demo(tmp_path, is_quick=True)
    assert (tmp_path / "ovq" / name).exists()


def test_two_demonstrations_at_once_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fcntl")
    monkeypatch.setattr(demo, "run_jobs", lambda *_, **__: pytest.fail("it has begun"))
    with claimed(tmp_path, command="ovq demo"):
        line = fail(capsys, "demo", "--quick", "--out", tmp_path)
    assert line == f"--out: expected a folder that no other `ovq demo` is writing to, found {tmp_path}"


def test_results_hold_a_row_for_each_model_and_length(done):
    out, results, _ = done
    read = json.loads((out / "results.json").read_text())
    assert read == json.loads(json.dumps(results))
    lengths = [256, 512, 1024, 2048, 4096]
    dictionaries = [("ovq", slots, merge) for slots in (64, 256, 1024) for merge in ("existing", "nearest")]
    models = [*dictionaries, ("full_attention", None, None), ("sliding_attention", None, None)]
    found = [(row["mixer"], row["num_slots"], row["merge"], row["length"]) for row in read["rows"]]
    assert found == [(*model, length) for model in models for length in lengths]
    assert read["train_length"] * 16 == lengths[-1]
    assert all(0 <= row["accuracy"] <= 1 for row in read["rows"])
    assert (read["seed"], read["is_quick"]) == (3, True)
    for name in ("torch", "transformers", "python", "ovq"):
        assert read["environment"][name]
    assert read["environment"]["cores"] >= 1
    assert {"train ovq", "test ovq", "train full_attention", "total"} <= set(read["seconds"])


def test_the_configurations_are_those_of_the_runs(done):
    out, results, _ = done
    configs = {name: RunConfig.from_json(json.dumps(text)) for name, text in results["config"].items()}
    assert RunConfig.load(out / "ovq") == configs["recall-ovq"]
    assert {config.train.seed for config in configs.values()} == {3}
    # The models differ in the long-range mixer and in nothing else.
    same = {config.override(["model.mixer_types=ovq"]).to_json() for config in configs.values()}
    assert len(same) == 1


def test_state_bytes_are_those_of_a_real_cache(done):
    out, results, _ = done
    model = AutoModelForCausalLM.from_pretrained(out / "ovq").eval()
    for row in results["rows"]:
        if row["mixer"] == "ovq" and row["length"] == 1024:
            model.set_num_slots(row["num_slots"])
            model.set_merge(row["merge"])
            output = model.model(torch.ones(1, 1024, dtype=torch.long), use_cache=True)
            cache = output["cache"] if "cache" in output else output["past_key_values"]
            assert row["state_bytes"] == cache.nbytes


def test_the_trained_model_loads_and_nothing_else_is_left(done):
    out, _, _ = done
    model = AutoModelForCausalLM.from_pretrained(out / "ovq")
    assert model.config.mixer_types == ["sliding_attention", "ovq"]
    assert (model.config.num_slots, model.config.merge) == (64, "existing")
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.png", "ovq", "results.json", "state.png"]
    assert not (out / "ovq" / "old").exists()
    for name in ("accuracy.png", "state.png"):
        with Image.open(out / name) as picture:
            picture.verify()


def test_it_prints_the_table_an_answer_and_a_sentence(done):
    _, results, text = done
    assert "OVQ, 1024 slots" in text
    assert "OVQ, nearest, 1024 slots" in text
    for row in results["rows"]:
        assert f"{row['accuracy']:.3f}" in text
    assert "The model says " in text
    last = text[text.index("This was a quick run") :]
    assert "its numbers mean nothing" in last
    assert "At 4096 tokens, 16 times the training length" in last


def rows_for(accuracies, state_bytes):
    models = [("ovq", slots, merge) for slots in (64, 1024) for merge in ("existing", "nearest")]
    models += [("full_attention", None, None), ("sliding_attention", None, None)]
    return [
        ResultRow(
            mixer=mixer,
            num_slots=num_slots,
            merge=merge,
            length=length,
            accuracy=accuracy if length == 4096 else 1.0,
            state_bytes=num_bytes,
            num_questions=10,
            slices={},
        )
        for length in (256, 4096)
        for (mixer, num_slots, merge), accuracy, num_bytes in zip(
            models, accuracies, state_bytes, strict=True
        )
    ]


def test_the_sentences_say_what_the_numbers_say():
    accuracies, sizes = [0.2, 0.3, 0.991, 0.999, 0.985, 0.03], [2048, 3072, 2**20, 2**21, 2**22, 1024]
    assert conclusion(rows_for(accuracies, sizes), train_length=256) == (
        "At 4096 tokens, 16 times the training length, OVQ answers 20.0% of the questions with the 64 slots "
        "it was trained with and 99.1% with 1024 (state: 2.0 KiB and 1.0 MiB). With the same weights and "
        "slots, but the shortest edges merged (nearest), it answers 30.0% and 99.9% (3.0 KiB and 2.0 MiB). "
        "Full attention answers 98.5% (4.0 MiB) and a window alone 3.0% (1.0 KiB)."
    )


def test_the_sentences_hide_no_bad_result():
    sizes = [2**20, 2**20, 2**23, 2**23, 2**21, 1024]
    text = conclusion(rows_for([0.1, 0.05, 0.1, 0.08, 0.9, 0.0], sizes), train_length=256)
    assert "10.0% with 1024 (state: 1.0 MiB and 8.0 MiB)" in text
    assert "(nearest), it answers 5.0% and 8.0%" in text
    assert "Full attention answers 90.0% (2.0 MiB)" in text


def test_the_full_form_is_the_recipes_with_the_seed(monkeypatch):
    config = demo._configure("recall-ovq", 5, is_quick=False)
    assert config == demo.get_recipe("recall-ovq").override(["train.seed=5"])
