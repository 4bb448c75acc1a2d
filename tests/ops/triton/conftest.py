"""The interpreter takes some 10 ms a program: the tests launch few of those that share their work."""

import pytest


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """One round of merges by many programs; `finish` makes the others."""
    ward = pytest.importorskip(
        "ovq.ops.backends.triton.ward", reason="the extra ovq[triton] is not installed"
    )
    monkeypatch.setattr(ward, "ROUNDS", 1)
    monkeypatch.setattr(ward, "REFINED_EACH", 2)
