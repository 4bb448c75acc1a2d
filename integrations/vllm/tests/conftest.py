"""Small models whose argmax is not always the same, and engines that are one process with the test."""

import dataclasses
import gc
import os

import pytest
import torch

# Before vLLM is imported: the engine in this process, so that it starts in seconds; memory for blocks in GiB.
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
    # vLLM's attention on CPUs has none below.
    "head_dim": 32,
    "num_slots": 64,
    "chunk_size": 32,
    "sliding_window": 48,
}

#: Families that are converted, each with fields of its config and of its memory. Budgets differ by head.
CONVERTED = {
    "llama": (
        {"max_position_embeddings": 4096},
        # Long prompts are longer than the model was trained for, so that rows are brought nearer.
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
        # Tokens weigh as much as their keys and values say, and slots have a bias.
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
    """A model of transformers and the folder that it was saved to."""

    model: OVQForCausalLM
    folder: str

    @torch.no_grad()
    def greedy(self, prompt, num_new):
        """What `generate()` continues a prompt with."""
        ids = torch.tensor([prompt])
        return self.model.generate(ids, max_new_tokens=num_new, do_sample=False)[0, len(prompt) :].tolist()

    @torch.no_grad()
    def log_softmax(self, tokens):
        """The logs of the probabilities of all tokens after each one, `[len(tokens), vocab_size]`."""
        return self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)

    @torch.no_grad()
    def logprobs(self, prompt, written=()):
        """The log of the probability of each token but the first, read as `generate()` reads them.

        Reading all at once may merge other tokens where two pairs cost the same but for rounding.
        """
        cache, found = None, []
        for part in [prompt, *([token] for token in written)]:
            output = self.model(torch.tensor([part]), use_cache=True, **{CACHE_KEY: cache})
            cache = output[CACHE_KEY]
            found.append(output.logits[0].float().log_softmax(-1))
        tokens = torch.tensor([*prompt, *written])
        return torch.cat(found)[:-1].gather(1, tokens[1:, None])[:, 0]

    def assert_greedy(self, prompts, found, *, most_ties=2):
        """All continuations are those of `generate()`, but after two tokens that are equally likely.

        Products of other sizes are rounded otherwise, so `generate()` itself decides such ties, and those of
        pairs to be merged, by how what was read is cut into calls. Few prompts may have one.
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
        """Whether `generate()` writes this after it has read some of it at once, as when it was preempted."""
        return any(
            self.greedy([*prompt, *written[:n]], len(written) - n) == written[n:] for n in range(len(written))
        )


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A model of fields that differ from `SIZES`, and its folder; made once. `family` is of `CONVERTED`."""
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
                # With weights as large as this, and gates that differ between tokens, the context decides.
                if parameter.dim() > 1 and "conv" not in name:
                    parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            # Small, so that with tied embeddings no token predicts itself.
            model.model.embed_tokens.weight.normal_(0, 0.1)
        folder = str(tmp_path_factory.mktemp("model"))
        if memory is None:
            model.to(dtype).save_pretrained(folder)
            return Saved(model, folder)
        attach(model, config=MemoryConfig(chunk_size=16, **memory)).save_pretrained(folder)
        # `to` would round the angles of rotated keys.
        return Saved(load(folder, dtype=dtype), folder)

    return find


@pytest.fixture
def engine():
    """Starts an engine on a folder; it ends with the test."""
    started = []

    def start(folder, **options):
        settings = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
        started.append(LLM(model=folder, **settings | {"max_model_len": 4096} | options))
        return started[-1]

    yield start
    # The report of a test that failed would keep the engine alive.
    for llm in started:
        vars(llm).clear()
    gc.collect()
    cleanup_dist_env_and_memory()


def prompts_of(lengths, seed=0):
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def run(llm, prompts, num_new, **params):
    """The outputs of a batch of prompts of token ids."""
    settings = {"temperature": 0, "max_tokens": num_new, "detokenize": False, "ignore_eos": True}
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(requests, SamplingParams(**settings | params), use_tqdm=False)


def tokens_of(outputs):
    """The tokens that were generated for each prompt."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def found_tokens(llm):
    """How many tokens of prompts were found and not read."""
    return {metric.name: metric for metric in llm.get_metrics()}["vllm:prefix_cache_hits"].value
