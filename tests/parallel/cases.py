"""What the ranks of `test_context_parallel.py` run, and the same in one process."""

import contextlib
import dataclasses

import torch
import torch.distributed as dist

from ovq.hf import OVQCache
from ovq.parallel import ContextParallel
from ovq.parallel.transfer import FORTH
from tests.hf.common import make_model, random_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its micro-batches, and how they are split."""

    num_ranks: int
    lengths: tuple[int, ...] = (37, 37, 30)
    bounds: tuple[int, ...] | None = None
    recompute: bool = False
    max_in_flight: int | None = None
    dtype: torch.dtype = torch.float64
    has_autocast: bool = False
    grads_before: float = 0.0
    changes: dict = dataclasses.field(default_factory=dict)

    def model(self):
        model = make_model(**{**OVQ_AND_WINDOW, **self.changes}).to(self.dtype).train()
        if self.grads_before:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, self.grads_before)
        return model

    def micro_batches(self):
        batches = []
        for i, length in enumerate(self.lengths):
            ids = random_ids(2, length, seed=i)
            labels = ids.clone()
            # Parts with few targets and with none: shares of the loss are not equal.
            labels[:, 3 : 3 + 9 * i] = -100
            batches.append({"input_ids": ids, "labels": labels})
        return batches

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16) if self.has_autocast else contextlib.nullcontext()


OVQ_AND_WINDOW = {"mixer_types": ["sliding_attention", "ovq", "sliding_attention", "ovq"]}
RECURRENT = {
    "mixer_types": [
        *(
            "sink_attention",
            "linear_attention",
            "gated_deltanet",
            "mamba2",
            "kvm",
            "raven",
            "kda",
            "mesanet",
            "sliding_attention",
        ),
    ],
    "num_hidden_layers": 9,
    "kvm_chunk_size": 4,
    # Ranks would draw another noise than one process does.
    "raven_noise": False,
    "num_sinks": 6,
    "sink_window": 5,
}
# Within chunks of 4, within windows, and parts shorter than either and than the convolution.
ANYWHERE = (0, 10, 11, 30, 37)

CASES = {
    "even": Case(num_ranks=4),
    "anywhere": Case(num_ranks=4, lengths=(37, 37), bounds=ANYWHERE),
    "two, anywhere": Case(num_ranks=2, lengths=(37,), bounds=(0, 22, 37)),
    "recomputed": Case(num_ranks=4, lengths=(37, 37), bounds=ANYWHERE, recompute=True),
    "recurrent": Case(num_ranks=4, lengths=(37, 37), bounds=ANYWHERE, changes=RECURRENT),
    "float32, tied": Case(num_ranks=2, dtype=torch.float32, changes={"tie_word_embeddings": True}),
    "unpipelined": Case(num_ranks=4, lengths=(37,) * 4, max_in_flight=1),
    "pipelined": Case(num_ranks=4, lengths=(37,) * 4),
    "added": Case(num_ranks=2, lengths=(16,), grads_before=0.25),
    "no convolution, options": Case(
        num_ranks=2,
        lengths=(37,),
        bounds=(0, 23, 37),
        changes={"conv_size": 0, "growth": "linear", "merge": "updated", "ablation": {"bias": "count+norm"}},
    ),
    "the shortest edges": Case(
        num_ranks=2,
        lengths=(37, 37),
        bounds=(0, 23, 37),
        changes={"num_slots": 6, "merge": "nearest", "merge_gate": True},
    ),
    "rotated, constant rate": Case(
        num_ranks=2,
        lengths=(37,),
        bounds=(0, 23, 37),
        changes={"rope_mixers": ["sliding_attention", "ovq"], "ablation": {"rate": 0.5}},
    ),
    # A slot for every token: no decision hangs on the rounding, in which numbers of processes differ.
    "bfloat16": Case(
        num_ranks=2,
        lengths=(37, 30),
        dtype=torch.float32,
        has_autocast=True,
        changes={"num_slots": 64, "growth": "immediate"},
    ),
    "longer": Case(num_ranks=2, lengths=(4 * 37,) * 2, changes={"num_slots": 2}),
    "shorter": Case(num_ranks=2, lengths=(37,) * 2, changes={"num_slots": 2}),
}


def run(rank, folder):
    """All cases, one after the other, on as many of the four ranks as a case is for."""
    for name, case in CASES.items():
        first = rank // case.num_ranks * case.num_ranks
        ranks = list(range(first, first + case.num_ranks))
        group = dist.new_group(ranks, use_local_synchronization=True)
        model = case.model()
        if rank != first:
            # The weights of the first rank are taken.
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, 0.5)
        options = {"recompute": case.recompute, "max_in_flight": case.max_in_flight}
        parallel = ContextParallel(model, group, **options)
        states = recorded(parallel.neighbours)
        with case.autocast():
            loss = parallel.forward_backward(case.micro_batches(), bounds=case.bounds)
        result = {
            "loss": loss,
            "grads": {name: p.grad for name, p in model.named_parameters()},
            "states": list(states),
            "num_bytes": parallel.neighbours.num_bytes_sent,
        }
        with case.autocast():
            result["held_out"] = parallel.loss(case.micro_batches(), bounds=case.bounds)
        torch.save(result, folder / f"{name}-{rank}.pt")
    # The first rank then has one group more than the others, which must not wait for it for ever.
    dist.new_group([0])
    parallel = ContextParallel(CASES["even"].model())
    torch.save(refusals(parallel, is_first=rank == 0), folder / f"refused-{rank}.pt")


def refusals(parallel, *, is_first):
    """What `forward_backward` says if the first rank has other input than the others."""
    ids = random_ids(2, 20, seed=0)
    batch = {"input_ids": ids, "labels": ids}
    bounds = [0, 5, 10, 15, 20]
    given = {
        "other ids": [batch | {"input_ids": ids.flip(1)}],
        "other labels": [batch | {"labels": ids.flip(1)}],
        "other lengths": [{name: x[:, 1:] for name, x in batch.items()}],
        "one more": [batch, batch],
        "other bounds": [batch],
        "failed by one": [None] if is_first else [batch],
        "refused by one": [batch | {"cu_seqlens": torch.tensor([0, 20])}],
    }
    found = {}
    for name, batches in given.items():
        own = [0, 4, 10, 15, 20] if name == "other bounds" and is_first else bounds
        try:
            parallel.forward_backward(
                batches if is_first else [batch], bounds=None if name == "other lengths" else own
            )
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    return found


def recorded(neighbours):
    """A list that gets what this rank sends to the next."""
    sent, send = [], neighbours.send

    def recording(tensors, spec, way):
        if way == FORTH:
            sent.append({name: t.detach() for name, t in tensors.items()})
        send(tensors, spec, way)

    neighbours.send = recording
    return sent


def expected(case):
    """Loss and gradients of one process that reads whole micro-batches."""
    model, batches = case.model(), case.micro_batches()
    num_targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    total = 0.0
    for batch in batches:
        with case.autocast():
            loss = model(**batch, num_items_in_batch=num_targets).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


@torch.no_grad()
def expected_states(case, stop):
    """The states of all layers of all micro-batches after `stop` tokens, in one process."""
    model, states = case.model().eval(), []
    for batch in case.micro_batches():
        cache = OVQCache(model.config)
        model(batch["input_ids"][:, :stop], past_key_values=cache)
        states += [layer.parts() for layer in cache.layers]
    return states
