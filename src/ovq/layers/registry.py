"""The mixers a model can be built from, by name."""

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
    """The class of a mixer: one of ours, a registered one, or one that an installed package offers.

    Raises:
        ValueError: if the name is unknown, or what a package offers under it is no mixer.

    Example:
        >>> mixer_class("ovq").__name__
        'OVQAttention'
    """
    return find(MIXERS, name, base=Mixer, what="mixer")


def fields_of_mixers(names: Iterable[str]) -> dict[str, ConfigField]:
    """The fields that a config has for these mixers, by name.

    Raises:
        ValueError: for an unknown mixer, or if two declare fields of one name that are not the same.

    Example:
        >>> list(fields_of_mixers(["ovq", "sink_attention"]))
        ['num_sinks', 'sink_window']
    """
    fields: dict[str, ConfigField] = {}
    for mixer in dict.fromkeys(names):
        for name, field in mixer_class(mixer).own_fields().items():
            if fields.setdefault(name, field) != field:
                raise ValueError(f"{name}: expected one mixer that declares it, found another, {mixer!r}")
    return fields


def register_mixer(name: str, cls: type[Mixer]) -> None:
    """Make a mixer of your own usable in `mixer_types`, in this process.

    A package does the same for all who install it by an entry point of the group `ovq.mixers`.

    Args:
        name: its name in `mixer_types`, an identifier.
        cls: the class.

    Raises:
        ValueError: if the name is taken or no identifier, or the class is no `Mixer`.

    Example:
        >>> register_mixer("ovq", OVQAttention)  # again, which changes nothing
    """
    register(MIXERS, name, cls, base=Mixer, what="mixer")
