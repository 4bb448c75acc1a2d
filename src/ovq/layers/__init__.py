"""Sequence mixers as PyTorch layers. Imports neither transformers nor Triton."""

from ovq.layers.base import AttentionMixer, Mixer
from ovq.layers.cache import LayerCache, MixerCache
from ovq.layers.common import ShortConvolution
from ovq.layers.constant import ConstantStateMixer
from ovq.layers.deltanet import GatedDeltaNet
from ovq.layers.kda import KimiDeltaAttention
from ovq.layers.kvm import KVMAttention
from ovq.layers.layout import SequenceLayout
from ovq.layers.linear import LinearAttention
from ovq.layers.mamba import Mamba2
from ovq.layers.mesanet import MesaNet
from ovq.layers.ovq import OVQAttention
from ovq.layers.raven import RavenAttention
from ovq.layers.registry import MIXERS, mixer_class, register_mixer
from ovq.layers.sinks import SinkAttention
from ovq.layers.softmax import FullAttention, SlidingWindowAttention
from ovq.layers.vq import VQAttention

__all__ = [
    "MIXERS",
    "AttentionMixer",
    "ConstantStateMixer",
    "FullAttention",
    "GatedDeltaNet",
    "KVMAttention",
    "KimiDeltaAttention",
    "LayerCache",
    "LinearAttention",
    "Mamba2",
    "MesaNet",
    "Mixer",
    "MixerCache",
    "OVQAttention",
    "RavenAttention",
    "SequenceLayout",
    "ShortConvolution",
    "SinkAttention",
    "SlidingWindowAttention",
    "VQAttention",
    "mixer_class",
    "register_mixer",
]
