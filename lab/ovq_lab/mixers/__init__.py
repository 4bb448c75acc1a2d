"""Mixers that OVQ is compared with, besides those of `ovq.layers`. Imports no transformers and no Triton."""

from ovq.layers.registry import MIXERS, mixer_class
from ovq.plugins import LABORATORY
from ovq_lab.mixers.fox import ForgettingAttention
from ovq_lab.mixers.kda import KimiDeltaAttention
from ovq_lab.mixers.kvm import KVMAttention
from ovq_lab.mixers.linear import LinearAttention
from ovq_lab.mixers.mesanet import MesaNet
from ovq_lab.mixers.raven import RavenAttention
from ovq_lab.mixers.vq import VQAttention

# Registers them: from here on `MIXERS` has them too.
for _name in LABORATORY["mixer"]:
    mixer_class(_name)

__all__ = [
    "MIXERS",
    "ForgettingAttention",
    "KVMAttention",
    "KimiDeltaAttention",
    "LinearAttention",
    "MesaNet",
    "RavenAttention",
    "VQAttention",
]
