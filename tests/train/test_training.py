"""The training loop: what it learns, what it leaves behind, and that it resumes to the same losses."""

import json
import math
import shutil

import pytest
import torch
from rich.console import Console
from tests.tiny import losses
from tests.train.text_common import quiet
from torch.utils.data import DataLoader

from ovq.hf import OVQForCausalLM
from ovq.runtime.progress import Reporter
from ovq_lab.mixers import MIXERS
from ovq_lab.tasks import IGNORE_INDEX, RecallTask
from ovq_lab.train import loop
from ovq_lab.train.checkpoints import newest_checkpoint, seal
from ovq_lab.train.config import ModelArgs, RunConfig, TrainArgs
from ovq_lab.train.data import CurriculumDataset
from ovq_lab.train.recipes import get_recipe


def tiny_config(**train):
    fields = {"steps": 6, "batch_size": 4, "lengths": (16, 32), "length_shares": (0.5, 0.5), "log_every": 1}
    return RunConfig(
        task=RecallTask(vocab_size=20, num_pairs=3),
        model=ModelArgs(hidden_size=16, intermediate_size=16, sliding_window=4, num_slots=4, chunk_size=8),
        train=TrainArgs(warmup_steps=2, **(fields | train)),
    )


def test_the_learning_rate_falls_in_a_line_to_zero(tmp_path):
    loop.train(tiny_config(learning_rate_decay="linear", learning_rate=4e-3), tmp_path, reporter=quiet())
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates == pytest.approx([0, 2e-3, 4e-3, 3e-3, 2e-3, 1e-3])


def test_losses_of_a_run_that_diverges_are_recorded_as_they_are(tmp_path):
    loop.train(tiny_config(learning_rate=1e30, log_every=2), tmp_path, reporter=quiet())
    recorded = losses(tmp_path)
    assert math.isfinite(recorded[0])
    assert math.isnan(recorded[-1])


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_weight_decay_acts_on_matrices_alone(mixer, tmp_path):
    """Temperatures, logarithms of decay rates, skips and norms are vectors, which their authors exempt."""
    config = tiny_config(weight_decay=0.5, learning_rate=1e-9).override([f"model.mixer_types={mixer}"])
    trainer = loop.SealingTrainer(
        model=loop.build_model(config), args=loop._training_arguments(config, tmp_path, is_carrying=False)
    )
    decayed, kept = ({id(p) for p in group["params"]} for group in trainer.create_optimizer().param_groups)
    named = dict(trainer.model.named_parameters())
    assert {name for name, p in named.items() if id(p) in kept} >= {
        name for name, p in named.items() if p.dim() < 2 or name.endswith("_bias")
    }
    matrices = {
        name for name, p in named.items() if p.dim() > 1 and not name.endswith(("dt_bias", "ridge_bias"))
    }
    assert {name for name, p in named.items() if id(p) in decayed} == matrices


def test_batches_follow_the_curriculum_whoever_takes_them():
    data = CurriculumDataset(tiny_config())
    whole = [data.__getitems__(range(4 * step, 4 * step + 4)) for step in range(6)]
    assert [tuple(batch["input_ids"].shape) for batch in whole] == [(4, 16)] * 3 + [(4, 32)] * 3
    task = tiny_config().task.at_length(16)
    built = task.build(0, indices=range(4), split="train")
    assert torch.equal(whole[0]["input_ids"], torch.from_numpy(built.inputs))
    assert torch.equal(whole[0]["labels"], torch.from_numpy(built.labels))
    # Micro-batches, of one process or of several, are the parts of the same steps.
    halves = list(DataLoader(data, batch_size=2, collate_fn=lambda batch: batch))
    assert len(data) == 24
    assert len(halves) == 12
    for step, batch in enumerate(whole):
        parts = halves[2 * step : 2 * step + 2]
        for name in ("input_ids", "labels"):
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), batch[name])


def test_a_batch_never_mixes_lengths():
    with pytest.raises(AssertionError, match=r"one length, not of \[16, 32\]"):
        CurriculumDataset(tiny_config()).__getitems__([11, 12])


def test_a_run_leaves_its_model_and_configuration(tmp_path):
    config = tiny_config()
    with quiet() as reporter:
        model = loop.train(config, tmp_path / "run", reporter=reporter)
    assert not model.training
    assert RunConfig.load(tmp_path / "run") == config
    assert len(losses(tmp_path / "run")) == config.train.steps
    saved = OVQForCausalLM.from_pretrained(tmp_path / "run")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], weight, rtol=0, atol=0)
    assert saved.config.num_slots == 4
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert modes["model.safetensors"] == modes["config.json"]
    with pytest.raises(ValueError, match=r"--out: expected a folder without a run .*found .*run_config.json"):
        loop.train(config, tmp_path / "run", reporter=reporter)


def test_a_model_in_the_folder_is_not_overwritten(tmp_path):
    loop.build_model(tiny_config()).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with quiet() as reporter, pytest.raises(ValueError, match="--out: expected a folder without a model"):
        loop.train(tiny_config(seed=1), tmp_path, reporter=reporter)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_checkpoints_of_others_are_not_removed(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    with quiet() as reporter, pytest.raises(ValueError, match="--out: expected a folder without checkpoints"):
        loop.train(tiny_config(), tmp_path, reporter=reporter)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-500"]


def test_the_configuration_is_there_before_training_starts(tmp_path, monkeypatch):
    config = tiny_config()

    def fail(*_args, **_kwargs):
        assert RunConfig.load(tmp_path / "run") == config
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.SealingTrainer, "train", fail)
    with quiet() as reporter, pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run", reporter=reporter)


def test_training_learns(tmp_path):
    config = tiny_config(steps=150, batch_size=32, lengths=(16,), length_shares=(1.0,), learning_rate=1e-2)
    config = config.override(["model.hidden_size=32"])
    with quiet() as reporter:
        loop.train(config, tmp_path, reporter=reporter)
    measured = losses(tmp_path)
    # Guessing one of 9 values costs ln 9 = 2.2, one of the 3 in the context ln 3 = 1.1.
    assert 2.0 < measured[0] < 3.5
    assert measured[-1] < 0.8


def test_logits_are_computed_where_there_are_targets_alone(tmp_path, monkeypatch):
    num_rows = []
    build = loop.build_model

    def watched(config, checkpoint):
        model = build(config, checkpoint)
        model.lm_head.register_forward_hook(lambda module, args, logits: num_rows.append(len(logits)))
        return model

    monkeypatch.setattr(loop, "build_model", watched)
    config = tiny_config()
    loop.train(config, tmp_path, reporter=quiet())
    data = CurriculumDataset(config)
    batches = [data.__getitems__(range(4 * step, 4 * step + 4)) for step in range(6)]
    assert num_rows == [int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches]


def test_the_seed_decides_the_run(tmp_path):
    with quiet() as reporter:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            loop.train(tiny_config(seed=seed, steps=2), tmp_path / name, reporter=reporter)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_resumed_run_is_bit_identical(tmp_path, micro_batches, monkeypatch):
    config = tiny_config(save_every=2, micro_batches=micro_batches)
    resumed_out = tmp_path / "resumed"
    built = []
    build = CurriculumDataset.__getitems__
    with quiet() as reporter:
        whole = loop.train(config, tmp_path / "whole", reporter=reporter)
        # Step 4 lies within the second length.
        config.save(resumed_out)
        shutil.copytree(tmp_path / "whole" / "checkpoint-4", resumed_out / "checkpoint-4")
        monkeypatch.setattr(
            CurriculumDataset,
            "__getitems__",
            lambda data, indices: (built.extend(indices), build(data, indices))[1],
        )
        resumed = loop.resume(resumed_out, reporter=reporter)
    # What was trained on before is not even built again.
    assert built == list(range(16, 24))
    assert losses(resumed_out) == losses(tmp_path / "whole")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_run_goes_on_with_the_sizes_that_it_began_with(tmp_path, monkeypatch):
    config = tiny_config(save_every=2).override(["model.mixer_types=ovq,gated_deltanet"])
    with quiet() as reporter:
        with monkeypatch.context() as earlier:
            earlier.setattr(loop, "equal_sizes", lambda config: {"delta_value_dim": 5})
            whole = loop.train(config, tmp_path / "whole", reporter=reporter)
        config.save(tmp_path / "resumed")
        shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
        resumed = loop.resume(tmp_path / "resumed", reporter=reporter)
    assert resumed.config.delta_value_dim == 5 != loop.model_config(config).delta_value_dim
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path):
    said = []
    assert newest_checkpoint(tmp_path, said.append) is None
    for step in (2, 9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        seal(folder)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert newest_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-10"
    assert said == [
        f"{tmp_path}/checkpoint-11: skipped, as it is incomplete or damaged "
        "(it was never finished: it has no seal.json)"
    ]


def test_the_seed_and_the_configuration_decide_the_first_weights():
    one, same, other = (loop.build_model(tiny_config(seed=seed)) for seed in (0, 0, 1))
    embeddings = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])
    assert 0.9 < embeddings[0].std() < 1.1
    smaller = loop.build_model(
        tiny_config().override(["model.embedding_std=0.1", "model.initializer_range=0.5"])
    )
    assert 0.09 < smaller.get_input_embeddings().weight.std() < 0.11
    assert 0.45 < smaller.get_output_embeddings().weight.std() < 0.55


def test_micro_batches_change_the_memory_and_not_the_result(tmp_path):
    with quiet() as reporter:
        for parts in (1, 4):
            loop.train(tiny_config(micro_batches=parts), tmp_path / str(parts), reporter=reporter)
    torch.testing.assert_close(losses(tmp_path / "1"), losses(tmp_path / "4"), rtol=1e-4, atol=1e-4)


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with (
        quiet() as reporter,
        pytest.raises(ValueError, match=r"train.batch_size: expected a multiple of 3 .*found 4"),
    ):
        loop.train(tiny_config(), tmp_path, reporter=reporter)


def test_there_must_be_something_to_resume(tmp_path):
    with quiet() as reporter:
        with pytest.raises(ValueError, match="expected the folder of a training run"):
            loop.resume(tmp_path, reporter=reporter)
        (tmp_path / "checkpoint-3").mkdir()
        with pytest.raises(ValueError, match="expected the folder of a training run"):
            loop.resume(tmp_path, reporter=reporter)


def test_a_model_that_cannot_be_is_refused_before_anything_is_read_or_written(tmp_path):
    config = get_recipe("lm-ovq").override([f"task.dataset={tmp_path}/none", "model.mixer_types=ovk"])
    with quiet() as reporter, pytest.raises(ValueError, match=r"mixer_types: expected a mixer among .*'ovk'"):
        loop.train(config, tmp_path / "run", reporter=reporter)
    assert not (tmp_path / "run").exists()


def test_progress_shows_step_length_and_loss(tmp_path):
    console = Console(record=True, force_terminal=False, width=120, stderr=True)
    with Reporter(console) as reporter:
        loop.train(tiny_config(), tmp_path, reporter=reporter, label="train tiny")
    lines = console.export_text().splitlines()
    assert lines[0].startswith("train tiny: 0/6")
    assert lines[-1].startswith("train tiny: 6/6 (loss ")
    assert "length 32" in lines[-1]


def test_bfloat16_training_is_near_float32(tmp_path):
    with quiet() as reporter:
        model = loop.train(tiny_config(precision="bfloat16"), tmp_path / "bfloat16", reporter=reporter)
        loop.train(tiny_config(), tmp_path / "float32", reporter=reporter)
    assert model.dtype == torch.float32
    rounded, exact = losses(tmp_path / "bfloat16"), losses(tmp_path / "float32")
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.03)


def test_labels_reach_the_loss(tmp_path):
    # The logged loss is the mean over asked tokens of the model's own loss: computed here by hand for step 1.
    config = tiny_config(steps=1, lengths=(16,), length_shares=(1.0,))
    model = loop.build_model(config)
    batch = CurriculumDataset(config).__getitems__(range(4))
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    asked = targets != IGNORE_INDEX
    expected = torch.nn.functional.cross_entropy(logits[asked], targets[asked])
    with quiet() as reporter:
        loop.train(config, tmp_path, reporter=reporter)
    torch.testing.assert_close(losses(tmp_path)[0], expected.item(), rtol=1e-4, atol=1e-4)
