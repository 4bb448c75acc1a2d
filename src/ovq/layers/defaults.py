"""Default values shared by layers, `OVQConfig` and training."""

import inspect

from ovq.ops import ovq_attention

CONV_SIZE = 4
ROPE_THETA = 10000.0
LOGN_LENGTH = None
SLIDING_WINDOW = 128
NUM_SLOTS = 1024
CHUNK_SIZE = 128

# Update rule options have defaults in the op, unlike the sizes of the dictionary.
_OPTIONS = inspect.signature(ovq_attention).parameters
GROWTH = _OPTIONS["growth"].default
INIT = _OPTIONS["init"].default
MERGE = _OPTIONS["merge"].default
VALUE_WEIGHT = _OPTIONS["value_weight"].default
MERGE_GATE = False
FORGET_GATE = False
