"""Checks before and after loading a saved model or one from the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_source(source: str, *, flag: str) -> None:
    """Raise ValueError, naming the option `flag`, unless `source` is a folder or a valid name on the hub.

    The hub's own error confuses users of paths.

    Example:
        >>> check_source("no/such/folder", flag="--model")
        Traceback (most recent call last):
        ValueError: --model: expected the folder of a model or a name on the hub, found 'no/such/folder'
    """
    if Path(source).is_dir():
        return
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise ValueError(
            f"{flag}: expected the folder of a model or a name on the hub, found {source!r}"
        ) from None


def check_loaded(source: str | os.PathLike, report: Mapping[str, Any], *, allow_extra: bool = False) -> None:
    """Raise ValueError unless the saved weights are exactly those that the loaded model needs.

    Args:
        report: loading info that `from_pretrained` returns with `output_loading_info=True`.
        allow_extra: whether more weights may be saved, as in checkpoints that serve other tasks too.
    """
    faults = [
        f"{name} of shape {list(found)} where {list(expected)} belongs"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    faults += [f"no {name}" for name in sorted(report["missing_keys"])]
    if not allow_extra:
        faults += [f"{name}, which the model does not have" for name in sorted(report["unexpected_keys"])]
    if faults:
        others = f" and {len(faults) - 1} more differences" if len(faults) > 1 else ""
        raise ValueError(
            f"{source}: expected the weights of the model that config.json describes, "
            f"found {faults[0]}{others}"
        )
