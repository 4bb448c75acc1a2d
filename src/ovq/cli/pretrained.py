"""Loading the model for `ovq convert`: from a folder, from the hub, or from a GGUF file."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovq.cli.loading import FOREIGN_ERRORS, TOKENIZER_FILES

if TYPE_CHECKING:
    from torch import Tensor

# Tensor types of GGUF files that are not quantised.
_EXACT = ("F64", "F32", "F16", "BF16")
# Ends of the names of fields and tensors of GGUF files that scale rotary angles: linear and YaRN, linear in
# old files, and LongRoPE.
_SCALES = (".rope.scaling.factor", ".rope.scale_linear", "rope_factors_long.weight")
# What Llama 3.1 to 3.3 have in common; they differ in the factor.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_pretrained(
    name: str, *, gguf_file: str | None, dtype: str, say: Callable[[str], None]
) -> tuple[Any, Any]:
    """The model and its tokenizer (None if it has none).

    Args:
        name: A folder, a name on the hub, or a GGUF file.
        gguf_file: A GGUF file in that folder or repository.
        dtype: One of `DTYPES`. `"auto"` is the model's own, or 16 bits if nothing is lost: bfloat16 or
            float16 for float32 weights that fit exactly, bfloat16 for weights that were quantised.
        say: Called with a line of text before slow steps.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from ovq.hf.hub import check_loaded, check_source

    of_files = (SafetensorError, StrictDataclassError, struct.error)
    source, options = _place(name, gguf_file)
    check_source(source, flag="--model")
    is_gguf = bool(options)
    if is_gguf:
        say("Reading a GGUF file: weights, and tokens one by one")
    with _parsing_once() if is_gguf else contextlib.nullcontext():
        try:
            if is_gguf:
                divisors = _rotary_divisors(_header(source, options["gguf_file"]))
            wanted = "float32" if is_gguf and dtype == "auto" else dtype
            # mypy does not know that there is a report, too.
            auto: Any = AutoModelForCausalLM
            model, report = auto.from_pretrained(
                source,
                dtype=wanted,
                output_loading_info=True,
                # `check_loaded` refuses these, and names the weights.
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **options,
            )
            check_loaded(name, report, allow_extra=True)
        # Offline, transformers' error does not name the model. A GGUF file may end anywhere.
        except (*FOREIGN_ERRORS, OSError, ValueError, *of_files) as error:
            raise ValueError(
                f"--model: expected a causal language model, found {name!r} ({error})"
            ) from error
        if is_gguf:
            model = _dequantized(model, divisors)
        if dtype == "auto":
            tensors = _header(source, options["gguf_file"]).tensors if is_gguf else []
            is_rounded = any(tensor.tensor_type.name not in _EXACT for tensor in tensors)
            model = _narrowed(model, is_rounded=is_rounded)
        return model.eval(), _tokenizer(name, source, options)


def _place(name: str, gguf_file: str | None) -> tuple[str, dict[str, str]]:
    """Name of a model for `from_pretrained`, and its options for a GGUF file."""
    if gguf_file is None and name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"--model: expected a GGUF file, found none in {name}")
        name, gguf_file = str(path.parent), path.name
    if gguf_file is None:
        return name, {}
    # transformers reads GGUF files with both.
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--model: expected the package {package} for a GGUF file, found none: "
                "pip install 'ovq[convert]'"
            )
    return name, {"gguf_file": gguf_file}


@contextlib.contextmanager
def _parsing_once() -> Iterator[None]:
    """Context manager that parses a GGUF file once. transformers parses it, with all its tokens, for config,
    weights and tokenizer, and maps tensor names per module.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        """A reader that slices a plain array over the mapped file: it does so for each part of each token,
        and a slice of a `numpy.memmap` costs several times as much.
        """

        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = mapped.view(np.ndarray)

    cached: dict[str, Callable[..., Any]] = {
        "GGUFReader": Reader,
        "get_tensor_name_map": gguf.get_tensor_name_map,
    }
    before = {name: getattr(gguf, name) for name in cached}
    for name, function in cached.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


def _dequantized(model: Any, divisors: Tensor | None) -> Any:
    """A model with the same dequantised weights that transformers can save, and with divided frequencies."""
    from transformers.initialization import no_init_weights

    fields = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    if divisors is not None:
        fields["rope_parameters"] |= _LLAMA3 | {"factor": float(divisors.max())}
    with no_init_weights():
        plain = type(model)(type(model.config)(**fields))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    if divisors is not None:
        found = model.model.rotary_emb.inv_freq / plain.model.rotary_emb.inv_freq
        if found.shape != divisors.shape or not found.allclose(divisors, rtol=1e-4):
            raise ValueError(
                f"--model: expected rotary angles scaled as in Llama 3.1, found {divisors.tolist()}"
            )
    return plain.eval()


def _header(source: str, name: str) -> Any:
    """The parsed GGUF file, which `_parsing_once` has cached."""
    import gguf
    from transformers.utils import cached_file

    path = cached_file(source, name)
    assert path is not None
    return gguf.GGUFReader(path)


def _rotary_divisors(header: Any) -> Tensor | None:
    """What rotary frequencies are divided by, as in Llama 3.1 to 3.3; transformers leaves it out.

    Raises:
        ValueError: if a file scales rotary angles in another way, which transformers leaves out as well.
    """
    import torch

    fields = [x.name for x in header.fields.values() if x.name.endswith(_SCALES) and x.contents() != 1]
    if found := fields + [x.name for x in header.tensors if x.name.endswith(_SCALES)]:
        raise ValueError(
            f"transformers does not read the scaled rotary angles of a GGUF file, {found[0]}: convert the "
            "model that the file was made from"
        )
    tensors = [tensor.data for tensor in header.tensors if tensor.name == "rope_freqs.weight"]
    return torch.tensor(tensors[0]) if tensors else None


def _narrowed(model: Any, *, is_rounded: bool) -> Any:
    """A float32 model in 16 bits, if these hold all weights exactly, or the weights were quantised before."""
    import torch

    if model.dtype != torch.float32:
        return model
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(p, p.to(dtype).float()) for p in model.parameters()):
            return model.to(dtype)
    # Nearly all models are published in bfloat16, and on CPUs float16 has a sixth of its speed
    # (docs/results/convert.md, "Presets").
    return model.to(torch.bfloat16) if is_rounded else model


def _tokenizer(name: str, source: str, options: dict[str, str]) -> Any:
    """The tokenizer of a model; None if there is none."""
    from transformers import AutoTokenizer

    if not _has_tokenizer(source, options):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    # The tokenizers library raises plain exceptions.
    except Exception as error:
        raise ValueError(
            f"--model: expected a tokenizer that can be read beside {name}, found one that cannot be "
            f"({type(error).__name__}: {error})"
        ) from error


def _has_tokenizer(source: str, options: dict[str, str]) -> bool:
    from transformers.utils import cached_file

    if options:
        return "tokenizer.ggml.model" in _header(source, options["gguf_file"]).fields
    is_lenient = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    return any(cached_file(source, name, **is_lenient) is not None for name in TOKENIZER_FILES)
