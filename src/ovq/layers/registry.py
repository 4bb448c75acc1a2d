"""The mixers a model can be built from, by name."""

from __future__ import annotations

from ovq.fields import did_you_mean
from ovq.layers.base import Mixer
from ovq.layers.deltanet import GatedDeltaNet
from ovq.layers.kvm import KVMAttention
from ovq.layers.linear import LinearAttention
from ovq.layers.mamba import Mamba2
from ovq.layers.ovq import OVQAttention
from ovq.layers.raven import RavenAttention
from ovq.layers.sinks import SinkAttention
from ovq.layers.softmax import FullAttention, SlidingWindowAttention
from ovq.layers.vq import VQAttention

#: `mixer_types` name -> class.
MIXERS: dict[str, type[Mixer]] = {
    "ovq": OVQAttention,
    "full_attention": FullAttention,
    "sliding_attention": SlidingWindowAttention,
    "sink_attention": SinkAttention,
    "vq": VQAttention,
    "kvm": KVMAttention,
    "raven": RavenAttention,
    "linear_attention": LinearAttention,
    "gated_deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
}


def mixer_class(name: str) -> type[Mixer]:
    """The class of a mixer.

    Raises:
        ValueError: if the name is unknown.

    Example:
        >>> mixer_class("ovq").__name__
        'OVQAttention'
    """
    if name not in MIXERS:
        raise ValueError(
            f"expected a mixer among {sorted(MIXERS)}, found {name!r}{did_you_mean(name, MIXERS)}"
        )
    return MIXERS[name]
