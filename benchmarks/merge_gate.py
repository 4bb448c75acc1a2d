"""What the merge gate costs: a model with it beside the same model without, in turns, in CPU time.

    OMP_NUM_THREADS=1 python benchmarks/merge_gate.py

The model is that of `ovq train recall-ovq`. A training step reads 16 examples of 256 tokens; 4,096 tokens are
read, and then followed by single tokens, with the dictionary kept by the paper's rule and by Ward-sqrt. The
weights of tokens are random, of a spread like that of a trained gate: `--spread 0` makes all of them 1.
`OVQ_CPU_KERNELS=0` shows what it costs without kernels.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from ovq.hf import OVQForCausalLM
from ovq.ops import backend_used
from ovq.train.loop import model_config
from ovq.train.recipes import get_recipe

LENGTH = 4096
TOKENS = 64


def model(merge: str, spread: float, *, has_gate: bool) -> OVQForCausalLM:
    """The model of the recipe, untrained, with weights of tokens that differ."""
    recipe = get_recipe("recall-ovq")
    options = replace(recipe.model, merge=merge, merge_gate=has_gate)
    torch.manual_seed(0)
    built = OVQForCausalLM(model_config(replace(recipe, model=options)))
    for name, x in built.named_parameters():
        if name.endswith("merge_gate.weight"):
            torch.nn.init.normal_(x, std=spread / x.shape[1] ** 0.5)
    return built


def seconds(run: Callable[[], object]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def trained(built: OVQForCausalLM) -> Callable[[], object]:
    """A training step, with its optimizer."""
    tokens = torch.randint(built.config.vocab_size, (16, 256))
    optimizer = torch.optim.AdamW(built.parameters(), 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        built(tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def read(built: OVQForCausalLM) -> Callable[[], object]:
    """Reading a context."""
    tokens = torch.randint(built.config.vocab_size, (1, LENGTH))
    return torch.no_grad()(lambda: built(tokens, use_cache=True, logits_to_keep=1).past_key_values)


def decoded(built: OVQForCausalLM) -> Callable[[], object]:
    """Single tokens after it."""
    cache = read(built)()

    @torch.no_grad()
    def run() -> None:
        for token in range(TOKENS):
            built(torch.tensor([[token]]), past_key_values=cache, use_cache=True)

    return run


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--spread", type=float, default=3.0)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{'what':30} {'without':>9} {'with':>9} {'times':>6}  backends")
    for what, make, merges in (
        ("training step", trained, ("existing", "ward-sqrt")),
        (f"{LENGTH} tokens read", read, ("existing", "ward", "ward-sqrt")),
        (f"{TOKENS} tokens decoded", decoded, ("existing", "ward-sqrt")),
    ):
        for merge in merges:
            both = [make(model(merge, arguments.spread, has_gate=has_gate)) for has_gate in (False, True)]
            used = []
            for run in both:
                run()
                used.append(backend_used())
            times = [[seconds(run) for run in both] for _ in range(arguments.turns)]
            plain, gated = (statistics.median(x) for x in zip(*times, strict=True))
            ratio = statistics.median(b / a for a, b in times)
            row = f"{what + ', ' + merge:30} {plain * 1e3:6.1f} ms {gated * 1e3:6.1f} ms {ratio:6.2f}  {used}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
