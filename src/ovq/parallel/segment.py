"""One layer of one part: an autograd graph of its own, whose backward runs when the gradient of the state
that it passed on arrives.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ovq.hf.cache import OVQCache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.layers import SequenceLayout


class Segment:
    """A layer that continues from the state of the previous rank.

    Args:
        block, layer_idx, config: The layer, its index in the model, and the model's config.
        hidden: `[B, T, hidden_size]`, the output of the layer below.
        state: The state from the previous rank, named as in `Mixer.state_spec`; empty at the beginning.
        layout: Columns of this part and of earlier parts.
        recompute: Keep no activations, and run the layer again in the backward pass.
    """

    def __init__(
        self,
        block: nn.Module,
        layer_idx: int,
        config: OVQConfig,
        hidden: Tensor,
        state: Mapping[str, Tensor],
        layout: SequenceLayout,
        *,
        recompute: bool,
    ) -> None:
        self._block, self._layer_idx, self._config, self._layout = block, layer_idx, config, layout
        self._hidden = hidden.detach().requires_grad_()
        self._state = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in state.items()}
        self._recompute = recompute
        self._outputs: tuple[Tensor, dict[str, Tensor]] | None = None

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The output `[B, T, hidden_size]`, and the state to pass on."""
        if self._recompute:
            self._random = torch.get_rng_state(), *get_device_states(self._hidden)
            with torch.no_grad():
                return self._run()
        self._outputs = self._run()
        return self._outputs

    def backward(self, grad: Tensor, grads: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Add to the gradients of the layer's parameters.

        Args:
            grad: Gradient of the output of `forward`, `[B, T, hidden_size]`.
            grads: Gradients of the state it returned, by name; empty if no rank used it.

        Returns:
            The gradients of `hidden` and of each floating tensor of `state`.
        """
        outputs = self._run_again() if self._recompute else self._outputs
        assert outputs is not None, "forward comes first"
        hidden, state = outputs
        self._outputs = None
        # A dictionary without slots has no graph.
        tensors = {name: state[name] for name in grads if state[name].requires_grad}
        with torch.autocast(grad.device.type, enabled=False):
            torch.autograd.backward([hidden, *tensors.values()], [grad, *(grads[name] for name in tensors)])
        before = {name: t for name, t in self._state.items() if t.requires_grad}
        assert self._hidden.grad is not None
        return self._hidden.grad, {
            name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in before.items()
        }

    def _run_again(self) -> tuple[Tensor, dict[str, Tensor]]:
        """`_run` with the random numbers of the first time, for mixers that draw some in training."""
        own, devices, states = self._random
        kind = self._hidden.device.type
        with torch.random.fork_rng(devices, device_type=kind):
            torch.set_rng_state(own)
            set_device_states(devices, states, device_type=kind)
            return self._run()

    def _run(self) -> tuple[Tensor, dict[str, Tensor]]:
        cache = OVQCache(self._config)
        if self._state:
            cache.layers[self._layer_idx].restore(self._state, self._layout.num_past)
        hidden, _ = self._block(self._hidden, self._layout, past_key_values=cache)
        return hidden, cache.layers[self._layer_idx].parts()
