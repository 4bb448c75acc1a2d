"""Several processes: the losses of one, sharded or not, and going on with another number of them.

FSDP2 runs here on the CPU, by gloo.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from tests.processes import made_once, run_ranks
from tests.tiny import TINY, losses
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ovq.cli import main
from ovq.hf import OVQForCausalLM
from ovq.hf.block import OVQMLP
from ovq.runtime.progress import Reporter
from ovq_lab.train import loop
from ovq_lab.train.checkpoints import SEAL_FILE, fault
from ovq_lab.train.recipes import get_recipe

STEPS = 4
SETTINGS = [
    *TINY,
    f"train.steps={STEPS}",
    # A slot for every token: no decision hangs on the rounding, in which numbers of processes differ.
    "model.num_slots=32",
    "model.growth=immediate",
]
FSDP = "train.sharding=fsdp"
TIED = "model.tie_word_embeddings=true"
CHECKPOINTING = "train.use_gradient_checkpointing=true"
BFLOAT16 = "train.precision=bfloat16"


def config(*settings):
    return get_recipe("recall-ovq").override([*SETTINGS, *settings])


def train_here(out, *settings):
    with Reporter(Console(quiet=True)) as reporter:
        loop.train(config(*settings), out, reporter=reporter)
    return losses(out)


def train_all(rank, folder, runs):
    """In a process of a group: train runs by name and settings, or go on with those that are there."""
    for name, settings in runs.items():
        out = folder.parent / name
        with Reporter(Console(quiet=True)) as reporter:
            if settings is None:
                model = loop.resume(out, reporter=reporter)
            else:
                model = loop.train(config(*settings), out, reporter=reporter)
        is_sharded = FSDP in (settings or [FSDP] * ("fsdp" in name))
        assert isinstance(model, FSDPModule) == is_sharded
        has_wrappers = any(isinstance(module, CheckpointWrapper) for module in model.modules())
        assert has_wrappers == (CHECKPOINTING in (settings or []))
        if is_sharded:
            weight = model.get_input_embeddings().weight
            assert isinstance(weight, DTensor)
            num_ranks = int(os.environ["WORLD_SIZE"])
            assert weight.to_local().numel() * num_ranks == weight.numel()


def interrupted(whole, out):
    """A copy of a run that ended before its last checkpoint."""
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}"))
    (out / "trainer_state.json").unlink()
    assert losses(out / f"checkpoint-{STEPS - 2}") == losses(whole)[: STEPS - 2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of all runs: of one process and of two, whole ones and ones that another number ended."""
    return made_once(tmp_path_factory, "runs-of-processes", make_runs)


def make_runs(root):
    for name in ("a", "b", "c"):
        (root / name).mkdir()
    run_ranks(train_all, 1, root / "a", {"fsdp 1": [FSDP]})
    interrupted(root / "fsdp 1", root / "fsdp 1, then 2")
    two = {
        "ddp 2": [],
        "fsdp 2": [FSDP],
        "fsdp 2, tied, checkpointing": [FSDP, TIED, CHECKPOINTING, "train.micro_batches=2"],
        "fsdp 2, bfloat16": [FSDP, BFLOAT16],
        "fsdp 1, then 2": None,
    }
    run_ranks(train_all, 2, root / "b", two)
    interrupted(root / "fsdp 2", root / "fsdp 2, then 1")
    interrupted(root / "ddp 2", root / "ddp 2, then 1")
    run_ranks(train_all, 1, root / "c", {"fsdp 2, then 1": None, "ddp 2, then 1": None})


@pytest.mark.parametrize("name", ["fsdp 1, then 2", "fsdp 2, then 1", "ddp 2, then 1"])
def test_another_number_of_processes_goes_on_where_the_run_ended(runs, name):
    """One that begins anew would have the same losses, but write every checkpoint again."""
    before, after = (
        runs / folder / f"checkpoint-{STEPS - 2}" / SEAL_FILE for folder in (name.partition(",")[0], name)
    )
    assert before.stat().st_mtime_ns == after.stat().st_mtime_ns
    assert fault(runs / name / f"checkpoint-{STEPS}") is None


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the run of one process that nothing is done to."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train_here(out)
    return out


@pytest.mark.parametrize(
    "name", ["ddp 2", "fsdp 1", "fsdp 2", "fsdp 1, then 2", "fsdp 2, then 1", "ddp 2, then 1"]
)
def test_any_number_of_processes_has_the_losses_and_the_model_of_one(runs, alone, name):
    assert len(losses(alone)) == STEPS
    torch.testing.assert_close(losses(runs / name), losses(alone), rtol=1e-5, atol=0)
    ours, expected = (OVQForCausalLM.from_pretrained(out).state_dict() for out in (runs / name, alone))
    first = loop.build_model(config()).state_dict()
    for weight, value in expected.items():
        # AdamW divides by the size of gradients, and blows up the rounding of those that are near zero.
        moved = (value - first[weight]).norm()
        assert (ours[weight] - value).norm() < 0.02 * moved, weight


def test_tied_weights_checkpointed_activations_and_micro_batches(runs, tmp_path):
    found = losses(runs / "fsdp 2, tied, checkpointing")
    torch.testing.assert_close(found, train_here(tmp_path / "run", TIED), rtol=1e-5, atol=0)
    saved = OVQForCausalLM.from_pretrained(runs / "fsdp 2, tied, checkpointing")
    assert saved.lm_head.weight is saved.model.embed_tokens.weight


def test_mixed_precision_is_near_float32(runs, alone):
    rounded = losses(runs / "fsdp 2, bfloat16")
    assert rounded != losses(alone)
    torch.testing.assert_close(rounded, losses(alone), rtol=0.03, atol=0)
    # The losses themselves are not rounded.
    assert any(torch.tensor(loss).bfloat16().item() != loss for loss in rounded)
    assert OVQForCausalLM.from_pretrained(runs / "fsdp 2, bfloat16").dtype == torch.float32


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0/__1_0.distcp", "optimizer_0/.metadata"])
def test_a_seal_covers_every_part_of_a_sharded_checkpoint(runs, tmp_path, name):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(runs / "fsdp 2" / f"checkpoint-{STEPS}", checkpoint)
    assert fault(checkpoint) is None
    data = bytearray((checkpoint / name).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / name).write_bytes(bytes(data))
    assert fault(checkpoint) == f"{name}: expected the SHA-256 of its seal, found another"
    (checkpoint / name).unlink()
    assert fault(checkpoint) == f"{name}: expected a file, found none"


def test_checkpointed_activations_change_nothing(alone, tmp_path, monkeypatch):
    forward, num_calls = OVQMLP.forward, []
    monkeypatch.setattr(OVQMLP, "forward", lambda *args, **kw: (num_calls.append(1), forward(*args, **kw))[1])
    assert train_here(tmp_path / "run", CHECKPOINTING) == losses(alone)
    # Each of the two layers once more in the backward pass.
    assert len(num_calls) == STEPS * 2 * 2


@pytest.mark.slow
def test_torchrun_trains_a_sharded_model_that_can_be_evaluated(alone, tmp_path, capsys):
    """As a user starts it."""
    sets = [argument for setting in [*SETTINGS, FSDP] for argument in ("--set", setting)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "ovq", "train", "recall-ovq", *sets, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"Saved the model and its configuration in {tmp_path}/run. Test it: ovq eval --model {tmp_path}/run "
        "--merge existing,nearest"
    ]
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone), rtol=1e-5, atol=0)
    assert (tmp_path / "run" / f"checkpoint-{STEPS}" / "pytorch_model_fsdp_0").is_dir()
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--model", str(tmp_path / "run"), "--lengths", "32", "--examples", "4"])
    assert not ended.value.code
    assert "recall at 32 tokens" in capsys.readouterr().out


def test_sharding_needs_a_launcher_and_a_model_that_can_be_sharded(tmp_path):
    with pytest.raises(ValueError, match=r"train.sharding: expected none or fsdp, found 'zero'"):
        config("train.sharding=zero")
    with pytest.raises(ValueError, match=r"train.sharding: expected none with the mixer 'vq'"):
        get_recipe("recall-vq").override([FSDP])
    with pytest.raises(ValueError, match=r"train.sharding: expected a run started by torchrun"):
        train_here(tmp_path / "run", FSDP)
