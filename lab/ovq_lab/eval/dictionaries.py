"""The dictionaries that one model is tested with: numbers of slots and merge rules, on the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ovq.hf import OVQConfig
from ovq.ops.options import current_merge
from ovq.runtime.modes import evaluating
from ovq_lab.eval.rows import MERGE_NAMES


class Dictionary(NamedTuple):
    """Dictionary settings of the OVQ layers of a model during a test."""

    num_slots: int | None = None
    merge: str | None = None

    @property
    def note(self) -> str:
        """Prefix of progress reports; empty for a model without OVQ layers.

        Example:
            >>> Dictionary(64, "nearest").note, Dictionary(64, "existing").note, Dictionary().note
            ('nearest, 64 slots, ', '64 slots, ', '')
        """
        rule = f"{MERGE_NAMES[self.merge]}, " if self.merge in MERGE_NAMES else ""
        return rule if self.num_slots is None else f"{rule}{self.num_slots} slots, "


def dictionaries_to_test(
    config: PreTrainedConfig, *, num_slots: Sequence[int] = (), merges: Sequence[str] = ()
) -> list[Dictionary]:
    """All combinations of numbers of slots and merge rules.

    Args:
        config: The model's config. Models without OVQ layers are tested once, with `Dictionary()`.
        num_slots: Numbers of slots; if empty, the model's own.
        merges: Merge rules, as in `OVQConfig.merge`; if empty, the model's own.
    """
    if not isinstance(config, OVQConfig) or "ovq" not in config.mixer_types:
        return [Dictionary()]
    return [
        Dictionary(slots, merge)
        for slots in num_slots or (config.num_slots,)
        for merge in dict.fromkeys(map(current_merge, merges or (config.merge,)))
    ]


def each_dictionary(model: Any, tested: Sequence[Dictionary]) -> Iterator[Dictionary]:
    """Set a model to one dictionary after the other, in evaluation mode; restore its own at the end.

    The model's own merge rule keeps its growth schedule; other rules use their default schedules.
    """
    has_slots = isinstance(model.config, OVQConfig) and "ovq" in model.config.mixer_types
    own = Dictionary(model.config.num_slots, model.config.merge) if has_slots else Dictionary()
    growth = getattr(model.config, "growth", None)

    def give(dictionary: Dictionary) -> None:
        slots, merge = dictionary
        if slots is not None and slots != model.config.num_slots:
            model.set_num_slots(slots)
        if merge is not None and merge != model.config.merge:
            model.set_merge(merge, growth=growth if merge == own.merge else None)

    with evaluating(model):
        try:
            for dictionary in tested:
                give(dictionary)
                yield dictionary
        finally:
            give(own)
