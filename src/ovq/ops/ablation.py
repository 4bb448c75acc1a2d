"""`Ablation`: changes of parts of the layer for ablations, and their argument names of version 0.2."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ovq.fields import did_you_mean

BIASES = ("count", "count+norm")


def check_rate(name: str, rate: float | str) -> None:
    """Raise ValueError, naming the argument `name`, unless `rate` is `"count"` or a number in (0, 1]."""
    is_share = isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 < rate <= 1
    if rate != "count" and not is_share:
        raise ValueError(f"{name}: expected 'count' or a number in (0, 1], found {rate!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """Changes of parts of the layer for the ablations of the paper (docs/results/ablations.md).

    None of them improves the layer, so only the backends `naive` and `torch` support them.

    Attributes:
        bias: bias of the score scale q.D of a slot with mean D and count c: log c (`"count"`), or
            log c - scale |D|^2 / 2 (`"count+norm"`; the norm term cancels if all norms are equal). A token of
            the chunk acts as a slot of count 1.
        rate: step size of a slot's means towards each merged token, in order of position: 1 / count
            (`"count"`, the running mean), or a constant in (0, 1]. Counts add up either way. The backward
            cannot undo steps at a constant rate, so training stores the probabilities of every chunk.

    Raises:
        ValueError: if a value is out of range.
    """

    bias: str = "count"
    rate: float | str = "count"

    def __post_init__(self) -> None:
        if self.bias not in BIASES:
            raise ValueError(f"bias: expected one of {BIASES}, found {self.bias!r}")
        check_rate("rate", self.rate)

    @classmethod
    def of(cls, given: Ablation | Mapping[str, Any] | None) -> Ablation:
        """`Ablation` from a mapping of its fields; None gives the unchanged layer.

        Example:
            >>> Ablation.of({"rate": 0.5})
            Ablation(bias='count', rate=0.5)
        """
        if given is None:
            return UNCHANGED
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping) or not all(name in NAMES for name in given):
            raise ValueError(f"ablation: expected a mapping with keys among {NAMES}, found {given!r}")
        return cls(**given)

    @property
    def changes(self) -> dict[str, Any] | None:
        """Fields that differ from the unchanged layer, by name; None if there are none.

        Example:
            >>> Ablation(bias="count+norm").changes, Ablation().changes
            ({'bias': 'count+norm'}, None)
        """
        return {
            name: value for name, value in vars(self).items() if value != getattr(UNCHANGED, name)
        } or None


UNCHANGED = Ablation()
# Computed once here, as `torch.compile` cannot trace `dataclasses.fields`.
NAMES = tuple(field.name for field in dataclasses.fields(Ablation))


def with_earlier_names(
    ablation: Ablation | Mapping[str, Any] | None, earlier: Mapping[str, Any], function: Callable
) -> Ablation:
    """`Ablation` including fields passed as separate keywords, as in version 0.2; warns once for each.

    Args:
        ablation: the value of the argument `ablation`.
        earlier: other keywords.
        function: the function that received them, for error messages.

    Raises:
        TypeError: if a keyword never existed.
    """
    found = Ablation.of(ablation)
    for name in earlier:
        if name not in NAMES:
            message = f"{function.__name__}() got an unexpected keyword argument {name!r}"
            raise TypeError(message + did_you_mean(name, inspect.signature(function).parameters))
        _warn_of_earlier_name(name)
    return dataclasses.replace(found, **earlier) if earlier else found


def with_ablation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config with the fields of `Ablation` collected under `"ablation"`.

    Example:
        >>> with_ablation({"num_slots": 8, "bias": "count", "rate": 0.5})
        {'num_slots': 8, 'ablation': {'rate': 0.5}}
    """
    own = {name: fields[name] for name in NAMES if name in fields}
    others = {name: value for name, value in fields.items() if name not in own}
    if not own:
        return others
    return others | {"ablation": dataclasses.replace(Ablation.of(fields.get("ablation")), **own).changes}


@functools.cache
def _warn_of_earlier_name(name: str) -> None:
    warnings.warn(
        f"{name}: expected ablation={{{name!r}: ...}}, found an argument of its own, as it was until "
        "version 0.2",
        FutureWarning,
        stacklevel=4,
    )
