"""The lm-evaluation-harness takes OVQ models as they are: local tasks, without the network."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from tests.convert.common import SIZES
from tests.test_cli import fail, run
from tests.tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from ovq.convert import attach
from ovq.hf.streaming import stream_tokens
from ovq_lab.eval.harness import evaluate_tasks
from ovq_lab.eval.report import results_as_markdown
from ovq_lab.text import byte_tokenizer

BYTES = byte_tokenizer()
TASKS = ["local_likelihood", "local_generation", "local_choice"]
BARS = ["Tokenizing inputs", "Running loglikelihood requests", "Running generate_until requests"]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/data.jsonl
  cache_dir: {folder}/cache
test_split: test
doc_to_text: "{{{{text}}}}"
metric_list:
  - metric: {metric}
    aggregation: {aggregation}
    higher_is_better: true
"""
YAML = {
    "local_likelihood": ("acc", 'output_type: loglikelihood\ndoc_to_target: "{{answer}}"'),
    "local_generation": (
        "exact_match",
        'output_type: generate_until\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}",
    ),
    "local_rolling": ("word_perplexity", "output_type: loglikelihood_rolling\ndoc_to_target: '{{text}}'"),
    "local_choice": ("acc", "output_type: multiple_choice\ndoc_to_target: label\ndoc_to_choice: choices"),
}


@pytest.fixture(scope="module")
def model():
    model = tiny_model(num_slots=6, chunk_size=4, sliding_window=4, initializer_range=0.5).double()
    with torch.no_grad():
        # It says characters that are seen alone, so that text gives its tokens back.
        model.lm_head.weight[:33] = model.lm_head.weight[127:] = 0
    return model


@pytest.fixture(scope="module")
def documents(model):
    """Questions of unequal length; half of the answers are what the model would say."""
    random = np.random.default_rng(0)
    rows = []
    # More than one batch of 4, and the last one is not full.
    for place in range(6):
        text = bytes(random.integers(97, 123, random.integers(3, 30)).tolist()).decode()
        stream = stream_tokens(model, list(text.encode()))
        said = BYTES.decode([next(stream) for _ in range(6)])
        row = {"text": text, "answer": said if place % 2 else "no"}
        rows.append(row | {"choices": [" red", " green light", " b"], "label": int(random.integers(3))})
    return rows


@pytest.fixture(scope="module")
def folder(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, (metric, lines) in YAML.items():
        aggregation = "weighted_perplexity" if metric == "word_perplexity" else "mean"
        common = COMMON.format(folder=folder, metric=metric, aggregation=aggregation)
        # The answers follow without a space, as the model says them.
        (folder / f"{name}.yaml").write_text(f'task: {name}\ntarget_delimiter: ""\n{lines}{common}')
    return folder


def measure(model, folder, tasks=TASKS, **options):
    options = {"include_path": folder, "include_defaults": False, "max_length": 256, **options}
    return evaluate_tasks(model, BYTES, tasks, **options)


@pytest.fixture(scope="module")
def results(model, folder):
    return {batch_size: measure(model, folder, batch_size=batch_size) for batch_size in (1, 4)}


def scores(results):
    names = {"local_likelihood": "acc", "local_generation": "exact_match", "local_choice": "acc"}
    return {task: results["results"][task][f"{name},none"] for task, name in names.items()}


def answers(results, task):
    """What came of every request, by document."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [[response[0] for response in sample["resps"]] for sample in samples]


def test_batch_sizes_give_the_same_scores(results):
    assert scores(results[1]) == scores(results[4])
    assert answers(results[1], "local_generation") == answers(results[4], "local_generation")
    for task in ("local_likelihood", "local_choice"):
        for one, other in zip(answers(results[1], task), answers(results[4], task), strict=True):
            for (likelihood, is_greedy), (other_likelihood, other_is_greedy) in zip(one, other, strict=True):
                assert likelihood == pytest.approx(other_likelihood, abs=1e-3)
                assert is_greedy == other_is_greedy


def by_hand(model, text, continuation):
    ids = torch.tensor([*text.encode(), *continuation.encode()])
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0].float()
    likelihoods = logits.log_softmax(-1)[len(text) - 1 : -1]
    targets = ids[len(text) :]
    return float(likelihoods.gather(1, targets[:, None]).sum()), bool(
        (likelihoods.argmax(-1) == targets).all()
    )


def test_scores_are_those_by_hand(model, documents, results):
    assert answers(results[4], "local_likelihood") == [
        [pytest.approx(by_hand(model, row["text"], row["answer"]), abs=1e-3)] for row in documents
    ]
    right = []
    for row in documents:
        likelihoods = [by_hand(model, row["text"], choice)[0] for choice in row["choices"]]
        right.append(int(np.argmax(likelihoods)) == row["label"])
    found = scores(results[4])
    assert found["local_choice"] == pytest.approx(np.mean(right))
    # Every second answer is the model's own.
    assert found["local_generation"] == found["local_likelihood"] == 0.5


def test_a_converted_model_is_scored_with_its_memory(documents, folder):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 257}, eos_token_id=256)).double().eval()
    converted = attach(copy.deepcopy(plain), num_slots=4, window=8, num_sinks=1, chunk_size=4)
    found = {size: measure(converted, folder, batch_size=size) for size in (1, 4)}
    for size in (1, 4):
        assert answers(found[size], "local_likelihood") == [
            [pytest.approx(by_hand(converted, row["text"], row["answer"]), abs=1e-3)] for row in documents
        ]
    assert answers(found[1], "local_generation") == answers(found[4], "local_generation")
    # With full attention, the likelihoods are others.
    full = [by_hand(plain, row["text"], row["answer"])[0] for row in documents]
    own = [by_hand(converted, row["text"], row["answer"])[0] for row in documents]
    assert max(abs(a - b) for a, b in zip(full, own, strict=True)) > 0.1


def test_limit_and_what_is_not_there(model, folder):
    results = measure(model, folder, ["local_choice"], limit=2)
    assert len(results["samples"]["local_choice"]) == 2
    with pytest.raises(
        ValueError, match="tasks: expected names of tasks that the harness knows, found nothing"
    ):
        measure(model, folder, ["local_choice", "nothing"])
    with pytest.raises(ValueError, match="tasks: expected names of tasks that the harness knows, found none"):
        measure(model, folder, [])


def test_without_the_package(model, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install '\./lab\[harness\]'"):
        measure(model, folder)


@pytest.mark.parametrize(("tasks", "bars"), [(TASKS, BARS), (["local_rolling"], BARS[1:2])])
def test_quiet_hides_the_bars_of_the_harness(model, folder, capsys, monkeypatch, tasks, bars):
    for verbosity in ("", "quiet"):
        monkeypatch.setenv("OVQ_VERBOSITY", verbosity)
        measure(model, folder, tasks, limit=1)
        said = capsys.readouterr().err
        assert [bar in said for bar in bars] == [not verbosity] * len(bars), said


def test_the_command_line(model, folder, results, capsys, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    arguments = ["eval", "harness", "--model", tmp_path / "model", "--include-path", folder]
    arguments += ["--tasks", "local_choice, local_likelihood", "--max-length", 256, "--limit", 6]
    found = json.loads(run(capsys, *arguments, "--json", "--out", tmp_path))
    for task in ("local_choice", "local_likelihood"):
        assert found[task]["acc,none"] == pytest.approx(scores(results[1])[task])
    saved = json.loads((tmp_path / "harness.json").read_text())
    assert len(saved["samples"]["local_choice"]) == 6
    table = results_as_markdown(tmp_path / "harness.json", model=tmp_path / "model")
    [line] = [line for line in table.splitlines() if "local_choice" in line]
    assert float(line.split("|")[7]) == pytest.approx(found["local_choice"]["acc,none"], abs=1e-4)
    diverged = copy.deepcopy(results[1])
    diverged["results"]["local_choice"] |= {"acc,none": math.nan, "acc_stderr,none": np.float32("nan")}
    diverged["results"]["local_likelihood"] |= {"acc,none": np.float32(0.25)}
    with monkeypatch.context() as patched:
        patched.setattr("ovq_lab.eval.harness.evaluate_tasks", lambda *_, **__: diverged)
        said = run(capsys, *arguments, "--json", "--out", tmp_path)
    for text in (said, (tmp_path / "harness.json").read_text()):
        found = json.loads(text, parse_constant=pytest.fail)
        assert found.get("results", found)["local_choice"]["acc_stderr,none"] is None
        assert found.get("results", found)["local_likelihood"]["acc,none"] == 0.25
    assert "|   NaN|" in results_as_markdown(tmp_path / "harness.json", model=tmp_path / "model")
    few = run(capsys, *arguments[:-1], 1)
    assert "local_choice" in few
    assert "acc" in few
    absent = fail(capsys, *arguments, "--include-path", tmp_path / "no")
    assert absent.startswith("include_path: expected a folder with tasks, found none at")
    wrong = fail(capsys, *arguments, "--ruler-lengths", "x")
    assert wrong.startswith("--ruler-lengths: expected positive integers")
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    assert "expected a tokenizer beside the model, found none" in fail(capsys, *arguments)
