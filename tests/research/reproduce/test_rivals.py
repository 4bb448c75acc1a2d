"""OVQ beside its rivals: who is compared, at which sizes, and how trials and needles are judged."""

import dataclasses

import pytest
import torch

from ovq.hf import OVQForCausalLM
from ovq_lab.figures import rivals
from ovq_lab.figures.engine import reproduce
from ovq_lab.figures.evaluations import NeedlesEvaluation
from ovq_lab.figures.figures import GROUPS, get_figure
from ovq_lab.figures.page import write_report
from ovq_lab.figures.plan import Trial, count_runs, run_name
from ovq_lab.figures.presets import CPU, GPU
from ovq_lab.figures.rivals import RIVALS
from ovq_lab.plots.draw import points
from ovq_lab.train.config import RunConfig
from ovq_lab.train.loop import model_config
from tests.research.reproduce.common import TINY, books, run_here, undrawn, workshop
from tests.test_cli import fail, run

FIGURES = GROUPS["rivals"]
# Their slots are as many bytes as they can be; the others have what equal parameters allow.
HAVE_SLOTS = (
    "OVQ, nearest",
    "OVQ, merge gate",
    "OVQ, forget gate",
    "KVM",
    "window and sinks",
)


def models_of(name, preset=CPU):
    """The untrained model of each line, without its weights."""
    with torch.device("meta"):
        return {
            line.label: OVQForCausalLM(model_config(line.config)) for line in get_figure(name, preset).lines
        }


@pytest.mark.parametrize("name", FIGURES)
def test_each_rival_has_a_line_and_ovq_four(name):
    lines = {line.label: line for line in get_figure(name, TINY).lines}
    gated = [lines.pop(label) for label in [*lines] if "output gates" in label]
    assert {line.config.mixer for line in lines.values()} == {*RIVALS}
    assert [line.config.mixer for line in gated] == (["ovq", "fox"] if name.startswith("rivals-lm-") else [])
    assert all(model_config(line.config).output_gate for line in gated)
    # With what was chosen without gates.
    full, ovq = (run_name(line.config) for line in [*lines.values()][:2])
    assert [run_name(line.swept) for line in gated] == ([ovq, full] if gated else [])
    ours = [*lines.values()][1:5]
    gates = [(line.config.model.merge_gate, line.config.model.forget_gate) for line in ours]
    assert gates == [(False, False)] * 2 + [(True, False), (False, True)]
    assert [line.evaluations[0].merge for line in ours] == [None, *["nearest"] * 3]
    paper, nearest, *gated = ours
    # Two lines of one model, and two that take over what was chosen for it.
    assert run_name(paper.config) == run_name(nearest.config)
    assert len({run_name(line.config) for line in ours}) == 3
    assert {run_name(line.swept) for line in gated} == {run_name(paper.config)}


@pytest.mark.parametrize("name", [*FIGURES[:1], "rivals-mqar", *FIGURES[4:]])
def test_states_have_equal_bytes_and_models_equal_parameters(name):
    models = models_of(name)
    sizes = {label: model.num_parameters() for label, model in models.items()}
    assert max(sizes.values()) < 1.03 * min(sizes.values())
    [ours] = [model for label, model in models.items() if label.startswith("OVQ, nearest")]
    num_bytes = ours.state_bytes(2**16)
    for label, model in models.items():
        share = model.state_bytes(2**16) / num_bytes
        if label.startswith(HAVE_SLOTS):
            assert share == pytest.approx(1, abs=0.02), label
        # By the paper's rule a dictionary approaches its bound.
        elif not label.startswith("full attention"):
            assert share <= 1, label


@pytest.mark.parametrize("mixer", ["gated_deltanet", "kda", "mesanet", "mamba2"])
@pytest.mark.parametrize("preset", [CPU, GPU], ids=lambda preset: preset.name)
def test_recurrent_rivals_have_the_four_taps_of_their_authors(preset, mixer):
    assert {preset.config(task, mixer).model.conv_size for task in preset.configs} == {4}


def test_raven_has_as_many_bytes_as_equal_parameters_allow():
    (((_, num_slots),),) = rivals._variants(CPU, "recall")["raven"][1:]

    def num_bytes(slots):
        with torch.device("meta"):
            model = OVQForCausalLM(model_config(CPU.config("recall", "raven", raven_slots=slots)))
        return model.state_bytes(4096)

    assert num_bytes(num_slots) > max(num_bytes(num_slots // 2), num_bytes(num_slots * 3 // 2))


def test_ways_to_set_a_mixer_up_are_tried_with_each_setting_of_the_optimizer(tmp_path, monkeypatch):
    run_here(monkeypatch)
    kvm = TINY.config("recall", "kvm", kvm_chunk_size=4)
    variants = tuple((("kvm_growth", growth),) for growth in ("plateau", "immediate"))
    whole = get_figure("recall", TINY)
    line = dataclasses.replace(whole.lines[0], label="KVM", config=kvm, trial_of=None, variants=variants)
    figure = undrawn(dataclasses.replace(whole, lines=(line,)))
    results = reproduce(figure, workshop(tmp_path))
    (entry,) = results["sweep"]
    assert list(entry["accuracies"]) == [
        f"{trial.label}, kvm_growth {growth}" for trial in TINY.trials for growth in ("plateau", "immediate")
    ]
    runs = {row["seed"]: RunConfig.load(tmp_path / "runs" / row["run"]) for row in results["rows"]}
    chosen = {f"{Trial.of(run).label}, kvm_growth {run.model.kvm_growth}" for run in runs.values()}
    assert chosen == {entry["chosen"]}
    # Four trials on the first seed, then one run on the other.
    assert len(list((tmp_path / "runs").iterdir())) == count_runs(figure, 2) == 5


def test_a_mixer_is_added_by_its_name(monkeypatch):
    monkeypatch.setattr(rivals, "RIVALS", (*RIVALS, "linear_attention"))
    assert get_figure("rivals-mqar", TINY).lines[-1].label == "linear attention"


def test_one_name_stands_for_all(capsys, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "ovq_lab.figures.engine.reproduce", lambda figure, shop, lines: made.append(figure.name)
    )
    run(capsys, "reproduce", "rivals", "--out", tmp_path)
    assert tuple(made) == FIGURES
    assert len(FIGURES) == 9
    assert fail(capsys, "reproduce", "rivals", "--lines", "KVM").endswith("beside it, found 9")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One mixer on needles and on text, one seed, and where the results are."""
    changes = books(tmp_path_factory.mktemp("books"))
    changes += ["train.steps=1", "train.warmup_steps=0", "model.mixer_types=sliding_attention,ovq"]
    configs = {name: TINY.configs[name].override(changes) for name in ("lm", "needles")}
    text = dataclasses.replace(TINY.text, length=1024, num_windows=1, num_needles=1)
    preset, out = dataclasses.replace(TINY, configs=configs, text=text), tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out / "cache"))
        patch.setattr("ovq_lab.eval.needle._EXTRA_TOKENS", 0)
        patch.setattr(rivals, "RIVALS", ("full_attention",))
        patch.setattr(rivals, "NEEDLE_FACTORS", (2,))
        run_here(patch)
        shop = workshop(out, num_seeds=1)
        results = {
            name: reproduce(get_figure(name, preset), shop) for name in ("rivals-needles", "rivals-lm")
        }
    return results, out


def test_needles_of_three_kinds_are_means_over_depths(made):
    results, out = made
    results = results["rivals-needles"]
    for panel in results["panels"][:3]:
        assert [[point.x for point in line] for line in points(results, panel).values()] == [[576]]
    found = {(row["group"][:2], row["value"], row["haystack"]) for row in results["rows"]}
    assert found == {("S1", "number", "noise"), ("S2", "number", "essay"), ("S3", "uuid", "essay")}
    assert all(set(row["by_depth"]) == {"0", "0.5", "1"} for row in results["rows"])
    for row in results["rows"]:
        assert row["generated"] == sum(row["by_depth"].values()) / 3
        num_read = len(row["by_depth"]) * row["num_examples"] * row["length"]
        assert row["microseconds_per_token"] == pytest.approx(1e6 * row["seconds"] / num_read)
    # One model for all kinds.
    assert len({row["run"] for row in results["rows"]}) == 1
    configs = [RunConfig.load(out / "runs" / row["run"]) for row in results["rows"]]
    assert {config.task.needle_values for config in configs} == {("number", "uuid")}


def test_the_lowest_loss_decides_between_trials(made):
    results, out = made
    sweep = results["rivals-lm"]["sweep"]
    [entry] = sweep
    assert len(set(entry["losses"].values())) == 2
    assert entry["chosen"] == min(entry["losses"], key=entry["losses"].get)
    assert all("accuracies" in entry for entry in results["rivals-needles"]["sweep"])
    page = write_report(out).read_text()
    assert "losses at 32 tokens" in page
    assert page.index("Needles of three kinds") < page.index("beside windows")


def test_trials_are_judged_on_other_documents_than_results(made):
    results, _ = made
    [read] = {row["source"]["dataset"] for row in results["rivals-lm"]["rows"]}
    line = get_figure("rivals-lm", CPU.on_corpus(read, 0.5)).lines[0]
    assert (line.validation.split, {each.split for each in line.evaluations}) == ("validation", {"test"})
    needles = NeedlesEvaluation(
        source=line.config.task, length=64, num_examples=1, value="uuid", haystack="noise", depths=(0.0,)
    )
    assert needles.name != dataclasses.replace(needles, haystack="essay").name
    assert "split" not in needles.as_json()


def test_trials_on_needles_are_judged_beyond_the_training_length_those_of_ovq_by_nearest():
    for line in get_figure("rivals-needles", CPU).lines:
        assert line.validation.length == 2 * CPU.train_length("needles")
        assert line.validation.merge == ("nearest" if line.config.mixer == "ovq" else None)
