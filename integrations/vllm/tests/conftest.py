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

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from ovq.hf import OVQConfig, OVQForCausalLM

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

    def logprobs(self, tokens):
        """The log of the probability of each token but the first, `[len(tokens) - 1]`."""
        return self.log_softmax(tokens)[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0]

    def assert_greedy(self, prompts, found):
        """All continuations are those of `generate()`, but after two tokens that are equally likely.

        Products of other sizes are rounded otherwise, so `generate()` itself decides such ties by how the
        prompt is cut into calls. Few prompts may have one.
        """
        expected = [self.greedy(prompt, len(tokens)) for prompt, tokens in zip(prompts, found, strict=True)]
        num_different = len({token for tokens in expected for token in tokens})
        assert num_different > 100, "a model that repeats itself would hide errors"
        num_ties = 0
        for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
            if ours == theirs:
                continue
            first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            logs = self.log_softmax(prompt + theirs[:first])[-1]
            assert (logs[theirs[first]] - logs[ours[first]]).abs() < 2e-3, (len(prompt), first, ours, theirs)
            num_ties += 1
        assert num_ties <= 2


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A model of fields that differ from `SIZES`, and its folder; made once."""
    made = {}

    def find(dtype=torch.float32, **fields):
        name = f"{dtype} {fields}"
        if name not in made:
            made[name] = make(dtype, fields)
        return made[name]

    def make(dtype, fields):
        torch.manual_seed(7)
        model = OVQForCausalLM(OVQConfig(**SIZES | fields)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # With weights as large as this, and gates that differ between tokens, the context decides.
                if "norm" not in name and "conv" not in name:
                    parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            # Small, so that with tied embeddings no token predicts itself.
            model.model.embed_tokens.weight.normal_(0, 0.1)
        folder = str(tmp_path_factory.mktemp("model"))
        model.to(dtype).save_pretrained(folder)
        return Saved(model, folder)

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
