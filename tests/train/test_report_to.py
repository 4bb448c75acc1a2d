"""Where the losses of a run go."""

import pytest
from tests.train.text_common import quiet, tiny_config, write_texts

from ovq_lab.train import loop


@pytest.mark.parametrize(("report_to", "is_there"), [(("auto",), True), (("none",), False)])
def test_tensorboard_gets_them_unless_it_is_told_not_to(report_to, is_there, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    config = tiny_config(write_texts(tmp_path, monkeypatch), steps=2, report_to=report_to)
    with quiet() as reporter:
        loop.train(config, tmp_path / "run", reporter=reporter)
    assert bool(list((tmp_path / "run").rglob("events.out.tfevents.*"))) == is_there


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "get_available_reporting_integrations", lambda: ["tensorboard"])
    config = tiny_config(write_texts(tmp_path, monkeypatch), report_to=("tensorboard", "wandb"))
    expected = r"train.report_to: expected auto, none or an installed tracker \(tensorboard\), found 'wandb'"
    with quiet() as reporter, pytest.raises(ValueError, match=expected):
        loop.train(config, tmp_path / "run", reporter=reporter)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("report_to", [(), ("auto", "wandb"), ("none", "wandb")])
def test_what_contradicts_itself_is_refused(report_to, tmp_path):
    with pytest.raises(ValueError, match=r"train.report_to: expected auto, none, or names of trackers"):
        tiny_config(tmp_path, report_to=report_to)
