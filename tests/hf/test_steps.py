"""Decoding with parts of a layer in one call is decoding with its modules, one by one."""

import pytest
import torch

from ovq.hf import OVQConfig, OVQForCausalLM, block
from ovq.ops.backends.cpu import can_run


def decoded(model, ids, num_read):
    """Logits after each of the tokens that are read one by one."""
    cache = model.make_cache()
    found = []
    with torch.no_grad():
        model(ids[:, :num_read], past_key_values=cache)
        for t in range(num_read, ids.shape[1]):
            found.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_gives_what_the_modules_give(monkeypatch, dtype):
    torch.manual_seed(0)
    config = OVQConfig(
        vocab_size=11,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_slots=8,
        chunk_size=4,
        sliding_window=5,
    )
    model, ids = OVQForCausalLM(config).to(dtype).eval(), torch.randint(11, (2, 14))
    calls = []
    step = block.mlp_step
    monkeypatch.setattr(block, "mlp_step", lambda *args: (calls.append(1), step(*args))[1])
    fast = decoded(model, ids, 6)
    num_fast = len(calls)
    # A hook has to see what goes through its module.
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(1))
    torch.testing.assert_close(fast, decoded(model, ids, 6))
    assert num_fast == len(calls) == (2 * 8 if dtype == torch.float32 and can_run(torch.ones(1)) else 0)
    assert len(seen) == 2 * 9
    whole = model(ids).logits[:, 6:].detach()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(fast, whole, atol=tolerance, rtol=tolerance)
