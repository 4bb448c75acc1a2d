"""`Written`, which counts what operations write, so that tests of cost need no clock."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Written(TorchDispatchMode):
    """Counts the elements of the tensors that operations return, and those of the largest."""

    numel = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # Views write nothing.
        if all(a.alias_info is None or a.alias_info.is_write for a in function._schema.returns):
            sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.numel, self.largest = self.numel + sum(sizes), max(self.largest, *sizes, 0)
        return out
