"""`Known`: what a backend can run, in one declaration. Everything else it refuses by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from ovq.ops.options import Options

# Fields of `Options` that are sizes and factors, which every backend takes as they come, and `Ablation`.
_NOT_NAMED = frozenset(
    {"num_slots", "chunk_size", "seed", "value_weight", "mass_power", "weighs_chunk", "ablation"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """The values of options that a backend knows; one that is new elsewhere is not taken for another.

    Attributes:
        dtypes: of queries, keys and values.
        growth, init, merge: names of schedules and rules.
        bias, rate: of `Ablation`; `"number"` stands for all numbers.
        gates: arguments with a number for each token that it takes.

    Example:
        >>> rules = {"growth": ("plateau",), "init": ("novelty",), "merge": ("existing",)}
        >>> known = Known(dtypes=(torch.float32,), **rules, gates=())
        >>> options = {"num_slots": 8, "chunk_size": 4, "growth": "plateau", "init": "novelty", "seed": 0}
        >>> known.refusal(torch.float32, Options(**options, merge="existing"))
        >>> known.refusal(torch.float32, Options(**options, merge="updated"))
        "expected merge 'existing', found 'updated'"
    """

    dtypes: tuple[torch.dtype, ...]
    growth: tuple[str, ...]
    init: tuple[str, ...]
    merge: tuple[str, ...]
    bias: tuple[str, ...] = ("count",)
    rate: tuple[str, ...] = ("count",)
    gates: tuple[str, ...]

    def refusal(self, dtype: torch.dtype, options: Options, gates: Iterable[str] = ()) -> str | None:
        """Why a call cannot be run, as "expected ..., found ..."; None if nothing is new to the backend.

        Args:
            dtype: of queries, keys and values.
            options: the settings of the dictionary.
            gates: the arguments with a number for each token that the call has.
        """
        if dtype not in self.dtypes:
            return f"expected a dtype of {self.dtypes}, found {dtype}"
        for name in gates:
            if name not in self.gates:
                return f"expected no {name}, found some"
        for owner in (options, options.ablation):
            # In a graph that is being made `vars` cannot be asked, nor `dataclasses.fields`.
            for name in owner.__dataclass_fields__:
                if name in _NOT_NAMED:
                    continue
                found = getattr(owner, name)
                # An option that this file has not heard of is known nowhere.
                known: Sequence[str] = getattr(self, name, ())
                if ("number" if isinstance(found, int | float) else found) not in known:
                    expected = repr(known[0]) if len(known) == 1 else f"to be one of {known}"
                    return f"expected {name} {expected}, found {found!r}"
        return None
