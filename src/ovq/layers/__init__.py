"""Sequence mixers as PyTorch layers. Imports neither transformers nor Triton."""

from ovq.layers.base import Mixer
from ovq.layers.cache import KeyValueCache, MixerCache, SlotCache
from ovq.layers.common import ShortConvolution
from ovq.layers.layout import SequenceLayout
from ovq.layers.ovq import OVQAttention
from ovq.layers.registry import MIXERS, mixer_class
from ovq.layers.softmax import FullAttention, SlidingWindowAttention

__all__ = [
    "MIXERS",
    "FullAttention",
    "KeyValueCache",
    "Mixer",
    "MixerCache",
    "OVQAttention",
    "SequenceLayout",
    "ShortConvolution",
    "SlidingWindowAttention",
    "SlotCache",
    "mixer_class",
]
