"""Training survives what happens to processes and disks: kill -9, damaged checkpoints, a full disk.

The processes here are real ones, and really killed; the longest test starts them as a user does.
"""

import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from tests.processes import command
from tests.tiny import TINY, losses

from ovq.hf import OVQForCausalLM
from ovq.runtime.files import claimed
from ovq.runtime.progress import Reporter
from ovq_lab.train import loop
from ovq_lab.train.checkpoints import SEAL_FILE, fault
from ovq_lab.train.data import CurriculumDataset
from ovq_lab.train.recipes import get_recipe

STEPS = 30
SETTINGS = [*TINY, f"train.steps={STEPS}", "train.save_every=3"]
CONFIG = get_recipe("recall-ovq").override(SETTINGS)


def start(*arguments):
    """`ovq train` in a process of its own, on as many threads as the tests have."""
    return subprocess.Popen(
        [sys.executable, "-m", "ovq", "train", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def resume(out):
    """Go on to the end within this process; what was said on the way."""
    console = Console(record=True, force_terminal=False, width=1000, stderr=True)
    with Reporter(console) as reporter:
        loop.resume(out, reporter=reporter)
    return console.export_text()


@pytest.fixture
def steps_read(monkeypatch):
    """The steps whose examples this process has built: a run begun anew would have the same losses."""
    steps = []
    build = CurriculumDataset.__getitems__

    def recorded(self, indices):
        steps.append(indices[0] // CONFIG.train.batch_size)
        return build(self, indices)

    monkeypatch.setattr(CurriculumDataset, "__getitems__", recorded)
    return steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    return undisturbed(CONFIG, tmp_path_factory.mktemp("whole") / "run")


def undisturbed(config, out):
    with Reporter(Console(quiet=True)) as reporter:
        loop.train(config, out, reporter=reporter)
    assert len(losses(out)) == config.train.steps
    return out


def checkpoints(out):
    return {int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*")}


@pytest.fixture
def interrupted(whole, tmp_path):
    """A run that ended when the last two checkpoints had been written."""
    out = tmp_path / "run"
    assert checkpoints(whole) == {STEPS - 3, STEPS}
    for name in (f"checkpoint-{STEPS - 3}", f"checkpoint-{STEPS}"):
        shutil.copytree(whole / name, out / name)
    CONFIG.save(out)
    return out


def last_sealed(out):
    return max(
        (step for step in checkpoints(out) if (out / f"checkpoint-{step}" / SEAL_FILE).is_file()), default=0
    )


def kill_at_random(process, out):
    """Kill -9 at a random moment after a random one of the next checkpoints; says where the run was then.

    The goal is a step rather than a time, or a fast machine would be at the end before the second kill.
    """
    chance = random.SystemRandom()
    goal = last_sealed(out) + 3 * chance.randint(1, 7)
    while last_sealed(out) < goal:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    delay = chance.uniform(0, 0.05)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    return f"killed {delay:.3f} s after checkpoint {goal}, with {sorted(checkpoints(out))} in the folder"


@pytest.mark.slow
def test_kill_9_at_a_random_step_and_resume_gives_the_losses_of_an_uninterrupted_run(tmp_path, steps_read):
    # Long enough for two kills.
    steps, out = 90, tmp_path / "run"
    long = [*SETTINGS, f"train.steps={steps}"]
    whole = undisturbed(get_recipe("recall-ovq").override(long), tmp_path / "whole")
    steps_read.clear()
    sets = [argument for setting in long for argument in ("--set", setting)]
    story = [kill_at_random(start("recall-ovq", *sets, "--out", out), out)]
    story.append(kill_at_random(start("--resume", "--out", out), out))
    resume(out)
    assert steps_read, story
    assert steps_read[0] >= 6, story
    assert losses(out) == losses(whole), story
    assert_same_run(out, whole)
    assert checkpoints(out) == {steps - 3, steps}, "unfinished checkpoints are cleared away"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.safetensors", truncate, "model.safetensors: expected 26096 bytes, found 13048"),
        ("optimizer.pt", lambda path: path.unlink(), "optimizer.pt: expected a file, found none"),
        ("rng_state.pth", flip, "rng_state.pth: expected the SHA-256 of its seal, found another"),
        ("trainer_state.json", lambda path: path.write_text(""), "trainer_state.json: expected"),
        (SEAL_FILE, lambda path: path.unlink(), "it was never finished: it has no seal.json"),
        (SEAL_FILE, truncate, "seal.json: expected a list of files, found something else"),
        (SEAL_FILE, lambda path: path.write_text("[" * 10**5), "seal.json: expected a list of files"),
        (SEAL_FILE, lambda path: path.write_text('{"a": 1}'), "seal.json: expected|a: expected a file"),
    ],
)
def test_a_damaged_checkpoint_is_left_out_and_named(whole, interrupted, name, damage, reason):
    damage(interrupted / f"checkpoint-{STEPS}" / name)
    said = resume(interrupted).splitlines()
    [line] = [line for line in said if "skipped, as" in line]
    assert line.startswith(f"{interrupted}/checkpoint-{STEPS}: skipped, as it is incomplete or damaged (")
    assert any(part in line for part in reason.split("|"))
    assert losses(interrupted) == losses(whole)
    assert fault(interrupted / f"checkpoint-{STEPS}") is None


def test_checkpoints_without_fault_are_taken_without_a_word(whole, interrupted, steps_read):
    shutil.rmtree(interrupted / f"checkpoint-{STEPS}")
    assert "skipped, as" not in resume(interrupted)
    assert steps_read == [STEPS - 3, STEPS - 2, STEPS - 1]
    assert_same_run(interrupted, whole)


def test_losses_are_the_same_though_few_steps_are_logged(tmp_path):
    """A logged loss is the mean since the last one, also where a checkpoint was written in between."""
    config, whole, out = (
        CONFIG.override(["train.steps=10", "train.log_every=5"]),
        tmp_path / "whole",
        tmp_path,
    )
    with Reporter(Console(quiet=True)) as reporter:
        loop.train(config, whole, reporter=reporter)
    shutil.copytree(whole / "checkpoint-9", out / "checkpoint-9")
    config.save(out)
    resume(out)
    assert losses(out) == losses(whole)


def assert_same_run(out, whole):
    assert losses(out) == losses(whole)
    ours, expected = (OVQForCausalLM.from_pretrained(path) for path in (out, whole))
    weights = ours.state_dict()
    assert all(weights[name].equal(weight) for name, weight in expected.state_dict().items())
    assert ours.generation_config.to_dict() == expected.generation_config.to_dict()
    assert ours.config.use_cache


def test_killed_by_kill_9_before_its_first_checkpoint_a_run_starts_again(whole, tmp_path, steps_read):
    out = tmp_path / "run"
    sets = [argument for setting in (*SETTINGS, "train.save_every=0") for argument in ("--set", setting)]
    os.mkfifo(tmp_path / "errors")
    process = command(
        ["train", "recall-ovq", *sets, "--out", out], output=os.devnull, errors=tmp_path / "errors"
    )
    process.start()
    with (tmp_path / "errors").open() as errors:
        # Now the first step is taken.
        first = errors.readline()
        assert first.startswith(f"train recall-ovq: 0/{STEPS}"), f"found {first!r}, then {errors.read()}"
        delay = random.SystemRandom().uniform(0, 0.05)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"it ended within {delay:.3f} s: {errors.read()}"
    assert not checkpoints(out)
    said = resume(out)
    assert (
        f"{out}: stopped before its first checkpoint, the run starts again from its run_config.json" in said
    )
    assert steps_read == list(range(STEPS))
    assert_same_run(out, whole)


def test_a_run_has_its_folder_to_itself(interrupted):
    """Two that write the same checkpoints would leave a mixture of both."""
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with claimed(interrupted, command="ovq train"), Reporter(Console(quiet=True)) as reporter:
        for begin in (loop.resume, functools.partial(loop.train, CONFIG)):
            with pytest.raises(ValueError, match="--out: expected a folder that no other `ovq train` is"):
                begin(interrupted, reporter=reporter)
    assert {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


def test_interrupted_before_its_first_checkpoint_a_run_starts_again(whole, tmp_path, steps_read, monkeypatch):
    out = tmp_path / "run"
    build = CurriculumDataset.__getitems__

    def interrupted(self, indices):
        if len(steps_read) == 2:
            raise KeyboardInterrupt
        return build(self, indices)

    with monkeypatch.context() as patch, Reporter(Console(quiet=True)) as reporter:
        patch.setattr(CurriculumDataset, "__getitems__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(CONFIG, out, reporter=reporter)
    assert steps_read == [0, 1]
    assert not checkpoints(out)
    # In its folder it goes on, and no other run begins.
    with Reporter(Console(quiet=True)) as reporter, pytest.raises(ValueError, match=r"or --resume"):
        loop.train(CONFIG, out, reporter=reporter)
    assert f"{out}: stopped before its first checkpoint" in resume(out)
    assert steps_read[2:] == list(range(STEPS))
    assert_same_run(out, whole)


def test_a_first_checkpoint_half_written_is_left_out_and_the_run_starts_again(whole, interrupted, steps_read):
    shutil.rmtree(interrupted / f"checkpoint-{STEPS}")
    folder = (interrupted / f"checkpoint-{STEPS - 3}").rename(interrupted / "checkpoint-3")
    (folder / SEAL_FILE).unlink()
    truncate(folder / "optimizer.pt")
    (folder / "trainer_state.json").unlink()
    said = resume(interrupted)
    assert (
        f"{folder}: skipped, as it is incomplete or damaged (it was never finished: it has no seal.json)"
        in said
    )
    assert f"{interrupted}: stopped before its first checkpoint" in said
    assert steps_read == list(range(STEPS))
    assert_same_run(interrupted, whole)
    assert checkpoints(interrupted) == {STEPS - 3, STEPS}


def test_damaged_checkpoints_alone_are_not_passed_over(whole, interrupted):
    for step in (STEPS - 3, STEPS):
        truncate(interrupted / f"checkpoint-{step}" / "optimizer.pt")
    message = rf"--resume: expected an undamaged checkpoint .* \(checkpoint-{STEPS - 3}, checkpoint-{STEPS}\)"
    with pytest.raises(ValueError, match=message):
        resume(interrupted)
    assert checkpoints(interrupted) == {STEPS - 3, STEPS}
    for step in (STEPS - 3, STEPS):
        shutil.rmtree(interrupted / f"checkpoint-{step}")
    resume(interrupted)
    assert_same_run(interrupted, whole)


def test_a_run_that_has_ended_without_checkpoints_does_not_start_again(whole, interrupted):
    for step in (STEPS - 3, STEPS):
        shutil.rmtree(interrupted / f"checkpoint-{step}")
    for name in ("model.safetensors", "trainer_state.json"):
        shutil.copy(whole / name, interrupted)
    before = {path: path.read_bytes() for path in interrupted.iterdir()}
    with pytest.raises(ValueError, match="--resume: expected an unfinished run, found a trained model in"):
        resume(interrupted)
    assert {path: path.read_bytes() for path in interrupted.iterdir()} == before


def test_a_run_whose_last_file_was_not_written_whole_goes_on(whole, interrupted):
    """As on a full disk: the model is there, and what says so is not."""
    for name in ("model.safetensors", "README.md"):
        shutil.copy(whole / name, interrupted)
    (interrupted / "trainer_state.json").write_text("")
    resume(interrupted)
    assert_same_run(interrupted, whole)


@pytest.mark.parametrize("text", ["{}", "[]", '{"global_step": "all"}'])
def test_another_file_in_the_place_of_the_last_one_is_refused(interrupted, text):
    for name in ("README.md", "trainer_state.json"):
        (interrupted / name).write_text(text)
    with pytest.raises(ValueError, match=r"trainer_state\.json: expected the state of a trainer, .* found"):
        resume(interrupted)


def with_little_room():
    # More than the model takes and less than the optimizer.
    limit = 50_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_costs_one_line_and_no_checkpoint(whole, interrupted, tmp_path):
    """The limit on the size of a file stands for the disk: a write beyond it fails in the middle."""
    shutil.rmtree(interrupted / f"checkpoint-{STEPS}")
    arguments = ["train", "--resume", "--out", interrupted]
    process = command(arguments, output=os.devnull, errors=tmp_path / "errors", before=with_little_room)
    process.start()
    process.join()
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 2, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"ovq: error: {interrupted}/checkpoint-{STEPS}: cannot be written (")
    assert checkpoints(interrupted) == {STEPS - 3}, "what could not be finished is removed"
    assert fault(interrupted / f"checkpoint-{STEPS - 3}") is None
    resume(interrupted)
    assert losses(interrupted) == losses(whole)


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(interrupted):
    shutil.rmtree(interrupted / f"checkpoint-{STEPS}")
    (interrupted / f"checkpoint-{STEPS}").write_text("a file where a folder should be")
    with pytest.raises(OSError, match=rf"checkpoint-{STEPS}.*: cannot be written|Not a directory"):
        resume(interrupted)
    assert fault(interrupted / f"checkpoint-{STEPS - 3}") is None


def test_the_oldest_checkpoint_goes_only_when_the_newest_is_whole(interrupted, monkeypatch):
    """Killed between the last byte and the seal, the run still has a checkpoint to go back to."""
    shutil.rmtree(interrupted / f"checkpoint-{STEPS}")
    (interrupted / f"checkpoint-{STEPS - 1}").mkdir()

    def killed(folder, *, with_subfolders):
        assert (folder / "trainer_state.json").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("ovq_lab.train.checkpoints.seal", killed)
    with pytest.raises(KeyboardInterrupt):
        resume(interrupted)
    assert fault(interrupted / f"checkpoint-{STEPS - 3}") is None
    assert "it was never finished" in fault(interrupted / f"checkpoint-{STEPS}")
