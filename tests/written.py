"""Modes: `Written` counts what operations write, so that tests of cost need no clock; `Called` names them."""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ovq.ops import transforms
from ovq.ops.backends.cpu import build


class Written(TorchDispatchMode):
    """Counts the elements of the tensors that operations return, and those of the largest.

    Kernels run under it, unlike under other modes: what they are given and return is counted.
    """

    numel = largest = 0

    def __enter__(self):
        self._unwatched = mock.patch.object(transforms, "is_watched", return_value=False)
        self._unwatched.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._unwatched.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # Views write nothing.
        if all(a.alias_info is None or a.alias_info.is_write for a in function._schema.returns):
            sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.numel, self.largest = self.numel + sum(sizes), max(self.largest, *sizes, 0)
        return out


class Called(TorchDispatchMode):
    """Notes the names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def without_kernels():
    """A context in which there are no compiled kernels."""
    return mock.patch.object(build, "load", side_effect=build.SwitchedOff("by a test"))


def seen_by_mode(function):
    """What a function returns under a mode, which is checked to see all that is computed without kernels."""
    with Called() as seen:
        found = function()
    with without_kernels(), Called() as plain:
        function()
    assert seen.names == plain.names
    return found
