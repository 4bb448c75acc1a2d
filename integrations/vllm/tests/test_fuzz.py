"""Random arrivals and cancellations: every answered request gets the tokens of `generate()`.

Half of the prompts share a prefix with another one.

The environment variable `ARRIVALS` is the number of requests to each model, `SEED` the random seed.

    ARRIVALS=10000 SEED=1 .venv-vllm/bin/python -m pytest integrations/vllm/tests/test_fuzz.py
"""

import os
import random

import pytest
from vllm import SamplingParams

from .conftest import found_tokens, prompts_of

ARRIVALS = int(os.environ.get("ARRIVALS", "60"))
SEED = int(os.environ.get("SEED", "0"))
#: Tokens of an answer, at most.
MOST = 60

PREFIXES = {"enable_prefix_caching": True, "mamba_cache_mode": "align"}
MODELS = {
    # With pages that run out, so that vLLM preempts requests by itself.
    "own": (
        {"mixer_types": ["full_attention", "ovq"], "num_hidden_layers": 2},
        {"num_gpu_blocks_override": 40},
    ),
    "own, gates and windows": ({"merge_gate": True, "forget_gate": True}, {}),
    "own, beside others": (
        {"mixer_types": ["mamba2", "ovq", "gated_deltanet", "full_attention"]},
        {"num_gpu_blocks_override": 40},
    ),
    "llama": ({"family": "llama"}, {"num_gpu_blocks_override": 7}),
    "qwen3": ({"family": "qwen3"}, {}),
    "own, prefixes": ({"merge_gate": True}, {"num_gpu_blocks_override": 60} | PREFIXES),
    "llama, prefixes": ({"family": "llama"}, {"num_gpu_blocks_override": 24, "block_size": 64} | PREFIXES),
}


@pytest.mark.parametrize("name", MODELS)
def test_arrivals_and_cancellations(name, saved, engine):
    fields, options = MODELS[name]
    made, draw = saved(**fields), random.Random(f"{name} {SEED}")
    lengths = [
        draw.choice([1, 2, 16, 32, 33, 48, draw.randrange(3, 200), draw.randrange(200, 1100)])
        for _ in range(min(40, ARRIVALS))
    ]
    prompts = prompts_of(lengths, seed=draw.randrange(1000))
    for prompt, other in zip(prompts[::2], prompts[1::2], strict=True):
        prompt[:] = other[: draw.randrange(len(other))] + prompt[: draw.randrange(1, 40)]
    llm = engine(
        made.folder,
        max_num_batched_tokens=100,
        max_num_seqs=8,
        max_model_len=1200,
        disable_log_stats=False,
        **options,
    )
    core, open_, answers, num_cancelled = llm.llm_engine, {}, [], 0
    for number in range(ARRIVALS):
        # Sometimes a crowd, sometimes nobody for a while.
        for _ in range(draw.choice([0, 0, 1, 3, draw.randrange(40)])):
            num_cancelled += advance(core, open_, answers, draw)
        prompt, num_new = draw.choice(prompts), draw.randint(1, MOST)
        params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, detokenize=False)
        core.add_request(str(number), {"prompt_token_ids": prompt}, params)
        open_[str(number)] = prompt
    while open_:
        num_cancelled += advance(core, open_, answers, draw)
    assert len(answers) + num_cancelled == ARRIVALS
    assert not core.has_unfinished_requests()
    if "prefixes" in name:
        assert found_tokens(llm) > 0
    made.assert_greedy(*zip(*answers, strict=True))


def advance(core, open_, answers, draw):
    """Run a step of the engine, possibly after cancelling a request; returns the number cancelled."""
    num_cancelled = 0
    if open_ and draw.random() < 0.02:
        gone = draw.choice(list(open_))
        core.abort_request([gone])
        del open_[gone]
        num_cancelled = 1
    if draw.random() < 0.01:
        # Preempts all running requests.
        assert core.reset_prefix_cache(reset_running_requests=True)
    for output in core.step():
        if output.finished:
            answers.append((open_.pop(output.request_id), list(output.outputs[0].token_ids)))
    return num_cancelled
