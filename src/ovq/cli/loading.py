"""Saved models: files that are damaged or do not fit together are refused in one line, and nothing is made
up.

`from_pretrained` keeps the conventions of transformers: it initialises missing weights at random and warns.
Heavy imports are inside the functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.fields import did_you_mean
from ovq.runtime.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ovq.hf import OVQConfig, OVQForCausalLM

WeightDtype = Annotated[
    str | None,
    typer.Option(
        help="Format of a converted model's weights on a CPU: float32, bfloat16, int8 or int4; that of the "
        "file if not given."
    ),
]

_MODEL_TYPE = "ovq"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A model has a tokenizer if one of them lies beside it."""
# What transformers raises on values it does not expect. Its OSError and ValueError explain themselves.
FOREIGN_ERRORS = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)


def check_model_folder(folder: Path, *, hint: str = "") -> None:
    """Raise ValueError unless the folder looks like a saved model, before anything heavy is imported.

    Args:
        folder: The folder.
        hint: What to do with another model, for the message.
    """
    found = _model_type(folder)
    if found != _MODEL_TYPE:
        raise ValueError(
            f"{folder / 'config.json'}: expected the config of a model of type {_MODEL_TYPE!r}, "
            f"found {found!r}{hint}"
        )


def _model_type(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected the folder of a saved model, found no config.json in it")
    return _read_object(path).get("model_type")


def load_config(folder: Path) -> OVQConfig:
    """The config of a saved model.

    Raises:
        ValueError: If there is none, or it is damaged, foreign, or has impossible values.
    """
    check_model_folder(folder)
    from ovq.hf import OVQConfig

    with _naming(folder / "config.json", "the config of a saved model"):
        return OVQConfig.from_pretrained(folder, local_files_only=True)


def load_model(
    folder: Path, *, num_slots: int | None = None, merge: str | None = None, logn_length: int | None = None
) -> OVQForCausalLM:
    """Load a trained model onto the GPU if there is one, and set how it reads and remembers.

    Args:
        folder: Where it was saved.
        num_slots: The size of its dictionary; `None` for its own, as for all that follow.
        merge: The rule that keeps it.
        logn_length: Tokens beyond which logits are scaled, see `OVQPreTrainedModel.set_logn_length`.

    Raises:
        OSError: If there are no weights.
        ValueError: If the folder holds no OVQ model, its files are damaged or do not fit together, or
            `num_slots`, `merge` or `logn_length` cannot be set on it.
    """
    config = load_config(folder)
    generation = folder / "generation_config.json"
    if generation.is_file():
        # transformers silently continues without a generation config that it cannot read.
        _read_object(generation)
    import torch

    from ovq.hf import OVQForCausalLM
    from ovq.hf.hub import check_loaded

    with _naming(folder, "the weights of a saved model"), _quiet():
        # With `output_loading_info` it returns a pair, which its annotation leaves out.
        loaded: Any = OVQForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            output_loading_info=True,
            # Refused below, where the weights are named.
            ignore_mismatched_sizes=True,
        )
    model: OVQForCausalLM
    model, report = loaded
    check_loaded(folder, report)
    _check_end(generation, model.generation_config.eos_token_id)
    if num_slots is not None:
        model.set_num_slots(num_slots)
    if merge is not None:
        model.set_merge(merge)
    if logn_length is not None:
        model.set_logn_length(logn_length)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # transformers wraps `to` in a way that leaves mypy without its `self`.
    return model.to(device).eval()  # type: ignore[arg-type]


def is_converted(folder: Path) -> bool:
    """Whether the folder holds a model that `ovq convert` has written.

    Raises:
        ValueError: If its config is damaged.
    """
    path = folder / "config.json"
    return path.is_file() and "ovq_memory" in _read_object(path)


def is_own(folder: Path) -> bool:
    """Whether the folder holds a model of this library, by its config."""
    return _model_type(folder) == _MODEL_TYPE


def check_any_folder(folder: Path) -> None:
    """Raise ValueError unless the folder looks like a saved model: OVQ, converted or pretrained."""
    if not isinstance(_model_type(folder), str):
        check_model_folder(folder)


def load_any_config(folder: Path) -> PreTrainedConfig:
    """The config of a saved model of any kind.

    Raises:
        ValueError: As for `load_config`, or if it is of no causal language model.
    """
    if is_own(folder):
        return load_config(folder)
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if (found := _model_type(folder)) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{folder / 'config.json'}: expected the config of a causal language model, found {found!r}"
        )
    with _naming(folder / "config.json", "the config of a saved model"):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def load_any_model(
    folder: Path, *, num_slots: int | None = None, merge: str | None = None, logn_length: int | None = None
) -> Any:
    """Load an OVQ model, a converted one, or a causal language model of transformers as it is, onto the GPU
    if there is one.

    Raises:
        OSError: If there are no weights.
        ValueError: As for `load_generating_model`, or if it is of no such kind.
    """
    if is_own(folder) or is_converted(folder):
        return load_generating_model(folder, num_slots=num_slots, merge=merge, logn_length=logn_length)
    for flag, found in (("--num-slots", num_slots), ("--merge", merge), ("--logn-length", logn_length)):
        if found is not None:
            raise ValueError(f"{flag}: expected none with a pretrained model, found {found}")
    config = load_any_config(folder)
    import torch
    from transformers import AutoModelForCausalLM

    from ovq.hf.hub import check_loaded

    with _naming(folder, "the weights of a saved model"), _quiet():
        # With `output_loading_info` it returns a pair, which its annotation leaves out.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            output_loading_info=True,
            # Refused below, where the weights are named.
            ignore_mismatched_sizes=True,
        )
    model, report = loaded
    # Files of others may hold more than the model of transformers has.
    check_loaded(folder, {**report, "unexpected_keys": []})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def check_weight_dtype(weight_dtype: str | None) -> None:
    """Raise ValueError unless it is a format of weights, or none, before anything heavy is imported.

    Example:
        >>> check_weight_dtype("int8")
    """
    known = ("auto", "float32", "bfloat16", "int8", "int4")
    if weight_dtype is not None and weight_dtype not in known:
        raise ValueError(
            f"--weight-dtype: expected one of {', '.join(known)}, found {weight_dtype!r}"
            f"{did_you_mean(weight_dtype, known)}"
        )


def check_generating_folder(folder: Path) -> None:
    """Raise ValueError unless the folder looks like a saved model of either kind, OVQ or converted."""
    if not is_converted(folder):
        check_model_folder(folder, hint="; other models must be converted first (ovq convert)")


def load_generating_model(
    folder: Path,
    *,
    num_slots: int | None = None,
    merge: str | None = None,
    logn_length: int | None = None,
    weight_dtype: str | None = None,
) -> Any:
    """Load an OVQ model or a converted one, onto the GPU if there is one.

    Args:
        folder: Where it was saved.
        num_slots: As for `load_model`.
        merge: Likewise.
        logn_length: Likewise.
        weight_dtype: The format of a converted model's weights on a CPU, see `ovq.convert.attach`.

    Raises:
        OSError: If there are no weights.
        ValueError: As for `load_model`; or an option for a model of the other kind.
    """
    if not is_converted(folder):
        if weight_dtype is not None:
            raise ValueError(
                f"--weight-dtype: expected none with a trained model, found {weight_dtype}: converted models "
                "have it"
            )
        return load_model(folder, num_slots=num_slots, merge=merge, logn_length=logn_length)
    for flag, found in (("--num-slots", num_slots), ("--merge", merge), ("--logn-length", logn_length)):
        if found is not None:
            raise ValueError(f"{flag}: expected none with a converted model, found {found}: convert it anew")
    import torch

    from ovq.convert import load

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _naming(folder, "a converted model"), _quiet():
        model = load(folder, weight_dtype=weight_dtype if device == "cpu" else None, local_files_only=True)
    # transformers wraps `to` in a way that leaves mypy without its `self`.
    return model.to(device).eval()  # type: ignore[arg-type]


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer saved with a model, or `None`: models of synthetic tasks read token ids.

    Raises:
        ValueError: If its files are damaged.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    # The tokenizers library raises plain exceptions.
    with _naming(folder, "the tokenizer of a model", (Exception,)):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # Fields of a wrong type are noticed by whoever reads them.
        tokenizer.decode(tokenizer("a", verbose=False)["input_ids"])
        return tokenizer


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


@contextlib.contextmanager
def _naming(path: Path, what: str, foreign: tuple[type[Exception], ...] = FOREIGN_ERRORS) -> Iterator[None]:
    """Turn errors of libraries about a file into a ValueError that names it and says what was expected."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except OSError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path}: expected {what}, found a file that is damaged ({error})") from error
    except foreign + (StrictDataclassError,) as error:  # noqa: RUF005  (mypy does not know the other form)
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected {what}, found what cannot be read as such ({found})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar of loading, which is too short to be seen, and the table of what does not
    fit."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_end(path: Path, found: Any) -> None:
    """Raise ValueError unless the tokens that end a text are token ids."""
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) for token in tokens):
        raise ValueError(f"{path}: expected eos_token_id to be a token id or a list of them, found {found!r}")
