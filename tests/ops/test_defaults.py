"""PyTorch's default dtype and device change nothing that the op or a state computes."""

import pytest
import torch

from ovq.ops import ovq_attention, slot_assignments
from ovq.ops.state import state_tensors
from tests.ops.common import BACKENDS, CPU, inputs, other_defaults

OPTIONS = {"num_slots": 12, "chunk_size": 8}


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, *CPU])
def test_calls_and_states_do_not_depend_on_default_dtype_and_device(backend, forgets):
    q, k, v = (x.float() for x in inputs(2, 21, 4, 2))
    mask = torch.arange(21) >= torch.tensor([[0], [7]])
    weights = torch.linspace(0.5, 2, 2 * 21 * 2).view(2, 21, 2)
    gates = {"token_weights": weights} | ({"log_forget": -weights / 9} if forgets else {})

    def results():
        options = {**OPTIONS, "merge": "nearest"}
        o, state = ovq_attention(
            q, k, v, attention_mask=mask, output_final_state=True, backend=backend, **gates, **options
        )
        state = state.repeat_interleave(2).select([3, 0])
        last, state = ovq_attention(
            *(x[:, :1] for x in (q, k, v)),
            initial_state=state,
            output_final_state=True,
            backend=backend,
            **options,
        )
        found = slot_assignments(k, v, attention_mask=mask, **gates, **options)
        parts = state_tensors(state.resize(5)).values()
        return [o, last, found.slots, found.position, found.row, *parts]

    with other_defaults():
        found = results()
    assert all(map(torch.equal, found, results()))
