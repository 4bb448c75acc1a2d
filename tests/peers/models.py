"""The eight sets of mixers that the neighbours' suites run on."""

from ovq.hf import OVQForCausalLM
from tests.hf.common import make_model, of_mixers

#: Name -> the mixer of each layer. All mixers occur; two layers, as transformers' tests want them.
SETS = {
    "ovq_sliding": ["sliding_attention", "ovq"],
    "ovq_full": ["ovq", "full_attention"],
    "ovq_mamba2": ["mamba2", "ovq"],
    "vq_sinks": ["sink_attention", "vq"],
    "kvm_raven": ["raven", "kvm"],
    "deltanet_linear": ["gated_deltanet", "linear_attention"],
    "kda_mesanet": ["kda", "mesanet"],
    "fox_ovq": ["fox", "ovq"],
}


def make(name: str) -> OVQForCausalLM:
    """A model of one set, in float64, without random numbers in training."""
    sizes = of_mixers(SETS[name], num_sinks=2, sink_window=4, kvm_chunk_size=4, raven_noise=False)
    return make_model(num_hidden_layers=2, **sizes)
