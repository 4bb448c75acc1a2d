"""A corpus and a run on it that the tests of training on text share."""

import shutil
import string

from rich.console import Console

from ovq.runtime.progress import Reporter
from ovq_lab.tasks import TextTask
from ovq_lab.train.config import ModelArgs, RunConfig, TrainArgs
from ovq_lab.train.data import CORPUS_FILE

END = 256
TEXTS = {
    f"{letter}.txt": letter + " 12345" * i + letter for i, letter in enumerate(string.ascii_lowercase[:12])
}


def write_texts(tmp_path, monkeypatch, texts=TEXTS):
    """Texts by the names of their files in a folder, and a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def tiny_config(folder, mixer="ovq", task=None, **train):
    fields = {"steps": 6, "batch_size": 4, "lengths": (16,), "length_shares": (1.0,), "log_every": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "sliding_window": 6, "num_slots": 4, "chunk_size": 8}
    return RunConfig(
        task=TextTask(dataset=str(folder), held_out=0.0, **(task or {})),
        model=ModelArgs(mixer_types=("sliding_attention", mixer), **sizes, initializer_range=0.3),
        train=TrainArgs(warmup_steps=2, **(fields | train)),
    )


def quiet():
    return Reporter(Console(quiet=True))


def stopped_at(config, step, source, out):
    """The folder of a run as it would be, had it been interrupted after its checkpoint of this step."""
    config.save(out)
    shutil.copy(source / CORPUS_FILE, out)
    shutil.copytree(source / f"checkpoint-{step}", out / f"checkpoint-{step}")
    return out
