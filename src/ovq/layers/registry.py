"""Registry of the mixers that a model can be built from, by name."""

from __future__ import annotations

from collections.abc import Iterable

from ovq.fields import ConfigField
from ovq.layers.base import Mixer
from ovq.layers.deltanet import GatedDeltaNet
from ovq.layers.mamba import Mamba2
from ovq.layers.ovq import OVQAttention
from ovq.layers.sinks import SinkAttention
from ovq.layers.softmax import FullAttention, SlidingWindowAttention
from ovq.plugins import find, register

#: `mixer_types` name -> class.
MIXERS: dict[str, type[Mixer]] = {
    "ovq": OVQAttention,
    "full_attention": FullAttention,
    "sliding_attention": SlidingWindowAttention,
    "sink_attention": SinkAttention,
    "gated_deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
}


def mixer_class(name: str) -> type[Mixer]:
    """Class of a mixer: a built-in or registered one, or one from an entry point of an installed package.

    Raises:
        ValueError: if the name is unknown, or its entry point is not a mixer.

    Example:
        >>> mixer_class("ovq").__name__
        'OVQAttention'
    """
    return find(MIXERS, name, base=Mixer, what="mixer")


def fields_of_mixers(names: Iterable[str]) -> dict[str, ConfigField]:
    """Config fields declared by these mixers, by name.

    Raises:
        ValueError: if a mixer is unknown, or two mixers declare different fields of the same name.

    Example:
        >>> list(fields_of_mixers(["sliding_attention", "sink_attention"]))
        ['output_gate', 'num_sinks', 'sink_window']
    """
    fields: dict[str, ConfigField] = {}
    for mixer in dict.fromkeys(names):
        for name, field in mixer_class(mixer).own_fields().items():
            if fields.setdefault(name, field) != field:
                raise ValueError(
                    f"{name}: expected one mixer to declare this field, found a different one of {mixer!r}"
                )
    return fields


def register_mixer(name: str, cls: type[Mixer]) -> None:
    """Register your own mixer for use in `mixer_types`, in this process.

    A package can do the same for all its users by an entry point of the group `ovq.mixers`.

    Args:
        name: its name in `mixer_types`, an identifier.
        cls: the class.

    Raises:
        ValueError: if the name is taken or not an identifier, or the class is not a `Mixer`.

    Example:
        >>> register_mixer("ovq", OVQAttention)  # again, which changes nothing
    """
    register(MIXERS, name, cls, base=Mixer, what="mixer")
