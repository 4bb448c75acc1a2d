"""Defaults of mixers, written once: layers, `OVQConfig` and training take them from here."""

import inspect

from ovq.ops import ovq_attention

CONV_SIZE = 4
ROPE_THETA = 10000.0
LOGN_LENGTH = None
SLIDING_WINDOW = 128
NUM_SINKS = 4
# With the sinks 1,024 tokens, as in the paper's experiments.
SINK_WINDOW = 1020
NUM_SLOTS = 1024
CHUNK_SIZE = 128
MAMBA_STATE_SIZE = 128
VQ_DECAY = 0.99
COMMITMENT_WEIGHT = 0.1
KVM_CHUNK_SIZE = 256
KVM_WINDOW_CHUNKS = 2
# As in the published configuration that is nearest to ours (`kvm_swa_saturate1024_wd.yaml`).
KVM_GROWTH = "plateau"
KVM_SINKS = 1
KVM_NORM_LEAK = True
RAVEN_NOISE = True
MESA_STEPS = 30

# The op needs to be told the sizes of its dictionary; how it is learned has defaults there.
_OPTIONS = inspect.signature(ovq_attention).parameters
GROWTH = _OPTIONS["growth"].default
INIT = _OPTIONS["init"].default
MERGE = _OPTIONS["merge"].default
VALUE_WEIGHT = _OPTIONS["value_weight"].default
MERGE_GATE = False
FORGET_GATE = False
