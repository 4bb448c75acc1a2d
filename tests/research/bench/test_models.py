"""`ovq bench --what model`: the models are what they are called, and the report is whole."""

import json

import pytest
import torch

from ovq_lab.bench import model_suite
from ovq_lab.bench.measure import matrix_rate
from ovq_lab.bench.model_suite import ModelSuite, run_models
from ovq_lab.bench.models import MODELS, ModelWorkload
from ovq_lab.bench.show import save_figures, tables
from tests.progress import Seen


def workload(model, length=40):
    return ModelWorkload(model=model, size="2M", length=length, num_threads=torch.get_num_threads())


def test_the_models_of_a_size_have_about_as_many_parameters():
    found = {model: workload(model).num_parameters() for model in MODELS}
    assert all(abs(number / found["llama"] - 1) < 0.04 for number in found.values()), found
    assert len({type(mixer) for mixer in workload("mamba2").build().mixers()}) == 2


@pytest.mark.parametrize("model", ["llama", "full_attention", "ovq"])
def test_generation_goes_on_where_it_stopped(model):
    generate = workload(model).generation(2)
    first, second = generate(), generate()
    assert (first.shape, second.shape) == ((1, 42), (1, 44))
    assert torch.equal(second[:, :42], first)


def test_a_step_learns():
    step = workload("ovq").training()
    first = step()
    for _ in range(3):
        last = step()
    assert last < first


def test_a_report_is_whole_and_can_be_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(model_suite, "NEW_TOKENS", 2)
    # Seconds of products, and other processes, which take as long to start.
    monkeypatch.setattr(model_suite, "matrix_rate", lambda dtype: 1e11)
    monkeypatch.setattr(model_suite, "peak_bytes", lambda _, workload: {"peak_bytes": workload.length})
    suite = ModelSuite(models=("llama", "ovq"), sizes=("2M",), lengths=(32,), prompts=(16,))
    report = json.loads(json.dumps(run_models(suite, seen := Seen())))
    assert seen.done[-1] == seen.total == 3
    assert [(row["what"], row["mixer"]) for row in report["rows"]] == [
        (what, model)
        for what in ("model_training", "model_memory", "model_generate")
        for model in ("llama", "ovq")
    ]
    assert all(row["tokens_per_second"] > 0 for row in report["rows"] if row["what"] != "model_memory")
    assert len(tables(report)) == 3
    (path,) = save_figures(report, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_roof_is_not_below_the_products_of_pytorch(monkeypatch):
    of_measure = "ovq_lab.bench.measure."
    monkeypatch.setattr(of_measure + "product_loop", lambda: (lambda: None, 1e30))
    monkeypatch.setattr(of_measure + "interleaved", lambda functions, **options: [[1.0]])
    assert matrix_rate("float32") == 1e30
