"""Small random models with varied greedy tokens, and engines that run in the test's process."""

import dataclasses
import gc
import os

import pytest
import torch

# Set before importing vLLM: the engine in this process, so that it starts in seconds; GiB for blocks.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from ovq.convert import MemoryConfig, attach, load
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.cache import CACHE_KEY

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # The smallest that vLLM's attention on CPUs supports.
    "head_dim": 32,
    "num_slots": 64,
    "chunk_size": 32,
    "sliding_window": 48,
}

#: Converted families: fields of the model's config and of its memory. Budgets differ by head.
CONVERTED = {
    "llama": (
        {"max_position_embeddings": 4096},
        # Below the length of long prompts, so that rows beyond the trained range are re-positioned.
        {"num_slots": [[32, 7], [0, 64], [20, 20]], "window": [[16, 48], [64, 16], [32, 32]], "num_sinks": 3}
        | {"trained_length": 600, "value_weight": [[0.5, 1.0], [1.0, 0.25], [0.5, 0.5]]},
    ),
    "qwen2": (
        {"tie_word_embeddings": True},
        {"num_slots": [[40, 24]] * 3, "window": [[32, 32]] * 3, "merge": "existing", "num_sinks": 0},
    ),
    "qwen3": (
        {"num_hidden_layers": 2},
        {"num_slots": [[16, 48], [30, 0]], "window": [[48, 16], [16, 16]]}
        # Weights of tokens depend on their keys and values, and slots have a bias.
        | {"token_use": [[[0.1] * 64 + [0.5]] * 2] * 2, "slot_bias": [[0.3, -0.2, 0.0, 0.5]] * 2}
        | {"key_exponents": [[[1, 0, -1, 0] * 8] * 2] * 2},
    ),
    "mistral": (
        {"sliding_window": None},
        {"num_slots": [[25, 50]] * 3, "window": [[16, 32]] * 3, "value_weight": 0.5},
    ),
}


@dataclasses.dataclass
class Saved:
    """A transformers model and the folder it was saved to."""

    model: OVQForCausalLM
    folder: str

    @torch.no_grad()
    def greedy(self, prompt, num_new):
        """Greedy continuation of a prompt by `generate()`."""
        ids = torch.tensor([prompt])
        return self.model.generate(ids, max_new_tokens=num_new, do_sample=False)[0, len(prompt) :].tolist()

    @torch.no_grad()
    def log_softmax(self, tokens):
        """Log-probabilities of the next token after each token, `[len(tokens), vocab_size]`."""
        return self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)

    @torch.no_grad()
    def logprobs(self, prompt, written=()):
        """Log-probability of each token but the first, with the prompt in one call and then single tokens.

        As `generate()` reads. One call for all might merge other pairs where costs tie up to rounding.
        """
        cache, found = None, []
        for part in [prompt, *([token] for token in written)]:
            output = self.model(torch.tensor([part]), use_cache=True, **{CACHE_KEY: cache})
            cache = output[CACHE_KEY]
            found.append(output.logits[0].float().log_softmax(-1))
        tokens = torch.tensor([*prompt, *written])
        return torch.cat(found)[:-1].gather(1, tokens[1:, None])[:, 0]

    def assert_greedy(self, prompts, found, *, most_ties=2):
        """Assert that continuations equal those of `generate()`, except after a tie of two tokens.

        Rounding depends on the size of a product, so `generate()` itself decides such ties, and ties of pairs
        to merge, by how tokens are split into calls. At most `most_ties` prompts may have one.
        """
        longest: dict[tuple[int, ...], int] = {}
        for prompt, tokens in zip(prompts, found, strict=True):
            longest[tuple(prompt)] = max(len(tokens), longest.get(tuple(prompt), 0))
        expected = {prompt: self.greedy(list(prompt), num) for prompt, num in longest.items()}
        num_different = len({token for tokens in expected.values() for token in tokens})
        assert num_different > 100, "a model that repeats itself would hide errors"
        ties = set()
        for prompt, ours in zip(prompts, found, strict=True):
            theirs = expected[tuple(prompt)][: len(ours)]
            if ours == theirs:
                continue
            first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            logs = self.log_softmax(prompt + theirs[:first])[-1]
            is_tie = (logs[theirs[first]] - logs[ours[first]]).abs() < 2e-3
            assert is_tie or self._can_follow(prompt, ours[: first + 1]), (len(prompt), first, ours, theirs)
            ties.add(tuple(prompt))
        assert len(ties) <= most_ties

    def _can_follow(self, prompt, written):
        """Whether `generate()` can write this after reading it in other pieces.

        The prompt, as in a batch with others, or a part of this at once, as after a preemption.
        """
        return self._greedy_in_steps(prompt, len(written)) == written or any(
            self.greedy([*prompt, *written[:n]], len(written) - n) == written[n:] for n in range(len(written))
        )

    @torch.no_grad()
    def _greedy_in_steps(self, prompt, num_new):
        """Greedy continuation of a prompt that was read token by token."""
        cache, ids = self.model.make_cache(), torch.tensor([prompt])
        for token in prompt[:-1]:
            self.model(torch.tensor([[token]]), **{CACHE_KEY: cache})
        new = self.model.generate(ids, max_new_tokens=num_new, do_sample=False, **{CACHE_KEY: cache})
        return new[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Makes a `Saved` (cached) of fields that differ from `SIZES`; `family` is a key of `CONVERTED`."""
    made = {}

    def find(dtype=torch.float32, **fields):
        name = f"{dtype} {fields}"
        if name not in made:
            made[name] = make(dtype, fields)
        return made[name]

    def make(dtype, fields):
        torch.manual_seed(7)
        memory = None
        if family := fields.get("family"):
            own, memory = CONVERTED[family]
            sizes = {name: SIZES[name] for name in list(SIZES)[:7]} | {
                "num_hidden_layers": 3,
                "eos_token_id": None,
            }
            given = {name: value for name, value in fields.items() if name != "family"}
            config = AutoConfig.for_model(family, **sizes | own | given)
            model = AutoModelForCausalLM.from_config(config).eval()
        else:
            model = OVQForCausalLM(OVQConfig(**SIZES | fields)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Large weights and gates that differ between tokens make the output depend on the context.
                if parameter.dim() > 1 and "conv" not in name:
                    parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            # Small, so that with tied embeddings no token predicts itself.
            model.model.embed_tokens.weight.normal_(0, 0.1)
        folder = str(tmp_path_factory.mktemp("model"))
        if memory is None:
            model.to(dtype).save_pretrained(folder)
            return Saved(model, folder)
        attach(model, config=MemoryConfig(chunk_size=16, **memory)).save_pretrained(folder)
        # Loaded anew, as `to` would round the rotary angles.
        return Saved(load(folder, dtype=dtype), folder)

    return find


@pytest.fixture
def engine():
    """A function that starts an engine on a folder; engines stop after the test."""
    started = []

    def start(folder, **options):
        settings = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
        started.append(LLM(model=folder, **settings | {"max_model_len": 4096} | options))
        return started[-1]

    yield start
    # Clear it, as the report of a failed test would keep the engine alive.
    for llm in started:
        vars(llm).clear()
    gc.collect()
    cleanup_dist_env_and_memory()


def prompts_of(lengths, seed=0):
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def run(llm, prompts, num_new, **params):
    """Outputs of the engine for a batch of prompts of token ids."""
    settings = {"temperature": 0, "max_tokens": num_new, "detokenize": False, "ignore_eos": True}
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(requests, SamplingParams(**settings | params), use_tqdm=False)


def tokens_of(outputs):
    """Generated tokens of each prompt."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def found_tokens(llm):
    """Number of prompt tokens that were found in the prefix cache."""
    return {metric.name: metric for metric in llm.get_metrics()}["vllm:prefix_cache_hits"].value
