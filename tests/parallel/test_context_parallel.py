"""A document split over ranks against one process: losses, gradients, states, and what is sent."""

import re
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from ovq.hf import OVQModel
from ovq.hf.loss import loss_in_pieces
from ovq.layers.memory import num_bytes
from ovq.ops.parts import of_rows
from ovq.parallel import ContextParallel, even_bounds
from ovq.parallel.transfer import floating
from tests.hf.common import SIZES, make_model, random_ids
from tests.parallel.cases import CASES, OVQ_AND_WINDOW, expected, expected_states, run
from tests.processes import made_once, run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank has found, by case: four processes, started once for all cases."""
    folder = made_once(tmp_path_factory, "ranks", partial(run_ranks, run, 4))
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(case.num_ranks)]
        for name, case in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_equal_one_process(results, name):
    case = CASES[name]
    loss, grads = expected(case)
    # The loss is computed in float32, by transformers.
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    if case.has_autocast:
        tolerance = {"rtol": 0.05, "atol": 0.02}
    for result in results[name]:
        torch.testing.assert_close(result["loss"], loss, rtol=1e-6 if not case.has_autocast else 2e-3, atol=0)
        assert result["grads"].keys() == grads.keys()
        for parameter, grad in grads.items():
            assert grad.abs().max() > 1e-4, parameter
            torch.testing.assert_close(result["grads"][parameter], grad, **tolerance)


@pytest.mark.parametrize("name", ["anywhere", "recomputed", "recurrent", "no convolution, options"])
def test_what_is_handed_on_is_the_state_of_one_process(results, name):
    case = CASES[name]
    for result, stop in zip(results[name][:-1], case.bounds[1:-1], strict=True):
        wanted = expected_states(case, stop)
        assert (
            len(result["states"]) == len(wanted) == len(case.lengths) * case.model().config.num_hidden_layers
        )
        for state, state_wanted in zip(result["states"], wanted, strict=True):
            assert state.keys() == state_wanted.keys()
            for part, tensor in state.items():
                # Whole numbers, and so the slot each token went to, are equal; the others but for rounding.
                torch.testing.assert_close(tensor, state_wanted[part], rtol=1e-9, atol=1e-9)
    assert results[name][-1]["states"] == []


def test_a_pipeline_gives_what_one_micro_batch_after_the_other_gives(results):
    for pipelined, unpipelined in zip(results["pipelined"], results["unpipelined"], strict=True):
        assert pipelined["loss"] == unpipelined["loss"]
        torch.testing.assert_close(pipelined["grads"], unpipelined["grads"], rtol=1e-12, atol=1e-12)


def test_what_is_sent_does_not_depend_on_the_length(results):
    longer, shorter = results["longer"], results["shorter"]
    assert [r["num_bytes"] for r in longer] == [r["num_bytes"] for r in shorter]
    for name in ("shorter", "recurrent"):
        case = CASES[name]
        bounds = case.bounds or even_bounds(case.lengths[0], case.num_ranks, multiple=SIZES["chunk_size"])
        specs = [
            [of_rows(mixer.state_spec(bound, case.dtype), 2) for mixer in case.model().mixers()]
            for bound in bounds[1:-1]
        ]
        # Forward from each boundary but the last, and back from each but the first.
        forward = [sum(map(num_bytes, at)) for at in specs] + [0]
        backward = [0] + [sum(num_bytes(floating(spec)) for spec in at) for at in specs]
        sent = [r["num_bytes"] / len(case.lengths) for r in results[name]]
        assert sent == [f + b for f, b in zip(forward, backward, strict=True)]
        assert min(sent) > 1000


@pytest.mark.parametrize("name", CASES)
def test_the_loss_alone_is_that_of_training(results, name):
    tolerance = 1e-6 if not CASES[name].has_autocast else 2e-3
    for result in results[name]:
        assert result["held_out"] == pytest.approx(result["loss"], rel=tolerance)


def test_ranks_with_different_input_all_refuse_it(results, tmp_path_factory):
    folder = made_once(tmp_path_factory, "ranks", partial(run_ranks, run, 4))
    differs = "expected the same on every rank, found others on ranks "
    for rank in range(4):
        found = torch.load(folder / f"refused-{rank}.pt")
        others = "[1, 2, 3]" if rank == 0 else "[0]"
        for name in ("other ids", "other labels", "other lengths", "one more", "other bounds"):
            assert differs + others in found[name], name
        own = (
            "found cu_seqlens" if rank == 0 else differs + "[0] of the group, or input that is refused there"
        )
        assert own in found["refused by one"]
        assert ("NoneType" if rank == 0 else own) in found["failed by one"]


def test_what_cannot_be_split_is_refused():
    for mixer, reason in (("full_attention", "grows with every token"), ("vq", "moving average")):
        model = make_model(**OVQ_AND_WINDOW | {"mixer_types": ["sliding_attention", "ovq", mixer, "ovq"]})
        with pytest.raises(ValueError, match=f"mixer_types: expected .* found '{mixer}': .*{reason}"):
            ContextParallel(model)
    with pytest.raises(ValueError, match="found no process group"):
        ContextParallel(make_model(**OVQ_AND_WINDOW))
    with pytest.raises(ValueError, match="max_in_flight: expected at least 1 micro-batch, found 0"):
        ContextParallel(make_model(**OVQ_AND_WINDOW), max_in_flight=0)
    with pytest.raises(ValueError, match="model: expected an OVQForCausalLM itself, found OVQModel"):
        ContextParallel(OVQModel(make_model().config))


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield ContextParallel(make_model(**OVQ_AND_WINDOW))
    torch.distributed.destroy_process_group()


def test_input_that_does_not_fit_is_refused(alone):
    ids = torch.ones(2, 12, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    for bounds in ([0, 6, 12], [1, 12], [0, 13]):
        with pytest.raises(ValueError, match="bounds: expected 2 that rise from 0 to 12 tokens"):
            alone.forward_backward([batch], bounds=bounds)
    with pytest.raises(ValueError, match="expected at least one target, found none"):
        alone.forward_backward([{"input_ids": ids, "labels": ids * -100}])
    with pytest.raises(ValueError, match=r"expected a tensor labels in each, found \['input_ids'\]"):
        alone.forward_backward([{"input_ids": ids}])
    with pytest.raises(ValueError, match=r"labels of the same shape, found \[2, 12\] and \[2, 11\]"):
        alone.forward_backward([{"input_ids": ids, "labels": ids[:, 1:]}])
    for name in ("cu_seqlens", "shift_labels", "lables"):
        with pytest.raises(ValueError, match=f"expected only input_ids, .*, found {name}"):
            alone.forward_backward([batch | {name: ids}])
    for positions in (torch.arange(6).repeat(2, 2), torch.arange(11)[None]):
        with pytest.raises(ValueError, match=r"position_ids: expected 0 to 11 in each row, .* found others"):
            alone.forward_backward([batch | {"position_ids": positions}])
    for name in ("input_ids", "labels"):
        with pytest.raises(ValueError, match=f"{name}: expected ids from 0 to .*, found 1 to 1000"):
            alone.forward_backward([batch | {name: ids.index_fill(1, torch.tensor([5]), 1000)}])
    with torch.no_grad(), pytest.raises(ValueError, match=r"gradients to be enabled \(ContextParallel.loss"):
        alone.forward_backward([batch])
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match=r"attention_mask: expected no padding .* found 2 tokens of it"):
        alone.forward_backward([batch | {"attention_mask": mask}])
    with pytest.raises(ValueError, match="at least one token per rank, 5, found 4"):
        even_bounds(4, 5)
    # The name changed in transformers 5.24.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(alone.model, name) for name in names if hasattr(alone.model, name))()
    with pytest.raises(ValueError, match=r"without gradient checkpointing \(use recompute=True\)"):
        alone.forward_backward([batch])


def test_embeddings_may_be_frozen(alone):
    ids, model = torch.arange(24).view(2, 12), alone.model
    model.model.embed_tokens.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(ids, labels=ids).loss, learning)
    # As collators of transformers give it, with a mask without padding and plain positions.
    more = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(12)[None]}
    alone.forward_backward([{"input_ids": ids, "labels": ids, **more}])
    torch.testing.assert_close([p.grad for p in learning], list(expected))
    assert model.model.embed_tokens.weight.grad is None


def test_logits_of_all_targets_never_exist_at_the_same_time(alone, monkeypatch):
    """Unless the output layer or the loss must see them."""
    batches = [{"input_ids": torch.arange(24).view(2, 12), "labels": torch.arange(24).view(2, 12)}]
    pieces, seen = Mock(wraps=loss_in_pieces), Mock(return_value=None)
    monkeypatch.setattr("ovq.parallel.context.loss_in_pieces", pieces)
    in_pieces = alone.loss(batches)
    alone.model.lm_head.register_forward_hook(seen)
    assert alone.loss(batches) == pytest.approx(in_pieces, rel=1e-6)
    assert (pieces.call_count, seen.call_count) == (1, 1)


def test_gradients_of_before_outlive_a_failure_and_those_of_frozen_parameters_a_step(alone, monkeypatch):
    ids, model = torch.arange(24).view(2, 12), alone.model
    frozen = model.model.embed_tokens.requires_grad_(False).weight
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    monkeypatch.setattr(alone.neighbours, "finish", Mock(side_effect=[ConnectionError, None]))
    with pytest.raises(ConnectionError):
        alone.forward_backward([{"input_ids": ids, "labels": ids}])
    assert all(parameter.grad.eq(1).all() for parameter in model.parameters())
    alone.forward_backward([{"input_ids": ids, "labels": ids}])
    assert frozen.grad.eq(1).all()


def test_layers_that_draw_random_numbers_draw_the_same_when_they_run_again(alone):
    model = make_model(mixer_types=["raven", "raven"], num_hidden_layers=2).double().train()
    batches = [{"input_ids": ids, "labels": ids} for ids in (random_ids(2, 20, seed=i) for i in range(2))]
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        loss = ContextParallel(model, recompute=recompute).forward_backward(batches)
        results.append((loss, [p.grad for p in model.parameters()], torch.rand(3)))
    torch.testing.assert_close(*results)


def test_the_program_of_the_documentation_runs(monkeypatch):
    text = (Path(__file__).parent.parent.parent / "docs" / "use" / "scaling.md").read_text()
    [program] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    names = {}
    exec(program, names)
    torch.distributed.destroy_process_group()
    assert 4 < names["loss"] < 8
