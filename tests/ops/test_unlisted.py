"""Options that are new to a backend are refused by name, and not taken for others that it knows."""

import dataclasses

import pytest
import torch

from ovq.convert import MemoryConfig
from ovq.ops import ablation, options, ovq_attention, slot_assignments
from ovq.ops.backends import BACKENDS, LEARNING, NAMES
from tests.ops.common import inputs

OPTIONS = {"num_slots": 8, "chunk_size": 4}

# Options that have names as values, and where the names are that are allowed.
NAMED = {"growth": "GROWTHS", "init": "INITS", "merge": "MERGES"}
ABLATIONS = {"bias": "BIASES", "rate": None}


def invent(monkeypatch, option, *, merges_pairs=False):
    """Allow a value that no backend has been written for, and give it as an argument."""
    module, where = (options, NAMED) if option in NAMED else (ablation, ABLATIONS)
    if where[option] is None:
        monkeypatch.setattr(module, f"check_{option}", lambda name, value: None)
    else:
        monkeypatch.setattr(module, where[option], (*getattr(module, where[option]), "invented"))
    if merges_pairs:
        monkeypatch.setitem(options.COUNT_POWERS, "invented", 2.0)
    return {option: "invented"} if option in NAMED else {"ablation": {option: "invented"}}


INVENTED = [*((name, False) for name in (*NAMED, *ABLATIONS)), ("merge", True)]


@pytest.mark.parametrize(("option", "merges_pairs"), INVENTED)
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_new_elsewhere_is_refused_by_every_backend(name, option, merges_pairs, monkeypatch):
    # The format of sums comes with a state (test_narrow.py).
    for of, where in ((options.Options, {*NAMED, "state_dtype"}), (ablation.Ablation, {*ABLATIONS})):
        assert {field.name for field in dataclasses.fields(of) if "str" in str(field.type)} == where
    given = invent(monkeypatch, option, merges_pairs=merges_pairs)
    q, k, v = inputs(1, 8, dtype=torch.float32)
    expected = rf"expected {option} .*'(count|novelty|immediate|nearest|number)'.*, found 'invented'"
    by = "'naive', the last that 'auto' tries" if name == "auto" else repr(name)
    with pytest.raises(ValueError, match=f"^backend: {by}: {expected}"):
        ovq_attention(q, k, v, backend=name, **OPTIONS, **given)
    if name in ("auto", *LEARNING):
        by = "'torch', the last that 'auto' tries" if name == "auto" else repr(name)
        with pytest.raises(ValueError, match=f"^backend: {by}: {expected}"):
            slot_assignments(k, v, backend=name, **OPTIONS, **given)


def test_a_rule_that_is_new_elsewhere_is_refused_by_what_has_rules_of_its_own(monkeypatch):
    invent(monkeypatch, "merge")
    with pytest.raises(ValueError, match=r"merge: expected one of .*'nearest'\], found 'invented'"):
        MemoryConfig(num_slots=[[4]], window=[[32]], merge="invented")


def test_an_option_that_backends_have_not_heard_of_is_known_to_none():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(options.Options):
        half_life: int = 5

    given = More(**OPTIONS, growth="plateau", init="novelty", merge="existing", seed=0)
    for backend in BACKENDS.values():
        assert "expected half_life" in backend.KNOWN.refusal(torch.float32, given)
        assert (
            backend.KNOWN.refusal(torch.float32, given, ["read_gate"]) == "expected no read_gate, found some"
        )


def test_names_of_version_0_2_are_taken_with_one_warning():
    q, k, v = inputs(1, 8, dtype=torch.float32)
    expected, _ = ovq_attention(q, k, v, **OPTIONS, ablation={"rate": 0.5})
    ablation._warn_of_earlier_name.cache_clear()
    with pytest.warns(FutureWarning, match=r"rate: expected ablation=\{'rate': \.\.\.\}") as caught:
        found, _ = ovq_attention(q, k, v, **OPTIONS, rate=0.5)
    assert torch.equal(found, expected)
    assert len(caught) == 1
    # Not warned of again, which would be an error here.
    slots = slot_assignments(k, v, **OPTIONS, rate=0.5).slots
    assert torch.equal(slots, slot_assignments(k, v, **OPTIONS, ablation={"rate": 0.5}).slots)
    ablation._warn_of_earlier_name.cache_clear()
    for wrong in ("ablatio", "rates"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
            ovq_attention(q, k, v, **OPTIONS, **{wrong: 0.5})
    with pytest.raises(
        ValueError, match=r"ablation: expected a mapping with keys among .*, found {'scale': 1}"
    ):
        ovq_attention(q, k, v, **OPTIONS, ablation={"scale": 1})
