"""A fuzzer of the op, of states and of caches: random programs, each against a plain way to the same result.

    python -m tests.fuzz --backend torch --calls 10000 --seed 0

A program is data: a dataclass of numbers and names that `draw` makes from a seed and `check` runs. So a
failure is printed as a line of Python that runs alone, and is made smaller by trying simpler values of its
fields.

    backends.py  who runs the op
    program.py   what programs have in common: how they are written down and made smaller
    options.py   options of the dictionary
    tensors.py   tokens, and the ways they may lie in memory
    op.py        one call of `ovq_attention`, against `naive` on each row alone, from its first token on
    states.py    operations on `OVQState`, against the tokens of each row read anew
    caches.py    operations on the cache of a model, against each row read anew
    run.py       many programs, counted and timed
"""

import os

import torch

# Before anything imports Triton: its own functions are made for its interpreter or for a GPU when they are
# read.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
