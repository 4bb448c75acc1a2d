"""Evaluation mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Context manager: a module in evaluation mode; after it, each submodule is in the mode that it had.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Dropout().eval())
        >>> with evaluating(model):
        ...     model.training
        False
        >>> model.training, model[0].training
        (True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # Modules may act on a change in their `train`, which sets their parts too; parts come later here.
        for module, was_training in modes:
            if module.training != was_training:
                module.train(was_training)
