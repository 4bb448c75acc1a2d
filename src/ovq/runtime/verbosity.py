"""Verbosity on standard error: no progress with `-q`, more details with `-v`."""

from __future__ import annotations

import logging
import os
import sys

_VARIABLE = "OVQ_VERBOSITY"


def set_quiet() -> None:
    """Show no progress, and only errors of transformers, in this process and its children."""
    _set("quiet", "error")
    # Progress of loading and saving weights; read like the verbosity.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Progress of reading GGUF files; read when tqdm is imported.
    os.environ["TQDM_DISABLE"] = "1"
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def set_verbose() -> None:
    """Show the logs of libraries, in this process and its children."""
    _set("verbose", "info")
    logging.basicConfig(level=logging.INFO)


def is_quiet() -> bool:
    """Whether progress is hidden."""
    return os.environ.get(_VARIABLE) == "quiet"


def is_verbose() -> bool:
    """Whether details are shown, such as where an error comes from."""
    return os.environ.get(_VARIABLE) == "verbose"


def _set(name: str, of_transformers: str) -> None:
    os.environ[_VARIABLE] = name
    # Read when transformers is imported, which takes seconds and is not done here.
    os.environ["TRANSFORMERS_VERBOSITY"] = of_transformers
    if "transformers" in sys.modules:
        from transformers.utils.logging import log_levels, set_verbosity

        set_verbosity(log_levels[of_transformers])
