"""The engine generates the same tokens as transformers' `generate()`, however requests are batched."""

import random

import pytest
import torch
from vllm import SamplingParams

from ovq.convert import load
from ovq.hf import OVQForCausalLM

from .conftest import CONVERTED, Saved, prompts_of, run, tokens_of

#: Around the ends of chunks of 32 and windows of 48 tokens, and far beyond 64 slots.
LENGTHS = [1, 2, 3, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 97, 127, 128, 129, 200, 255, 256, 257, 300, 400]
LENGTHS += [511, 512, 513, 700, 1023, 1024, 1500, 2000]

#: Fields of the config, such that each mixer and each part of an OVQ layer occurs.
MODELS = {
    "windows": {},
    "full attention": {"mixer_types": ["full_attention", "ovq", "ovq", "full_attention"]}
    # A state is larger than a page of 128 tokens, so that pages become larger.
    | {"num_slots": 1024, "growth": "immediate"},
    "OVQ alone, without groups of heads": {"mixer_types": ["ovq"] * 3, "num_hidden_layers": 3}
    | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "nearest, merge gate, log-n": {
        "merge": "nearest",
        "merge_gate": True,
        "logn_length": 100,
        "mixer_types": ["sliding_attention", "ovq", "full_attention", "ovq"],
    },
    "forget gate, all rotated, no convolution": {
        "forget_gate": True,
        "merge_gate": True,
        "conv_size": 0,
        "rope_mixers": ["ovq", "sliding_attention", "full_attention"],
        "mixer_types": ["full_attention", "sliding_attention", "sliding_attention", "ovq"],
    },
    "one OVQ layer and three guests": {
        "mixer_types": ["sliding_attention", "sliding_attention", "full_attention", "ovq"],
        "chunk_size": 17,
        "num_slots": 50,
        "output_gate": True,
    },
    "beside Mamba2": {
        "mixer_types": ["mamba2", "ovq", "mamba2", "ovq"],
        "forget_gate": True,
        "output_gate": True,
        "merge": "nearest",
    },
    "beside Gated DeltaNet, sinks and windows": {
        "mixer_types": ["gated_deltanet", "ovq", "sink_attention", "sliding_attention"],
        "sink_window": 40,
        "output_gate": True,
    },
} | {f"{family}, converted": {"family": family} for family in CONVERTED}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_a_batch_of_unequal_prompts(fields, saved, engine):
    made = saved(**fields)
    prompts = prompts_of(LENGTHS)
    made.assert_greedy(prompts, tokens_of(run(engine(made.folder), prompts, 40)))


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_prompts_read_in_pieces_beside_requests_that_decode(fields, saved, engine):
    made = saved(**fields)
    prompts = prompts_of([n for n in LENGTHS[1::2] if n > 30], seed=1)
    # Pieces of no multiple of a chunk, and blocks that are used again for later requests.
    llm = engine(made.folder, max_num_batched_tokens=75, max_num_seqs=5)
    made.assert_greedy(prompts, tokens_of(run(llm, prompts, 40)))


@pytest.mark.parametrize("fields", [{}, {"family": "llama"}], ids=str)
def test_prompts_alone_and_an_engine_that_was_used_before(fields, saved, engine):
    made = saved(**fields)
    prompts = prompts_of(LENGTHS[::4], seed=2)
    llm = engine(made.folder)
    made.assert_greedy(prompts, [tokens_of(run(llm, [prompt], 70))[0] for prompt in prompts])
    # Blocks now hold the states of others.
    made.assert_greedy(prompts[::-1], tokens_of(run(llm, prompts[::-1], 70)))


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_weights_of_few_bits(weight_dtype, saved, engine):
    own = saved(family="llama")
    narrow = Saved(load(own.folder, weight_dtype=weight_dtype), own.folder)
    prompts = prompts_of(LENGTHS[1::3], seed=4)
    found = tokens_of(run(engine(own.folder, additional_config={"weight_dtype": weight_dtype}), prompts, 40))
    narrow.assert_greedy(prompts, found)
    assert found != [own.greedy(prompt, 40) for prompt in prompts]


@pytest.mark.parametrize("most", [20_000, 333], ids=["whole", "in pieces"])
@pytest.mark.parametrize("fields", [{}, {"family": "llama", "max_position_embeddings": 16384}], ids=str)
def test_long_prompts_alone_and_together(fields, most, saved, engine):
    made = saved(**fields)
    prompts = prompts_of([4097, 5000, 6143, 7777, 8192], seed=11)
    llm = engine(made.folder, max_num_batched_tokens=most, max_model_len=8300)
    alone = [tokens_of(run(llm, [prompt], 60))[0] for prompt in prompts[1::2]]
    made.assert_greedy([*prompts[1::2], *prompts], alone + tokens_of(run(llm, prompts, 60)))


@pytest.mark.parametrize("fields", [{}, {"family": "llama", "max_position_embeddings": 16384}], ids=str)
def test_a_hundred_prompts_to_8k_tokens_alone_and_in_batches_of_32(fields, saved, engine):
    made = saved(**fields)
    # Evenly by their logs.
    prompts = prompts_of([round(8192 ** ((i + 1) / 100)) for i in range(100)], seed=12)
    random.Random(0).shuffle(prompts)
    llm = engine(made.folder, max_num_batched_tokens=2048, max_num_seqs=32, max_model_len=8300)
    alone = [tokens_of(run(llm, [prompt], 24))[0] for prompt in prompts]
    made.assert_greedy(prompts + prompts, alone + tokens_of(run(llm, prompts, 24)), most_ties=4)


def test_requests_that_are_preempted(saved, engine):
    made = saved(mixer_types=["full_attention", "ovq"], num_hidden_layers=2)
    prompts = prompts_of([120] * 6, seed=3)
    # A block of states and two of the three pages that each request needs, and one that vLLM keeps.
    llm = engine(made.folder, num_gpu_blocks_override=19, max_model_len=512, disable_log_stats=False)
    made.assert_greedy(prompts, tokens_of(run(llm, prompts, 200)))
    counted = {metric.name: metric for metric in llm.get_metrics()}
    assert counted["vllm:num_preemptions"].value > 0


def test_a_converted_model_whose_requests_are_preempted(saved, engine):
    # Blocks do not run out for those who have one, so all are taken away from time to time.
    made = saved(family="llama")
    prompts = prompts_of([20, 90, 300, 700, 900], seed=3)
    llm = engine(made.folder, max_num_batched_tokens=75, max_num_seqs=3, num_gpu_blocks_override=5)
    core, found = llm.llm_engine, {}
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
        core.add_request(str(number), {"prompt_token_ids": prompt}, params)
    for step in range(1000):
        for output in core.step():
            found[output.request_id] = output
        if not core.has_unfinished_requests():
            break
        if step % 25 == 24:
            assert core.reset_prefix_cache(reset_running_requests=True)
    made.assert_greedy(prompts, tokens_of([found[str(number)] for number in range(len(prompts))]))


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_log_probabilities_of_prompts_and_of_what_follows(fields, saved, engine):
    made = saved(**fields)
    prompts = prompts_of([3, 70, 333, 1200], seed=4)
    outputs = run(engine(made.folder, max_num_batched_tokens=200), prompts, 50, logprobs=0, prompt_logprobs=0)
    for prompt, output in zip(prompts, outputs, strict=True):
        (written,) = output.outputs
        tokens = prompt + list(written.token_ids)
        found = [*output.prompt_logprobs[1:], *written.logprobs]
        found = torch.tensor([entry[token].logprob for token, entry in zip(tokens[1:], found, strict=True)])
        torch.testing.assert_close(found, made.logprobs(prompt, list(written.token_ids)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("fields", [{}, {"family": "qwen3"}], ids=str)
def test_several_samples_of_one_prompt(fields, saved, engine):
    made = saved(**fields)
    (prompt,) = prompts_of([100], seed=5)
    (output,) = run(engine(made.folder), [prompt], 30, n=4, temperature=1.0, seed=1, logprobs=0)
    samples = [list(sample.token_ids) for sample in output.outputs]
    assert len({tuple(sample) for sample in samples}) == 4
    for sample, written in zip(samples, output.outputs, strict=True):
        found = torch.tensor([entry[t].logprob for t, entry in zip(sample, written.logprobs, strict=True)])
        torch.testing.assert_close(found, made.logprobs(prompt, sample)[-30:], atol=1e-3, rtol=0)


@pytest.mark.parametrize("fields", [{"merge_gate": True}, {"family": "qwen2"}], ids=str)
def test_bfloat16(fields, saved, engine):
    made = saved(dtype=torch.bfloat16, **fields)
    prompts = prompts_of([5, 60, 250], seed=6)
    outputs = run(engine(made.folder, dtype="bfloat16"), prompts, 1, prompt_logprobs=0)
    for prompt, output in zip(prompts, outputs, strict=True):
        found = torch.tensor(
            [entry[t].logprob for t, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        )
        expected = made.logprobs(prompt)
        # Sums in another order, rounded to 8 bits: compared with how much tokens differ.
        assert (found - expected).abs().mean() < 0.05 * expected.std()


def test_more_slots_and_another_rule_by_overrides_of_the_config(saved, engine):
    made = saved()
    model = OVQForCausalLM.from_pretrained(made.folder).eval()
    model.set_num_slots(200)
    model.set_merge("nearest")
    prompts = prompts_of([500, 700, 900], seed=8)
    llm = engine(made.folder, hf_overrides={"num_slots": 200, "merge": "nearest", "growth": "immediate"})
    found = tokens_of(run(llm, prompts, 60))
    Saved(model, made.folder).assert_greedy(prompts, found)
    with pytest.raises(AssertionError):
        made.assert_greedy(prompts, found)
