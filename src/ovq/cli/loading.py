"""Loading saved models strictly: damaged or inconsistent files are refused with one line.

`from_pretrained` alone follows transformers: it initialises missing weights at random and warns. Heavy
imports are inside the functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ovq.cli.common import flag_of
from ovq.runtime.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from typing_extensions import Unpack

    from ovq.hf import OVQConfig, OVQForCausalLM

_MODEL_TYPE = "ovq"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A model has a tokenizer if its folder has one of these files."""
# Exceptions of transformers for unexpected values. Its OSError and ValueError are clear by themselves.
FOREIGN_ERRORS = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)


class DictionaryOptions(TypedDict, total=False):
    """Options of a trained model's dictionary that a command can change; None leaves one as saved."""

    num_slots: int | None
    merge: str | None
    logn_length: int | None
    state_dtype: str | None


def check_model_folder(folder: Path, *, hint: str = "") -> None:
    """Raise ValueError unless the folder looks like a saved model, before anything heavy is imported.

    `hint` ends the message, on what to do with another model.
    """
    if (found := _model_type(folder)) != _MODEL_TYPE:
        raise ValueError(
            f"{folder / 'config.json'}: expected the config of a model of type {_MODEL_TYPE!r}, "
            f"found {found!r}{hint}"
        )


def _model_type(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        what = "a file" if folder.is_file() else "no such folder"
        found = "no config.json in it" if folder.is_dir() else what
        raise ValueError(f"{folder}: expected the folder of a saved model, found {found}")
    return _read_object(path).get("model_type")


def load_config(folder: Path) -> OVQConfig:
    """The config of a saved model; ValueError if it is missing, damaged, foreign, or has bad values."""
    check_model_folder(folder)
    from ovq.hf import OVQConfig

    with _errors_naming(folder / "config.json", "the config of a saved model"):
        return OVQConfig.from_pretrained(folder, local_files_only=True)


def load_model(folder: Path, **options: Unpack[DictionaryOptions]) -> OVQForCausalLM:
    """Load a trained model onto the GPU if there is one, and change options of its dictionary that are given.

    Raises:
        OSError: If there are no weights.
        ValueError: If the folder holds no OVQ model, its files are damaged or do not fit together, or
            an option cannot be set on it.
    """
    config = load_config(folder)
    generation = folder / "generation_config.json"
    if generation.is_file():
        # transformers silently continues without a generation config that it cannot read.
        _read_object(generation)
    from ovq.hf import OVQForCausalLM

    model = _load_checked(OVQForCausalLM, folder, config)
    _check_eos(generation, model.generation_config.eos_token_id)
    set_options(model, **options)
    return model.to(_device()).eval()


def set_options(model: OVQForCausalLM, **options: Unpack[DictionaryOptions]) -> None:
    """Set the given options on a model; ValueError if one cannot be set on it."""
    for name, value in options.items():
        if value is not None:
            getattr(model, f"set_{name}")(value)


def is_converted(folder: Path) -> bool:
    """Whether the folder holds a converted model, by its config; ValueError if that is damaged."""
    path = folder / "config.json"
    return path.is_file() and "ovq_memory" in _read_object(path)


def is_ovq_model(folder: Path) -> bool:
    """Whether the folder holds a model of this library, by its config."""
    return _model_type(folder) == _MODEL_TYPE


def check_any_model_folder(folder: Path) -> None:
    """Raise ValueError unless the folder looks like a saved model: OVQ, converted or pretrained."""
    if not isinstance(_model_type(folder), str):
        check_model_folder(folder)


def load_any_config(folder: Path) -> PreTrainedConfig:
    """The config of a saved causal language model of any kind; errors as of `load_config`."""
    if is_ovq_model(folder):
        return load_config(folder)
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if (found := _model_type(folder)) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{folder / 'config.json'}: expected the config of a causal language model, found {found!r}"
        )
    with _errors_naming(folder / "config.json", "the config of a saved model"):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def check_generating_folder(folder: Path) -> None:
    """Raise ValueError unless the folder looks like a saved model of either kind, OVQ or converted."""
    if not is_converted(folder):
        check_model_folder(folder, hint="; other models must be converted first (ovq convert)")


def load_any_model(
    folder: Path, *, weight_dtype: str | None = None, **options: Unpack[DictionaryOptions]
) -> Any:
    """Load an OVQ model, a converted one, or an unchanged causal language model of transformers, onto the GPU
    if there is one.

    `weight_dtype` is the format of a converted model's weights on a CPU, see `ovq.convert.attach`. Errors are
    as of `load_model`, and for options of another kind of models.
    """
    if is_converted(folder):
        refuse_options("a converted model", hint=": convert it again", **options)
        from ovq.convert import load

        if (device := _device()) != "cpu" and weight_dtype != "auto":
            refuse_options("a model on a GPU", weight_dtype=weight_dtype)
        with _errors_naming(folder, "a converted model"), _quiet():
            model: Any = load(
                folder, weight_dtype=weight_dtype, local_files_only=True, trust_remote_code=False
            )
        return model.to(device).eval()
    refuse_options("a trained model", hint=": only converted models have it", weight_dtype=weight_dtype)
    if is_ovq_model(folder):
        return load_model(folder, **options)
    refuse_options("a pretrained model", **options)
    config = load_any_config(folder)
    from transformers import AutoModelForCausalLM

    return _load_checked(AutoModelForCausalLM, folder, config, allow_extra=True).to(_device()).eval()


def refuse_options(what: str, *, hint: str = "", **given: Any) -> None:
    """Raise ValueError, naming the flag, for an option that models of another kind have."""
    for name, found in given.items():
        if found is not None:
            raise ValueError(f"{flag_of(name)}: expected none with {what}, found {found}{hint}")


def _load_checked(kind: Any, folder: Path, config: PreTrainedConfig, *, allow_extra: bool = False) -> Any:
    """A model whose saved weights are exactly those that it needs, see `check_loaded`."""
    from ovq.hf.hub import check_loaded

    with _errors_naming(folder, "the weights of a saved model"), _quiet():
        model, report = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            output_loading_info=True,
            # `check_loaded` refuses these, and names the weights.
            ignore_mismatched_sizes=True,
        )
    check_loaded(folder, report, allow_extra=allow_extra)
    return model


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer saved with a model, or None: models of synthetic tasks read token ids."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    # Registers the type of the model, of which AutoTokenizer else warns.
    import ovq.hf  # noqa: F401

    # The tokenizers library raises plain exceptions.
    with _errors_naming(folder, "the tokenizer of a model", (Exception,)):
        # Else transformers asks on standard input whether to run the code in the folder.
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Use it once, as fields of a wrong type only raise errors then.
        tokenizer.decode(tokenizer("a", verbose=False)["input_ids"])
        return tokenizer


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


@contextlib.contextmanager
def _errors_naming(
    path: Path, what: str, foreign: tuple[type[Exception], ...] = FOREIGN_ERRORS
) -> Iterator[None]:
    """Context manager that turns errors of libraries about a file into a ValueError that names the file."""
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
    """Context manager that hides transformers' progress bar of loading, which is brief, and its table of
    mismatched weights."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_eos(path: Path, found: Any) -> None:
    """Raise ValueError unless the end tokens are token ids."""
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) for token in tokens):
        raise ValueError(f"{path}: expected eos_token_id to be a token id or a list of them, found {found!r}")
