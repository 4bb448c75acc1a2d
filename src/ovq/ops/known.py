"""`Known`: declaration of the options that a backend supports; all others are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from ovq.ops.options import Options

# Unchecked fields of `Options`: sizes and factors, and `Ablation`, whose own fields are checked.
_NOT_NAMED = frozenset(
    {"num_slots", "chunk_size", "seed", "value_weight", "mass_power", "weighs_chunk", "ablation"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """The option values that a backend supports. It refuses new values, instead of running something else.

    Attributes:
        dtypes: supported dtypes of queries, keys and values.
        growth, init, merge: names of supported schedules and rules.
        bias, rate: supported values of `Ablation`; `"number"` stands for any number.
        gates: names of supported per-token gates.
        state_dtype: supported formats of the sums.
    """

    dtypes: tuple[torch.dtype, ...]
    growth: tuple[str, ...]
    init: tuple[str, ...]
    merge: tuple[str, ...]
    bias: tuple[str, ...] = ("count",)
    rate: tuple[str, ...] = ("count",)
    gates: tuple[str, ...]
    state_dtype: tuple[str, ...] = ("float32",)

    def refusal(self, dtype: torch.dtype, options: Options, gates: Iterable[str] = ()) -> str | None:
        """Why the backend cannot run a call, as "expected ..., found ..."; None if it can.

        Args:
            dtype: dtype of queries, keys and values.
            options: the settings of the dictionary.
            gates: names of the per-token gates of the call.
        """
        if dtype not in self.dtypes:
            return f"expected a dtype of {self.dtypes}, found {dtype}"
        for name in gates:
            if name not in self.gates:
                return f"expected no {name}, found some"
        for owner in (options, options.ablation):
            # `torch.compile` can trace neither `vars` nor `dataclasses.fields`.
            for name in owner.__dataclass_fields__:
                if name in _NOT_NAMED:
                    continue
                found = getattr(owner, name)
                # An option without a field in `Known` is supported nowhere.
                known: Sequence[str] = getattr(self, name, ())
                if ("number" if isinstance(found, int | float) else found) not in known:
                    expected = repr(known[0]) if len(known) == 1 else f"to be one of {known}"
                    return f"expected {name} {expected}, found {found!r}"
        return None
