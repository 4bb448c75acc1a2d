"""Sequence mixers as PyTorch layers. Imports neither transformers nor Triton."""

from ovq.fields import ConfigField
from ovq.layers.base import Mixer
from ovq.layers.cache import LayerCache, MixerCache
from ovq.layers.common import ShortConvolution
from ovq.layers.constant import ConstantStateMixer
from ovq.layers.deltanet import GatedDeltaNet
from ovq.layers.heads import AttentionMixer
from ovq.layers.layout import SequenceLayout
from ovq.layers.mamba import Mamba2
from ovq.layers.ovq import OVQAttention
from ovq.layers.registry import MIXERS, mixer_class, register_mixer
from ovq.layers.sinks import SinkAttention
from ovq.layers.softmax import FullAttention, SlidingWindowAttention
from ovq.moved import moved_mixer as __getattr__  # noqa: F401  (Python calls it)

__all__ = [
    "MIXERS",
    "AttentionMixer",
    "ConfigField",
    "ConstantStateMixer",
    "FullAttention",
    "GatedDeltaNet",
    "LayerCache",
    "Mamba2",
    "Mixer",
    "MixerCache",
    "OVQAttention",
    "SequenceLayout",
    "ShortConvolution",
    "SinkAttention",
    "SlidingWindowAttention",
    "mixer_class",
    "register_mixer",
]
