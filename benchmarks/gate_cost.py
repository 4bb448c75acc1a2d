"""What a gate costs: a model with it beside the same model without, in turns, in CPU time.

    OMP_NUM_THREADS=1 python benchmarks/gate_cost.py
    OMP_NUM_THREADS=1 python benchmarks/gate_cost.py --gate forget --recipe lm-ovq --batch 2 --length 2048

The model is that of a recipe, `ovq train recall-ovq` if none is named. A training step reads 16 examples of
256 tokens; 4,096 tokens are read, and then followed by single tokens, with the dictionary kept by the paper's
rule and by nearest. What the gate says of tokens is random, for the merge gate of a spread like that of a
trained one: `--spread 0` makes all weights 1.
`OVQ_CPU_KERNELS=0` shows what it costs without kernels.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from ovq.hf import OVQForCausalLM
from ovq.ops import backend_used
from ovq.train.config import RunConfig
from ovq.train.loop import model_config
from ovq.train.recipes import get_recipe

LENGTH = 4096
TOKENS = 64


def model(recipe: RunConfig, merge: str, spread: float, gates: dict[str, bool]) -> OVQForCausalLM:
    """The model of a recipe, untrained, with tokens that count differently."""
    options = replace(recipe.model, merge=merge, **{"merge_gate": False, "forget_gate": False} | gates)
    torch.manual_seed(0)
    built = OVQForCausalLM(model_config(replace(recipe, model=options)))
    for name, x in built.named_parameters():
        if name.endswith("_gate.weight"):
            torch.nn.init.normal_(x, std=spread / x.shape[1] ** 0.5)
    return built


def seconds(run: Callable[[], object]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def trained(built: OVQForCausalLM, batch: int, length: int) -> Callable[[], object]:
    """A training step, with its optimizer."""
    tokens = torch.randint(built.config.vocab_size, (batch, length))
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
    parser.add_argument("--gate", choices=["merge", "forget"], default="merge")
    parser.add_argument("--recipe", default="recall-ovq")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    recipe, gate = get_recipe(arguments.recipe), f"{arguments.gate}_gate"
    step = functools.partial(trained, batch=arguments.batch, length=arguments.length)
    print(f"{'what':30} {'without':>9} {'with':>9} {'times':>6}  backends")
    for what, make, merges in (
        ("training step", step, ("existing", "nearest")),
        (f"{LENGTH} tokens read", read, ("existing", "nearest")),
        (f"{TOKENS} tokens decoded", decoded, ("existing", "nearest")),
    ):
        for merge in merges:
            both = [make(model(recipe, merge, arguments.spread, {gate: has})) for has in (False, True)]
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
