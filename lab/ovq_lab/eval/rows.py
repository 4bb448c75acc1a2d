"""Result rows, and the display names of models in tables, figures and sentences."""

from __future__ import annotations

import dataclasses
import math

from ovq_lab.mixers.names import MIXER_NAMES

MERGE_NAMES = {"updated": "updated", "ward": "Ward", "ward-sqrt": "Ward-sqrt", "nearest": "nearest"}
"""Display names of the merge rules; the paper's, `"existing"`, is not named. Ward's occur in files of earlier
versions."""

LOGN = "log-n"
"""Label of models whose logits are scaled beyond the training length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRow:
    """Fields that all results of a model have.

    Attributes:
        mixer: The long-range mixer, as in `mixer_types`; `"converted"` or `"pretrained"` for models of
            other libraries.
        num_slots: Slots of its dictionary during the test; `None` if it has none.
        length: Tokens per example.
        state_bytes: Bytes of the model's state for one sequence of this length.
        merge: The merge rule during the test, as in `OVQConfig.merge`; `None` without a dictionary, and in
            files written before rows had this field.
        logn_length: Tokens beyond which logits were scaled, as in `OVQConfig.logn_length`; `None` for none.
        state_dtype: Format of the slots; `None` for float32, and without a dictionary.
    """

    mixer: str
    num_slots: int | None
    length: int
    state_bytes: int
    merge: str | None = None
    logn_length: int | None = None
    state_dtype: str | None = None

    @property
    def label(self) -> str:
        """The model's display name."""
        others = {field: getattr(self, field) for field in ("merge", "logn_length", "state_dtype")}
        return model_label(self.mixer, self.num_slots, getattr(self, "name", ""), **others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedRow(ModelRow):
    """A result of one of several models that a user compares.

    Attributes:
        name: The model's name; empty to name it by its mixer.
    """

    name: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultRow(NamedRow):
    """The accuracy of one model at one length.

    Attributes:
        accuracy: Share of the asked tokens that were answered correctly.
        num_questions: Asked tokens.
        slices: Accuracy on the slices of the task, by name.
        mean_error: Mean error, for tasks that have one (`Task.error_name`); `None` for others.
        slice_errors: Mean error on each slice, by name; empty for others.

    Example:
        >>> fields = dict(length=256, accuracy=1.0, state_bytes=0, num_questions=1, slices={})
        >>> ResultRow(mixer="ovq", num_slots=64, merge="nearest", **fields).label
        'OVQ, nearest, 64 slots'
    """

    accuracy: float
    num_questions: int
    slices: dict[str, float]
    mean_error: float | None = None
    slice_errors: dict[str, float] = dataclasses.field(default_factory=dict)


def model_label(
    mixer: str,
    num_slots: int | None,
    name: str = "",
    *,
    merge: str | None = None,
    logn_length: int | None = None,
    state_dtype: str | None = None,
) -> str:
    """Display name of a model in tables, figures and sentences.

    `name` replaces the mixer's name; the other arguments are fields of `ModelRow`.

    Example:
        >>> model_label("gated_deltanet", None), model_label("ovq", 64, "big", logn_length=256)
        ('Gated DeltaNet', 'big, 64 slots, log-n')
        >>> model_label("ovq", 64, state_dtype="int8")
        'OVQ, 64 slots in int8'
    """
    parts = [name or MIXER_NAMES.get(mixer, mixer)]
    if merge in MERGE_NAMES:
        parts.append(MERGE_NAMES[merge])
    if num_slots is not None:
        parts.append(f"{num_slots} slots" + ("" if state_dtype is None else f" in {state_dtype}"))
    if logn_length is not None:
        parts.append(LOGN)
    return ", ".join(parts)


def short_number(value: float) -> str:
    """Format a number in as few characters as possible.

    Example:
        >>> [short_number(value) for value in (0.25, 512, 1024, 65536, 3000)]
        ['0.25', '512', '1k', '64k', '3000']
    """
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value:g}" if value < 1000 or not math.isclose(value, round(value)) else f"{value:.0f}"
