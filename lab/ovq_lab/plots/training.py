"""The figure of a training run: its losses by step."""

from __future__ import annotations

from pathlib import Path

from ovq_lab.plots.panels import new_panels, save
from ovq_lab.plots.style import line_styles
from ovq_lab.train.history import History


def save_loss_curve(run: Path, *, mixer: str) -> Path:
    """Draw the losses of a run into its folder, in the colour of its long-range mixer if that is known."""
    history, path = History.load(run), run / "loss.png"
    figure, [axes] = new_panels(1)
    style = line_styles({mixer: (mixer, None)})[mixer].options()
    plain = style | {"marker": "", "linewidth": 1.0, "alpha": 0.6}
    axes.plot(list(history.training), list(history.training.values()), label="training", **plain)
    if history.held_out:
        axes.plot(list(history.held_out), list(history.held_out.values()), label="held out", **style)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("loss (nats per token)")
    save(figure, path, title="Loss during training")
    return path
