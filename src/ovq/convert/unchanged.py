"""`Unchanged`: whether the modules and weights that a kernel replaces are still the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, getitem, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ovq.hf.block import CAPTURING
from ovq.layers.products import is_plain

_version = attrgetter("_version")
# Numbers of each weight that `Unchanged.samples` reads, at least.
_SAMPLES = 64


class Part(NamedTuple):
    """A module, its place among the `siblings` in its parent, and the class that it must have."""

    siblings: dict[str, nn.Module | None]
    name: str
    module: nn.Module
    kind: type[nn.Module]


class Unchanged:
    """A record of a model's modules and weights; true as long as they are the same.

    They are compared for every token, when the CPU's caches hold nothing but weights. So loops use `map`,
    which runs in C, over lists of what is compared.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._siblings, self._names, self._modules, self._kinds = (list(x) for x in zip(*parts, strict=True))
        self._attributes = [vars(module) for module in self._modules]
        self._forwards = [attributes.get("forward") for attributes in self._attributes]
        # If this is still the id of the next hook, none has been registered anywhere since.
        self._next_hook = -1
        found = [(x._parameters, name) for x in self._modules for name in x._parameters]
        self._owners, self._own_names = (list(x) for x in zip(*found, strict=True))
        # With None where there is none, such as a bias that may be added later.
        self._parameters: list[Any] = list(map(getitem, self._owners, self._own_names))
        self.weights: list[Tensor] = [x for x in self._parameters if x is not None]
        """All parameters of the modules."""
        self._places = list(map(Tensor.data_ptr, self.weights))
        # Tensors made in inference mode have no version counter, so changes cannot be detected.
        self._are_counted = not any(map(Tensor.is_inference, self.weights))
        self._versions = list(map(_version, self.weights)) if self._are_counted else []

    def samples(self) -> Tensor:
        """Some numbers of each weight, from all its rows and columns, and the modules' own numbers.

        Changes of `weight.data`, as adapters and averages of weights make them, count in no version.
        """
        own = [x.get(name, 0) for x in self._attributes for name in ("variance_epsilon", "scaling")]
        # An odd step, as columns are often a power of 2.
        some = [x.detach().view(-1)[:: x.numel() // _SAMPLES | 1] for x in self.weights]
        return torch.cat([*some, torch.tensor(own, dtype=torch.float64, device="cpu")])

    def __bool__(self) -> bool:
        """Whether all are the same, and the modules without hooks and not in training."""
        next_hook = RemovableHandle.next_id
        if next_hook != self._next_hook:
            if not all(map(is_plain, self._modules, self._kinds, repeat(CAPTURING))):
                return False
            self._next_hook = next_hook
        return (
            self._are_counted
            and all(map(is_, map(dict.get, self._siblings, self._names), self._modules))
            and all(map(is_, map(type, self._modules), self._kinds))
            and all(map(is_, map(dict.get, self._attributes, repeat("forward")), self._forwards))
            and not any(map(getitem, self._attributes, repeat("training")))
            and all(map(is_, map(dict.get, self._owners, self._own_names), self._parameters))
            and list(map(Tensor.data_ptr, self.weights)) == self._places
            and list(map(_version, self.weights)) == self._versions
        )
