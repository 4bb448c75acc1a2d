"""Of all OVQ layers that were measured, what recalls most: `OVQConfig.recommended` says how to train it, and
`ask_as_recommended` of a model how to use it."""

from __future__ import annotations

from typing import Any

from ovq.ops.options import BEST_MERGE

TO_TRAIN: dict[str, Any] = {"merge": "existing", "init": "novelty", "ablation": None}
"""Fields of `OVQConfig` while a model is trained."""

TO_TRAIN_UNLESS_GIVEN: dict[str, Any] = {"merge_gate": True}
"""Likewise, but any may be left out: the merge gate pays on recall of two kinds, on three seeds each, and
changes nothing on text (docs/results/rivals.md). There the forget gate pays, which costs recall
(docs/results/forgetting.md)."""

TO_ASK: dict[str, Any] = {"merge": BEST_MERGE}
"""Arguments of `set_merge` once it is trained: the weights stay what they are."""


def fields_to_train(given: dict[str, Any]) -> dict[str, Any]:
    """Given fields of a config, with those of `TO_TRAIN`, and those of `TO_TRAIN_UNLESS_GIVEN` if missing.

    Raises:
        ValueError: if one of `TO_TRAIN` is given another value.

    Example:
        >>> fields_to_train({"num_slots": 512})
        {'merge_gate': True, 'num_slots': 512, 'merge': 'existing', 'init': 'novelty', 'ablation': None}
        >>> fields_to_train({"merge": "nearest"})
        Traceback (most recent call last):
        ValueError: merge: expected 'existing', as is recommended, or OVQConfig(...), found 'nearest'
    """
    for name, value in TO_TRAIN.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"{name}: expected {value!r}, as is recommended, or OVQConfig(...), found {given[name]!r}"
            )
    return TO_TRAIN_UNLESS_GIVEN | given | TO_TRAIN
