"""With prefix caching, requests continue from a prefix that another has read, and get the same tokens."""

from itertools import chain

import pytest

from .conftest import found_tokens, prompts_of, run, tokens_of

#: Own models have blocks of as many tokens as are as large as a state, converted ones of as many as asked.
MODELS = {
    "windows": ({}, {}),
    "full attention, gates": (
        {"mixer_types": ["full_attention", "ovq", "ovq", "full_attention"]}
        | {"forget_gate": True, "merge_gate": True},
        {},
    ),
    "OVQ alone": ({"mixer_types": ["ovq"] * 3, "num_hidden_layers": 3}, {}),
    "beside Mamba2": ({"mixer_types": ["mamba2", "ovq", "full_attention", "ovq"]}, {}),
    "llama": ({"family": "llama"}, {"block_size": 64}),
    "qwen3": ({"family": "qwen3"}, {"block_size": 96}),
}
ON = {"enable_prefix_caching": True, "mamba_cache_mode": "align"}


@pytest.mark.parametrize("name", MODELS)
def test_prompts_that_begin_alike(name, saved, engine):
    fields, options = MODELS[name]
    made = saved(**fields)
    common, *ends = prompts_of([900, 20, 64, 300, 1], seed=9)
    prompts = [common[:length] + end for length in (100, 384, 650, 900) for end in ends]
    llm = engine(
        made.folder, max_num_batched_tokens=400, max_num_seqs=5, disable_log_stats=False, **ON, **options
    )
    # Of the first, nothing is known.
    answers = tokens_of(run(llm, [common], 40))
    assert found_tokens(llm) == 0
    alone = tokens_of(run(llm, [common], 40))
    assert found_tokens(llm) > 500
    together = tokens_of(run(llm, prompts, 40))
    assert found_tokens(llm) > 3000
    # A next turn, with the answer to the last one.
    turns = [common + answers[0] + end for end in ends]
    known = found_tokens(llm)
    next_answers = tokens_of(run(llm, turns, 40))
    assert found_tokens(llm) > known + 500
    made.assert_greedy([common, common, *prompts, *turns], [*answers, *alone, *together, *next_answers])


@pytest.mark.parametrize("name", ["windows", "llama"])
def test_blocks_that_run_out(name, saved, engine):
    fields, options = MODELS[name]
    made = saved(**fields)
    common, *ends = prompts_of([500, *range(1, 90, 8)], seed=10)
    prompts = [common[: 200 + 25 * n] + end for n, end in enumerate(ends)]
    # What was kept of earlier requests goes to others.
    llm = engine(
        made.folder,
        max_num_batched_tokens=200,
        max_num_seqs=4,
        max_model_len=1000,
        num_gpu_blocks_override=60 if name == "windows" else 16,
        disable_log_stats=False,
        **ON,
        **options,
    )
    batches = prompts, prompts[::-1], prompts[::2]
    found = [tokens_of(run(llm, batch, 60)) for batch in batches]
    assert found_tokens(llm) > 0
    made.assert_greedy(list(chain(*batches)), list(chain(*found)))
