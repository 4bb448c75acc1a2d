"""Converted models whose memory has room for all compute what their originals do, of every kind."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

from ovq.convert import attach
from ovq.convert.equality import difference
from ovq.hf.cache import CACHE_KEY
from tests.convert.common import SIZES, tokens
from tests.hf.common import enable_checkpointing

ROOM = {"num_slots": 96, "window": 32, "num_sinks": 2, "chunk_size": 8}
LONG = {**SIZES, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Beyond the length of training, where the angles of these kinds change.
SHORT = {"max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {**YARN, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [3.0, 2.0, 2.0, 1.5]}


def rotary(kind, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **fields}}


CASES = {
    "Llama": {},
    "Llama, all heads": {"num_key_value_heads": 4},
    "Llama, one head": {"num_key_value_heads": 1},
    "Llama, wide heads": {"head_dim": 16},
    "Llama, tied": {"tie_word_embeddings": True},
    "Llama, bias": {"attention_bias": True},
    "Llama, linear": rotary("linear", factor=4.0),
    "Llama, dynamic": {**SHORT, **rotary("dynamic", factor=4.0)},
    "Llama, llama3": rotary("llama3", **LLAMA3),
    "Llama, yarn": rotary("yarn", **YARN),
    "Llama, longrope": {**SHORT, **rotary("longrope", **LONGROPE)},
    "Qwen2": {},
    "Qwen2, window unused": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    "Qwen3": {"num_key_value_heads": 1},
    "Mistral": {"sliding_window": None},
    "Phi": {},
    "Gemma": {},
    "GPTNeoX": {"num_key_value_heads": 4},
    "SmolLM3": {},
    "Granite": {"attention_multiplier": 0.3},
}


def pair(case, dtype=torch.float64, implementation="sdpa"):
    """A model and the same one converted."""
    name, _, _ = case.partition(",")
    config = getattr(transformers, f"{name}Config")(**{**LONG, **CASES[case]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(dtype)
    model.set_attn_implementation(implementation)
    return model, attach(copy.deepcopy(model), **ROOM)


def read(model, cache, ids, mask):
    """Logits of real tokens, read in pieces."""
    logits, done = [], 0
    for part in ids.split([1, 20, 1, 38], dim=1):
        done += part.shape[1]
        logits.append(model(part, attention_mask=mask[:, :done], **{CACHE_KEY: cache}).logits)
    return torch.cat(logits, dim=1)[mask.bool()]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_answers_are_those_of_the_original(case):
    before, after = pair(case)
    ids = tokens(2, 60)
    mask = torch.ones_like(ids)
    # Left of the second row, nothing.
    mask[1, :9] = 0
    with torch.no_grad():
        expected, found = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (before, after))
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
        expected = read(before, DynamicCache(config=before.config), ids, mask)
        found = read(after, after.make_cache(), ids, mask)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
        answers = [
            m.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
            for m in (before, after)
        ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("case", ["Llama", "Qwen3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rounding_is_that_of_the_original(case, implementation, dtype):
    """Errors against float64 are at most twice those of the original."""
    before, after = pair(case, dtype, implementation)
    ids = tokens(2, 60)
    found, usual = (model(ids).logits.double() for model in (after, before))
    exact = before.double()(ids).logits
    assert (found - exact).norm() < 2 * (usual - exact).norm()


def test_gradients_are_those_of_the_original_with_checkpoints_too():
    ids = tokens(2, 30)
    before, after = pair("Qwen2")
    enable_checkpointing(after.train(), use_reentrant=False)
    for model in (before, after):
        model(ids, labels=ids).loss.backward()
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name, atol=1e-9, rtol=1e-9)


def test_one_token_that_rounding_turns_over_is_no_other_attention():
    before = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, all_of_them = before.clone(), before * 0.5
    one[:, 4] *= -9
    assert difference(one, before) == 0
    assert difference(one.float(), before.float()) > 1
    assert difference(all_of_them, before) > 0.3
