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
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
