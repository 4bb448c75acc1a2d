"""Models small enough for every test here: one of OVQ and softmax attention, one of the other mixers."""

import torch

from ovq.hf import OVQConfig, OVQForCausalLM

SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "mixer_types": ["sliding_attention", "ovq", "full_attention", "ovq"],
    "sliding_window": 5,
    "num_slots": 9,
    # Short chunks and a large spread of weights: decoding crosses many chunk ends, and logits do not tie.
    "chunk_size": 4,
    "conv_size": 3,
    "initializer_range": 0.3,
}

#: Changes to `SIZES` that make a model of the mixers OVQ is compared with, all but softmax attention.
BASELINES = {
    "mixer_types": [
        *("sink_attention", "vq", "linear_attention", "gated_deltanet", "mamba2", "kvm", "raven", "kda"),
        *("mesanet", "fox"),
    ],
    "num_hidden_layers": 10,
    "num_sinks": 2,
    "sink_window": 4,
    "kvm_chunk_size": 2,
}


def make_config(**changes):
    return OVQConfig(**{**SIZES, **changes})


def of_mixers(mixer_types, **fields):
    """`mixer_types`, and those of the fields that a config with these mixers has."""
    known = OVQConfig.field_defaults(mixer_types)
    return {"mixer_types": mixer_types} | {name: value for name, value in fields.items() if name in known}


def make_model(seed=0, **changes):
    """A float64 model in evaluation mode: rounding cannot flip a greedy choice."""
    torch.manual_seed(seed)
    return OVQForCausalLM(make_config(**changes)).double().eval()


def enable_checkpointing(model, **options):
    """Have activations computed again in the backward pass; options are those of torch's `checkpoint`."""
    # The name changed in transformers 5.24.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def random_ids(rows, length, seed=1):
    return torch.randint(
        1, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def is_greedy(model, text, num_new):
    """Whether the last tokens of a text are what the model, reading all of it at once, would have said."""
    with torch.no_grad():
        logits = model(text[None], use_cache=False).logits[0]
    first = len(text) - num_new
    return torch.equal(logits[first - 1 : -1].argmax(-1), text[first:])


def left_padded(prompts):
    """Prompts of unequal length as one batch: ids `[B, T]` with 0 for padding, and the mask."""
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.cat([p.new_zeros(width - len(p)), p]) for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    return ids, mask
