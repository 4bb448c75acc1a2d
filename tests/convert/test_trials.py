"""Options that share what they learn lose what each loses by itself, bit by bit."""

import pytest
import torch

from ovq.convert import Option
from ovq.convert.cache import MemoryLayer
from ovq.convert.captures import Captured
from ovq.convert.trials import _Heads, trials

OPTIONS = [Option(num_slots=n, window=w) for w in (8, 24, 160, 40) for n in (0, 8, 32)]


def heads(num=20, length=100, num_queries=40):
    """Heads on a text; in some the keys of the first tokens are so long that the unit of keys differs."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, num, length, 4, generator=generator) for _ in range(2))
    k = torch.nn.functional.normalize(k, dim=-1)
    k[:, :5, :10] *= 8
    q, o, g = (torch.randn(1, 2 * num, num_queries, 4, generator=generator) for _ in range(3))
    return Captured(q=q, k=k, v=v, o=o, g=g, num_targets=num_queries)


@pytest.mark.parametrize(
    ("merge", "is_compiled"), [("nearest", True), ("existing", True), ("nearest", False)]
)
def test_options_lose_together_what_they_lose_alone(merge, is_compiled, monkeypatch):
    if not is_compiled:
        for module in ("convert.compiled", "ops.backends.cpu"):
            monkeypatch.setattr(f"ovq.{module}.is_available", lambda: False)
    captured, num_learned = heads(), []
    given = {"chunk_size": 8, "merge": merge, "value_weight": [[0.5] * 7 + [1.0] * 13]}
    given["key_exponents"] = [[[1, 0, -1, 0]] * 20]
    if merge != "existing":
        given["token_use"] = [[[0.5] * 8 + [0.0]] * 20]
    alone = [trials([captured], [option], 2, given)[:, 0] for option in OPTIONS]
    learn = MemoryLayer.learn
    monkeypatch.setattr(
        MemoryLayer, "learn", lambda self, k, v: (num_learned.append(k.shape[1:3]), learn(self, k, v))[1]
    )
    found = trials([captured], OPTIONS, 2, given)
    assert torch.equal(found, torch.stack(alone, 1))
    # Of the tokens before the queries, three parts of the heads read all once for each number of slots, and
    # those whose units differ once for each option.
    options = sorted(OPTIONS[1::3], key=lambda o: -o.window)
    parts = _Heads([captured], 2, given).parts(torch.arange(20), options)
    assert sum(len(part) for part, is_shared in parts if not is_shared) == 5
    assert sum(num for num, length in num_learned if length == 60) == 20 + 2 * (15 + 5 * 4)


def test_heads_are_tried_with_what_is_wanted_alone():
    captured, given = heads(), {"chunk_size": 8, "merge": "nearest", "value_weight": 1.0}
    wanted = torch.rand(20, len(OPTIONS), generator=torch.Generator().manual_seed(1)) < 0.3
    num_tried = []
    found = trials([captured], OPTIONS, 2, given, wanted=wanted, progress=num_tried.append)
    assert torch.equal(found, trials([captured], OPTIONS, 2, given).where(wanted, 0))
    assert sum(num_tried) == int(wanted.sum())
    # The heads of several layers, as those of one.
    names = ("q", "k", "v", "o", "g")
    parts = [{name: getattr(captured, name).chunk(2, 1)[i] for name in names} for i in range(2)]
    layers = [Captured(**part, num_targets=captured.num_targets) for part in parts]
    assert torch.equal(found, trials(layers, OPTIONS, 2, given, wanted=wanted))
