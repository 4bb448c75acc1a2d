"""Two processes go on with a run on text where one has stopped, and one where two have."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys

import pytest
from tests.processes import run_ranks
from tests.tiny import losses
from tests.train.text_common import quiet, stopped_at, tiny_config, write_texts

from ovq_lab.train import checkpoints, loop


def resume_in_two_processes(out):
    """What `torchrun --nproc-per-node 2 -m ovq train --resume` does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "ovq", "train", "--resume", "--out", out],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors


# Each carries its own lanes; the windows of a packed run go to processes by the same rule.
@pytest.mark.slow
def test_any_number_of_processes_trains_as_one(tmp_path, monkeypatch):
    folder = write_texts(tmp_path, monkeypatch)
    monkeypatch.setattr(checkpoints, "_NUM_KEPT", 3)
    config = tiny_config(folder, task={"carry_state": True}, save_every=2)
    alone, shared, resumed = (tmp_path / name for name in ("alone", "shared", "resumed"))
    with quiet() as reporter:
        loop.train(config, alone, reporter=reporter)
        resume_in_two_processes(stopped_at(config, 2, alone, shared))
        assert len(list((shared / "checkpoint-4").glob("carried-*"))) == 2
        loop.resume(stopped_at(config, 4, shared, resumed), reporter=reporter)
    expected = losses(alone)
    assert losses(shared) == pytest.approx(expected, abs=1e-4)
    assert losses(resumed) == pytest.approx(expected, abs=1e-4)


def train_sharded(rank, folder, runs):
    """In a process of a group: train a run, or go on with one that is there."""
    for out, config in runs.items():
        with quiet() as reporter:
            if config is None:
                loop.resume(out, reporter=reporter)
            else:
                loop.train(config, out, reporter=reporter)


@pytest.mark.slow
def test_a_sharded_model_carries_its_states(tmp_path, monkeypatch):
    folder = write_texts(tmp_path, monkeypatch)
    config = tiny_config(folder, task={"carry_state": True}, save_every=2)
    sharded = dataclasses.replace(config, train=dataclasses.replace(config.train, sharding="fsdp"))
    alone, shared, resumed = (tmp_path / name for name in ("alone", "shared", "resumed"))
    with quiet() as reporter:
        loop.train(config, alone, reporter=reporter)
    groups = [tmp_path / name for name in ("first", "second")]
    for group in groups:
        group.mkdir()
    run_ranks(train_sharded, 2, groups[0], {shared: sharded})
    shutil.copytree(shared, resumed, ignore=shutil.ignore_patterns("checkpoint-6"))
    run_ranks(train_sharded, 2, groups[1], {resumed: None})
    expected = losses(alone)
    assert losses(shared) == pytest.approx(expected, abs=1e-4)
    assert losses(resumed) == losses(shared)
