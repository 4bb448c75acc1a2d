"""accelerate: mixed precision, gradient accumulation, checkpoints; offloading is in `tests/hf`."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from tests.hf.common import random_ids
from tests.peers.models import SETS, make

pytestmark = pytest.mark.peers


@pytest.fixture(params=SETS)
def model(request):
    return make(request.param).train()


@pytest.fixture(autouse=True)
def of_its_own():
    """accelerate keeps its settings for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepare(model, **options):
    """The accelerator, and the model, optimizer and batches as it hands them back."""
    accelerator = Accelerator(cpu=True, **options)
    set_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = DataLoader(random_ids(8, 21), batch_size=2)
    return accelerator, *accelerator.prepare(model, optimizer, batches)


def train(accelerator, model, optimizer, batches, *, epochs):
    """The loss of each batch."""
    losses = []
    for _ in range(epochs):
        for ids in batches:
            with accelerator.accumulate(model):
                loss = model(ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def test_mixed_precision(model):
    parts = prepare(model.float(), mixed_precision="bf16")
    losses = train(*parts, epochs=4)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    outputs = parts[1](random_ids(1, 9))
    assert outputs.logits.dtype == torch.float32
    assert torch.isfinite(outputs.logits).all()


# The slots of "vq" are averages of the batches, and move with each of these.
@pytest.mark.parametrize("name", [name for name in SETS if "vq" not in SETS[name]])
def test_accumulated_gradients_are_those_of_one_batch(name):
    model = make(name).train()
    accelerator, prepared, _, batches = prepare(model, gradient_accumulation_steps=4)
    for ids in batches:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(ids, labels=ids).loss)
    accumulated = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ids = random_ids(8, 21)
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, accumulated)


def test_a_saved_state_goes_on_bit_for_bit(model, tmp_path):
    parts = prepare(model)
    train(*parts, epochs=1)
    parts[0].save_state(tmp_path)
    expected = train(*parts, epochs=2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(*parts, epochs=1)
    parts[0].load_state(tmp_path)
    assert train(*parts, epochs=2) == expected
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
