"""How much a process says on standard error: with `-q` no progress, with `-v` details as well."""

from __future__ import annotations

import logging
import os
import sys

_VARIABLE = "OVQ_VERBOSITY"


def set_quiet() -> None:
    """Show no progress, and of transformers only errors, here and in processes that this one starts."""
    _set("quiet", "error")
    # Of loading and saving weights; read like the verbosity.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Of reading GGUF files; read when tqdm is imported.
    os.environ["TQDM_DISABLE"] = "1"
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def set_verbose() -> None:
    """Show what libraries log, here and in processes that this one starts."""
    _set("verbose", "info")
    logging.basicConfig(level=logging.INFO)


def is_quiet() -> bool:
    """Whether progress is not to be shown."""
    return os.environ.get(_VARIABLE) == "quiet"


def is_verbose() -> bool:
    """Whether details are to be shown, such as where an error comes from."""
    return os.environ.get(_VARIABLE) == "verbose"


def _set(name: str, of_transformers: str) -> None:
    os.environ[_VARIABLE] = name
    # Read when transformers is imported, which takes seconds and is not done here.
    os.environ["TRANSFORMERS_VERBOSITY"] = of_transformers
    if "transformers" in sys.modules:
        from transformers.utils.logging import log_levels, set_verbosity

        set_verbosity(log_levels[of_transformers])
