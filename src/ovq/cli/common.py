"""What the commands share: reading options and loading models, with heavy imports inside the functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from ovq.hf import OVQForCausalLM

out_console = Console()
"""Results go to standard output; progress and errors go to standard error."""


def parse_ints(text: str, *, flag: str) -> list[int]:
    """Read a list such as `"256,1024"` of positive integers.

    Raises:
        ValueError: If a part is not a positive integer; names the flag.

    Example:
        >>> parse_ints("256, 1024", flag="--lengths")
        [256, 1024]
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{flag}: expected positive integers with commas between them, found {text!r}")
    return [int(part) for part in parts]


def load_model(folder: Path, *, num_slots: int | None = None) -> OVQForCausalLM:
    """Load a trained model onto the GPU if there is one, and set the size of its dictionary.

    Raises:
        ValueError: If the folder holds no OVQ model, or `num_slots` does not suit it.
    """
    check_model_folder(folder)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    import ovq.hf  # noqa: F401  (registers the models)

    # The bar of loading a model this small is over before it is seen, and leaves an empty line.
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    if num_slots is not None:
        model.set_num_slots(num_slots)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def check_model_folder(folder: Path) -> None:
    """Raise ValueError unless the folder looks like a saved model, before anything heavy is imported."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: expected the folder of a saved model, found no config.json in it")


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer saved with a model, or `None`: models of synthetic tasks read token ids."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
