"""Of all OVQ layers that were measured, what recalls most: `OVQConfig.recommended` says how to train it, and
`ask_as_recommended` of a model how to ask it."""

from __future__ import annotations

from typing import Any

from ovq.ops.options import BEST_MERGE

TO_TRAIN: dict[str, Any] = {"merge": "existing", "init": "novelty", "rate": "count", "merge_gate": False}
"""Fields of `OVQConfig` while a model is trained. The merge gate has paid on one seed of one task, and no
more is known of it (docs/results.md, section 7)."""

TO_ASK: dict[str, Any] = {"merge": BEST_MERGE}
"""Arguments of `set_merge` once it is trained: the weights stay what they are."""


def fields_to_train(given: dict[str, Any]) -> dict[str, Any]:
    """Given fields of a config, with those of `TO_TRAIN`.

    Raises:
        ValueError: if one of these is given another value.

    Example:
        >>> fields_to_train({"num_slots": 512})["merge"]
        'existing'
        >>> fields_to_train({"merge": "ward"})
        Traceback (most recent call last):
        ValueError: merge: expected 'existing', as is recommended, or OVQConfig(...), found 'ward'
    """
    for name, value in TO_TRAIN.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"{name}: expected {value!r}, as is recommended, or OVQConfig(...), found {given[name]!r}"
            )
    return given | TO_TRAIN
