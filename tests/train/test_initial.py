"""Runs that begin with the weights of a saved model, and models with which none can begin."""

import dataclasses
import re
import shutil

import pytest
import torch
from rich.console import Console
from tests.test_cli import fail, run
from tests.tiny import losses
from tests.train.text_common import quiet, tiny_config, write_texts
from transformers import LlamaConfig, LlamaForCausalLM

from ovq.hf import OVQForCausalLM
from ovq.runtime.progress import Reporter
from ovq_lab.tasks import RecallTask
from ovq_lab.train.config import ModelArgs, RunConfig, TrainArgs
from ovq_lab.train.initial import check_initial
from ovq_lab.train.loop import build_model, model_config, resume, train

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_slots": 4, "chunk_size": 4, "sliding_window": 4}


def make_config(*, init_from=None, model=None, steps=3, **fields):
    lengths = {"lengths": (16,), "length_shares": (1.0,), "batch_size": 4}
    init_from = None if init_from is None else str(init_from)
    train = TrainArgs(steps=steps, log_every=1, warmup_steps=0, init_from=init_from, **lengths, **fields)
    return RunConfig(task=RecallTask(), model=ModelArgs(**SIZES | (model or {})), train=train)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("first")
    train(make_config(steps=6, learning_rate=1e-2), folder, reporter=quiet())
    return folder


def equal(ours, theirs):
    return all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_a_run_begins_where_the_model_is(first, tmp_path):
    # With a learning rate that changes next to nothing, the weights stay.
    still = {"learning_rate": 1e-30, "seed": 1}
    begun = train(make_config(init_from=first, **still), tmp_path / "a", reporter=quiet())
    saved = OVQForCausalLM.from_pretrained(first).state_dict()
    assert equal(begun.state_dict(), saved)
    new = train(make_config(**still), tmp_path / "b", reporter=quiet())
    assert not equal(new.state_dict(), saved)
    # The seed still decides on the data: with it, the losses are those of this model on them.
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_the_optimizer_is_new(first, tmp_path):
    trained = train(make_config(init_from=first), tmp_path / "a", reporter=quiet())
    config = make_config()
    model = build_model(config)
    model.load_state_dict(OVQForCausalLM.from_pretrained(first).state_dict())
    model.save_pretrained(tmp_path / "copy")
    again = train(make_config(init_from=tmp_path / "copy"), tmp_path / "b", reporter=quiet())
    assert equal(trained.state_dict(), again.state_dict())
    assert not equal(trained.state_dict(), model.state_dict())


def test_a_resumed_run_goes_on_from_its_checkpoint_not_from_the_model(first, tmp_path):
    shutil.copytree(first, tmp_path / "model")
    config = make_config(init_from=tmp_path / "model", steps=4, save_every=2)
    whole = train(config, tmp_path / "whole", reporter=quiet())
    config.save(tmp_path / "part")
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "part" / "checkpoint-2")
    # Stopped before the first checkpoint, a run begins with the weights again.
    config.save(tmp_path / "early")
    assert equal(resume(tmp_path / "early", reporter=quiet()).state_dict(), whole.state_dict())
    shutil.rmtree(tmp_path / "model")
    assert equal(resume(tmp_path / "part", reporter=quiet()).state_dict(), whole.state_dict())


def test_weights_in_another_dtype_are_trained_in_float32(first, tmp_path):
    OVQForCausalLM.from_pretrained(first).bfloat16().save_pretrained(tmp_path / "half")
    model = train(make_config(init_from=tmp_path / "half"), tmp_path / "run", reporter=quiet())
    assert model.dtype == torch.float32


def test_what_may_differ_is_said(first, tmp_path):
    with open(tmp_path / "said", "w") as file, Reporter(Console(file=file, width=200)) as reporter:
        config = make_config(init_from=first, model={"num_slots": 8, "merge": "nearest", "chunk_size": 8})
        model = train(config, tmp_path / "run", reporter=reporter)
    said = (tmp_path / "said").read_text()
    assert f"train.init_from: num_slots is 8 in this run, and was 4 in {first}" in said
    assert f"train.init_from: merge is nearest in this run, and was existing in {first}" in said
    assert (model.config.num_slots, model.config.merge) == (8, "nearest")


def test_what_is_set_for_evaluation_may_differ(first, tmp_path):
    model = OVQForCausalLM.from_pretrained(first)
    model.set_merge("nearest")
    model.set_logn_length(32)
    model.set_state_dtype("int8")
    model.save_pretrained(tmp_path / "set")
    begun = train(make_config(init_from=tmp_path / "set"), tmp_path / "run", reporter=quiet())
    assert (begun.config.logn_length, begun.config.state_dtype) == (None, "float32")


def test_fields_of_the_mixers_that_there_are_must_agree_or_are_named(tmp_path):
    mixers = {"mixer_types": ("sink_attention", "mamba2")}
    build_model(make_config(model=mixers)).save_pretrained(tmp_path)

    def checked(**changes):
        return check_initial(str(tmp_path), model_config(make_config(model=mixers | changes)))

    # Other mixers' fields, which differ too, are not the model's.
    assert checked(sink_window=9, kvm_chunk_size=2) == [
        f"sink_window is 9 in this run, and was 6 in {tmp_path}"
    ]
    with pytest.raises(
        ValueError, match=r"mamba_state_size 5, .* found 7 in .*--set model.mamba_state_size=7"
    ):
        checked(mamba_state_size=5)
    with pytest.raises(ValueError, match=r"mamba_head_dim 5, .* model.mamba_head_dim="):
        checked(mixer_fields=("mamba_head_dim=5",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"hidden_size": 32},
            "hidden_size 32, as in this run, found 16 in {first} (--set model.hidden_size=16)",
        ),
        (
            {"mixer_types": ("ovq",)},
            "mixer_types ['ovq'], as in this run, found ['sliding_attention', 'ovq'] in {first} "
            "(--set model.mixer_types=sliding_attention,ovq)",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True, as in this run, found False in {first}"),
    ],
    ids=str,
)
def test_another_architecture_is_refused_and_nothing_is_left(first, tmp_path, changes, said):
    with pytest.raises(ValueError, match=re.escape(said.format(first=first))):
        train(make_config(init_from=first, model=changes), tmp_path / "run", reporter=quiet())
    assert not (tmp_path / "run").exists()


def test_the_slots_of_vq_are_weights(tmp_path):
    vq = {"mixer_types": ("sliding_attention", "vq")}
    train(make_config(model=vq), tmp_path / "vq", reporter=quiet())
    with pytest.raises(ValueError, match="expected a model with num_slots 8, as in this run, found 4"):
        train(
            make_config(init_from=tmp_path / "vq", model=vq | {"num_slots": 8}),
            tmp_path / "a",
            reporter=quiet(),
        )
    again = train(
        make_config(init_from=tmp_path / "vq", model=vq, learning_rate=1e-30),
        tmp_path / "b",
        reporter=quiet(),
    )
    assert again.config.mixer_types[-1] == "vq"


def test_missing_weights_are_refused(first, tmp_path):
    from safetensors.torch import load_file, save_file

    OVQForCausalLM.from_pretrained(first).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"expected the weights of the model that config\.json describes, found no"
    ):
        train(make_config(init_from=tmp_path / "model"), tmp_path / "run", reporter=quiet())


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected the folder of a saved model, found no config\.json in"):
        train(make_config(init_from=tmp_path), tmp_path / "run", reporter=quiet())
    assert not list(tmp_path.iterdir())


def test_a_path_without_a_folder_is_no_name_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"folder of a model or a name on the hub, found '/.*no'"):
        check_initial(str(tmp_path / "no"), model_config(make_config()))


def test_a_model_that_cannot_be_fetched_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"train\.init_from: expected a saved model, found 'runs-no' \("):
        check_initial("runs-no", model_config(make_config()))


def test_a_model_that_reads_other_tokens_is_refused(tmp_path, monkeypatch):
    texts = write_texts(tmp_path, monkeypatch)
    config = tiny_config(texts, task={"tokenizer": "bpe:260"})
    train(config, tmp_path / "one", reporter=quiet())
    for path in texts.iterdir():
        path.write_text("quite other words, with other pairs of letters " * 9)

    with pytest.raises(
        ValueError, match=r"vocab_size 257, .*, found 260 .* \(for text: --set task.tokenizer="
    ):
        train(tiny_config(texts, init_from=str(tmp_path / "one")), tmp_path / "two", reporter=quiet())

    def begun(**task):
        changed = tiny_config(texts, task={"tokenizer": "bpe:260", **task}, init_from=str(tmp_path / "one"))
        return train(changed, tmp_path / "two", reporter=quiet())

    with pytest.raises(ValueError, match="expected a model with the tokenizer of this run, found another"):
        begun()
    model = begun(tokenizer=str(tmp_path / "one"))
    assert model.config.vocab_size == 260


def test_on_the_command_line(first, tmp_path, capsys, monkeypatch):
    config = make_config(learning_rate=1e-30)
    (tmp_path / "config.json").write_text(config.to_json())
    monkeypatch.chdir(first.parent)
    monkeypatch.setenv("HOME", str(first.parent))
    arguments = ["train", tmp_path / "config.json", "--out", tmp_path / "set"]
    run(capsys, *arguments, "--set", f"train.init_from=~/{first.name}")
    arguments = ["train", tmp_path / "config.json", "--out", tmp_path / "run", "--init-from"]
    run(capsys, *arguments, first.name)
    # A run can be resumed from any folder.
    for name in ("set", "run"):
        assert RunConfig.load(tmp_path / name).train.init_from == str(first)
    ours, theirs = (OVQForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "run", first))
    assert equal(ours, theirs)
    assert fail(capsys, "train", "--resume", "--out", tmp_path / "run", "--init-from", first).startswith(
        "--resume"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path / "llama")
    arguments[3] = tmp_path / "other"
    # transformers would warn before it refuses the model.
    monkeypatch.setattr("ovq_lab.train.initial.OVQConfig.from_pretrained", lambda _: pytest.fail("loaded"))
    assert "found 'llama' in" in fail(capsys, *arguments, tmp_path / "llama")


def test_a_field_says_where_a_run_began():
    assert dataclasses.asdict(make_config(init_from="x").train)["init_from"] == "x"
    assert RunConfig.from_json(make_config(init_from="x").to_json()).train.init_from == "x"
