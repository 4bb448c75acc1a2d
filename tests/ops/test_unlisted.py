"""Options that are new to a backend are refused by name, and not taken for others that it knows."""

import dataclasses

import pytest
import torch

from ovq.convert import MemoryConfig
from ovq.ops import options, ovq_attention, slot_assignments
from ovq.ops.backends import NAMES
from tests.ops.common import inputs

OPTIONS = {"num_slots": 8, "chunk_size": 4}

# Options that have names as values, and where the names are that are allowed.
NAMED = {"growth": "GROWTHS", "init": "INITS", "merge": "MERGES", "bias": "BIASES", "rate": None}


def invent(monkeypatch, option, *, merges_pairs=False):
    """Allow a value that no backend has been written for."""
    if NAMED[option] is None:
        monkeypatch.setattr(options, f"check_{option}", lambda name, value: None)
    else:
        monkeypatch.setattr(options, NAMED[option], (*getattr(options, NAMED[option]), "invented"))
    if merges_pairs:
        monkeypatch.setitem(options.COUNT_POWERS, "invented", 2.0)


INVENTED = [*((name, False) for name in NAMED), ("merge", True)]


@pytest.mark.parametrize(("option", "merges_pairs"), INVENTED)
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_new_elsewhere_is_refused_by_every_backend(name, option, merges_pairs, monkeypatch):
    with_names = {field.name for field in dataclasses.fields(options.Options) if "str" in str(field.type)}
    assert with_names == NAMED.keys()
    invent(monkeypatch, option, merges_pairs=merges_pairs)
    q, k, v = inputs(1, 8, dtype=torch.float32)
    expected = rf"expected {option} .*'(count|novelty|immediate|nearest|number)'.*, found 'invented'"
    by = "'naive', the last that 'auto' tries" if name == "auto" else repr(name)
    with pytest.raises(ValueError, match=f"^backend: {by}: {expected}"):
        ovq_attention(q, k, v, backend=name, **{**OPTIONS, option: "invented"})
    if name in ("auto", "torch", "cpu") and option != "bias":
        by = "torch" if name == "auto" else name
        with pytest.raises(ValueError, match=f"^backend: '{by}': {expected}"):
            slot_assignments(k, v, backend=name, **{**OPTIONS, option: "invented"})


def test_a_rule_that_is_new_elsewhere_is_refused_by_what_has_rules_of_its_own(monkeypatch):
    invent(monkeypatch, "merge")
    with pytest.raises(ValueError, match=r"merge: expected one of .*'nearest'\), found 'invented'"):
        MemoryConfig(num_slots=[[4]], window=[[32]], merge="invented")
