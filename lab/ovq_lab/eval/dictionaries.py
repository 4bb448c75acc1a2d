"""The dictionaries that one model is tested with: other numbers of slots, other rules, the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ovq.hf import OVQConfig
from ovq.ops.options import current_merge
from ovq_lab.eval.rows import MERGE_NAMES


class Dictionary(NamedTuple):
    """What the OVQ layers of a model remember with during a test.

    Attributes:
        num_slots: Slots per layer; `None` for a model without OVQ layers.
        merge: The rule that keeps them, as `OVQConfig.merge` names it; `None` likewise.
    """

    num_slots: int | None = None
    merge: str | None = None

    @property
    def note(self) -> str:
        """What a progress report says before other words; empty for a model without OVQ layers.

        Example:
            >>> Dictionary(64, "nearest").note, Dictionary(64, "existing").note, Dictionary().note
            ('nearest, 64 slots, ', '64 slots, ', '')
        """
        rule = f"{MERGE_NAMES[self.merge]}, " if self.merge in MERGE_NAMES else ""
        return rule if self.num_slots is None else f"{rule}{self.num_slots} slots, "


def dictionaries_to_test(
    config: PreTrainedConfig, *, num_slots: Sequence[int] = (), merges: Sequence[str] = ()
) -> list[Dictionary]:
    """Each number of slots with each rule.

    Args:
        config: That of the model. Without OVQ layers, or of another kind, it has one to test: none.
        num_slots: The numbers; if empty, the one that the model has.
        merges: The rules, as `OVQConfig.merge` names them; if empty, the one that the model has.

    Example:
        >>> dictionaries_to_test(OVQConfig(num_slots=64), merges=["existing", "nearest"])
        [Dictionary(num_slots=64, merge='existing'), Dictionary(num_slots=64, merge='nearest')]
        >>> dictionaries_to_test(OVQConfig(mixer_types=["mamba2"], num_hidden_layers=1), num_slots=[64])
        [Dictionary(num_slots=None, merge=None)]
    """
    if not isinstance(config, OVQConfig) or "ovq" not in config.mixer_types:
        return [Dictionary()]
    return [
        Dictionary(slots, merge)
        for slots in num_slots or (config.num_slots,)
        for merge in dict.fromkeys(map(current_merge, merges or (config.merge,)))
    ]


def each_dictionary(model: Any, tested: Sequence[Dictionary]) -> Iterator[Dictionary]:
    """Give a model one dictionary after the other, in evaluation mode, and at the end what it had.

    Its own rule keeps its growth; the others have the growth that they are meant for.

    Raises:
        ValueError: If a rule does not exist or does not fit the model.

    Example:
        >>> from ovq.hf import OVQForCausalLM
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = OVQForCausalLM(config)
        >>> tested = dictionaries_to_test(config, num_slots=[16, 64], merges=["nearest"])
        >>> [(found.num_slots, model.config.num_slots, model.config.merge)
        ...     for found in each_dictionary(model, tested)]
        [(16, 16, 'nearest'), (64, 64, 'nearest')]
        >>> model.config.num_slots, model.config.merge
        (1024, 'existing')
    """
    has_slots = isinstance(model.config, OVQConfig) and "ovq" in model.config.mixer_types
    own = Dictionary(model.config.num_slots, model.config.merge) if has_slots else Dictionary()
    growth, was_training = getattr(model.config, "growth", None), model.training

    def give(dictionary: Dictionary) -> None:
        slots, merge = dictionary
        if slots is not None and slots != model.config.num_slots:
            model.set_num_slots(slots)
        if merge is not None and merge != model.config.merge:
            model.set_merge(merge, growth=growth if merge == own.merge else None)

    model.eval()
    try:
        for dictionary in tested:
            give(dictionary)
            yield dictionary
    finally:
        give(own)
        model.train(was_training)
