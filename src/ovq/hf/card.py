"""Model cards: the README.md beside a saved model, which the hub shows as the model's page.

A card ends with a comment that holds its digest. A card with no digest, or a wrong one, was written or edited
by a user and is never replaced.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import ModelCard, ModelCardData

from ovq.hf.configuration_ovq import OVQConfig
from ovq.layers.registry import mixer_class
from ovq.ops.ablation import Ablation
from ovq.ops.options import BEST_MERGE, can_merge_best
from ovq.plugins import modules_of_users
from ovq.runtime.files import write_atomic
from ovq.runtime.units import format_bytes

CARD_FILE = "README.md"
"""Name of the card in the folder of a model."""

_LENGTHS = (1024, 16384, 262144)

_ABOUT = """\
A language model of the Python package `ovq`. The memory of its OVQ layers is a dictionary of key/value slots
that is learned as the model reads ([arXiv 2602.03922](https://arxiv.org/abs/2602.03922)). The number of slots
is fixed, however long the text is."""

_ABOUT_OTHERS = "A language model of the Python package `ovq`, without OVQ layers."

_LOAD = """\
{packages} must be installed. `trust_remote_code=True` runs `modeling_ovq.py` of this repository, which
only imports `ovq.hf`; after `import ovq.hf` it is not needed.

```python
{imports}from transformers import {auto}

model = {auto}.from_pretrained("{place}", trust_remote_code=True)
```"""

_BEST_RULE = """

It was trained with the merge rule `"{merge}"`. Wherever that was measured, models trained so recall more with
another one, on the same weights and slots:

```python
model.set_merge("{best}")
```"""

_MARK = re.compile(r"\n<!-- Made by ovq \((\w+)\); a card that was edited is never replaced\. -->\n\Z")


class Model(Protocol):
    """What a card needs from a model."""

    config: OVQConfig

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""

    def can_generate(self) -> bool:
        """Whether it is a language model."""

    def num_parameters(self) -> int:
        """Total number of parameters."""

    def state_bytes(self, num_tokens: int, /) -> int:
        """Bytes of the cache of one row after `num_tokens` tokens."""


def model_card(
    model: Model,
    *,
    name: str,
    sections: Mapping[str, str] | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    has_tokenizer: bool = True,
    license: str | None = None,
) -> ModelCard:
    """The card of a model: description, loading code, sizes, and the bytes of its state.

    Args:
        name: name of the folder or repository, for the title and the example.
        sections: further sections by title, as Markdown.
        datasets: hub ids of the training data sets.
        tags: added to those that every card has.
        has_tokenizer: whether a tokenizer is saved beside the model.
        license: license of the weights, as the hub names it; None to leave it out.
    """
    is_generative = model.can_generate()
    auto = "AutoModelForCausalLM" if is_generative else "AutoModel"
    # The parent folder is not known.
    place = name if "/" in name else f"path/to/{name}"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if is_generative else "feature-extraction",
        tags=list(dict.fromkeys(["ovq", "long-context", *tags])),
        # The hub takes None for a field that is left out.
        datasets=list(datasets) or None,
        license=license,
    )
    reads = "" if has_tokenizer else "\n\nIt has no tokenizer: it reads and writes token ids."
    parts = {
        f"# {name}": (_ABOUT if "ovq" in model.config.mixer_types else _ABOUT_OTHERS) + reads,
        "## Load it": _loading(model.config, place, auto),
        "## Model": markdown_table(("", ""), _described(model).items()),
        "## Memory": _memory(model),
        **{f"## {title}": text for title, text in (sections or {}).items()},
    }
    body = "\n\n".join(f"{title}\n\n{text}" for title, text in parts.items())
    text = f"---\n{data.to_yaml()}\n---\n\n{body}\n"
    return ModelCard(
        f"{text}\n<!-- Made by ovq ({_digest(text)}); a card that was edited is never replaced. -->\n"
    )


def save_card(card: ModelCard, folder: Path, *, replaces: Sequence[str] = ()) -> bool:
    """Write a card into the folder of a model, unless there is one that must be kept; whether it was written.

    Args:
        replaces: as in `is_replaceable`.
    """
    path = folder / CARD_FILE
    if path.exists():
        found = path.read_text(encoding="utf-8", errors="replace")
        if not is_replaceable(found, replaces=replaces):
            return False
    write_atomic(path, card.content)
    return True


def is_replaceable(text: str, *, replaces: Sequence[str] = ()) -> bool:
    """Whether a card was made by this module, and replacing it loses nothing.

    Args:
        replaces: titles of sections that it may have, besides the sections that `model_card` always writes.
            Sections that the new card lacks are thus not lost.
    """
    own = {"Load it", "Model", "Memory", *replaces}
    return is_untouched(text) and set(re.findall(r"^## (.+)$", text, re.MULTILINE)) <= own


def is_untouched(text: str) -> bool:
    """Whether a card was made by this module and not edited since.

    Example:
        >>> is_untouched("# My model")
        False
    """
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _loading(config: OVQConfig, place: str, auto: str) -> str:
    """How to load the model: what must be installed, or imported so that its mixers are known."""
    mixers = [mixer_class(name) for name in config.mixer_types]
    has_ours = any(mixer.__module__.startswith("ovq_lab.") for mixer in mixers)
    packages = "The packages `ovq` and `ovq-lab`" if has_ours else "The package `ovq`"
    imports = "".join(f"import {name}  # registers a mixer\n" for name in modules_of_users(mixers))
    return _LOAD.format(packages=packages, imports=imports, place=place, auto=auto) + _best_rule(config)


def _best_rule(config: OVQConfig) -> str:
    """How to switch the model to the merge rule that recalls most; empty if it cannot or has it already."""
    if "ovq" not in config.mixer_types or not can_merge_best(
        config.merge, init=config.init, rate=Ablation.of(config.ablation).rate
    ):
        return ""
    return _BEST_RULE.format(merge=config.merge, best=BEST_MERGE)


def _described(model: Model) -> dict[str, str]:
    """Rows of the table of a model's properties."""
    config = model.config
    described = {
        "parameters": f"{model.num_parameters():,}",
        "layers": ", ".join(_runs(config.mixer_types)),
        "width": f"{config.hidden_size:,}, SwiGLU {config.intermediate_size:,}",
        "heads per layer": f"{config.num_attention_heads}, {config.num_key_value_heads} for keys and values, "
        f"each of {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if "ovq" in config.mixer_types:
        described |= {
            "slots per head": f"{config.num_slots:,}",
            "chunk size": f"{config.chunk_size:,}",
            "rule of the dictionary": f"merge {config.merge}, growth {config.growth}",
        }
    if "sliding_attention" in config.mixer_types:
        described["window"] = f"{config.sliding_window:,}"
    return described


def _runs(names: Sequence[str]) -> list[str]:
    """Runs of equal layers as text, `["3 x ovq", "full_attention"]`, or one repeated pattern of two."""
    pair = list(names[:2])
    if len(names) > 3 and len(set(pair)) == 2 and list(names) == pair * (len(names) // 2):
        return [f"{len(names) // 2} x ({', '.join(pair)})"]
    groups = [(name, len(list(group))) for name, group in itertools.groupby(names)]
    return [name if number == 1 else f"{number} x {name}" for name, number in groups]


def _memory(model: Model) -> str:
    """Table of the state's bytes after some lengths, beside those of a full KV cache."""
    config = model.config
    per_token = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    rows = [
        (
            f"{length:,}",
            format_bytes(model.state_bytes(length)),
            format_bytes(config.num_hidden_layers * per_token * length),
        )
        for length in _LENGTHS
    ]
    title = ("tokens read", "state of one sequence", "keys and values of all tokens in all layers")
    return markdown_table(title, rows)


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
        >>> print(markdown_table(("tokens", "bytes"), [("1", "64")]))
        | tokens | bytes |
        | --- | --- |
        | 1 | 64 |
    """
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
