"""`fitted_bias`: biases of the scores of slots, fitted to the loss in closed form, without training.

A slot is scored by its mean key, and the mean of exp(score) over its tokens is above exp(mean score). So
slots of several tokens get too little attention, or too much where their tokens are not those that queries
look for. `slot_bias` is added to their scores, per query head.

Let x_t be the first-order change of the loss of token t (g . d as in `probe`), summed over all heads, and
y_th its derivative with respect to the bias of head h. The loss rises by the mean of
(x_t + sum_h y_th b_h)^2 / 2, so the best biases b solve linear equations [ours; Attention Matching, arXiv
2602.16284, fits masses and values of one text's keys to its outputs].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovq.convert.attach import kv_heads
from ovq.convert.cache import MemoryLayer
from ovq.convert.captures import Captured, Captures, captures_of, check_texts
from ovq.convert.config import LayerConfig, MemoryConfig, check_heads

# Ridge penalty in nats per token: a bias of 1 must lower the loss by this. Keeps useless biases near 0.
_RIDGE = 3e-4
# Largest bias: the linearisation only holds for small ones.
_LARGEST = 1.0
# Step of the finite difference, large enough for float32.
_STEP = 0.1
# Digits that are saved, to keep configs short.
_DIGITS = 5


def fitted_bias(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    config: MemoryConfig,
    *,
    seed: int = 0,
    captures: Captures | None = None,
    progress: Callable[[int], None] | None = None,
) -> MemoryConfig:
    """`config` with a bias per query head, fitted to texts, which have equal weights.

    Args:
        model, texts, seed, captures: as for `probe`; the loss is on sampled tokens.
        config: the memory; the fit starts from its biases, if it has any.
        progress: called with the number of texts done.

    Raises:
        ValueError: no texts, or texts of fewer than 2 tokens or of unknown ones; a model that cannot be
            converted or has other heads than the config; captures of another model.
        OSError: no disk space for captures.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()
        >>> sizes = dict(num_layers=1, num_kv_heads=2, num_slots=8, window=16, chunk_size=8)
        >>> found = fitted_bias(model, [torch.arange(90) % 32], MemoryConfig.uniform(**sizes))
        >>> len(found.slot_bias[0])
        2
    """
    if not texts:
        raise ValueError("texts: expected at least one, found none")
    check_heads("config", config.num_slots, kv_heads(model))
    check_texts(model, texts)
    left = right = torch.zeros((), dtype=torch.float64, device="cpu")
    with captures_of(model, captures) as kept:
        for i, text in enumerate(texts):
            layers = kept.of(text, seed=seed)
            found = [_changes(c, config.layer(j)) for j, c in enumerate(layers)]
            x = torch.stack([change for change, _ in found]).sum(0)
            y = torch.cat([by_bias for _, by_bias in found])
            scale = 2 * layers[0].num_targets * len(texts)
            left, right = left + y @ y.T / scale, right + y @ x / scale
            if progress is not None:
                progress(i + 1)
    ridge = _RIDGE * torch.eye(len(left), dtype=left.dtype, device=left.device)
    solved = -torch.linalg.solve(left + ridge, right)
    bias = solved.clamp(-_LARGEST, _LARGEST).view(config.num_layers, -1)
    if config.slot_bias is not None:
        bias = bias + torch.tensor(config.slot_bias, dtype=bias.dtype, device=bias.device)
    return dataclasses.replace(
        config, slot_bias=[[round(number, _DIGITS) for number in layer] for layer in bias.tolist()]
    )


@torch.no_grad()
def _changes(captured: Captured, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Changes of the loss `[t]` by a layer, summed over heads, and their derivatives `[H, t]` by biases."""
    q, k, v = captured.q, captured.k, captured.v
    start = k.shape[2] - q.shape[2]
    bias = [0.0] * q.shape[1] if config.slot_bias is None else config.slot_bias
    before = MemoryLayer(dataclasses.replace(config, slot_bias=bias))
    before.learn(k[:, :, :start], v[:, :, :start])
    after = before.branch(dataclasses.replace(config, slot_bias=[b + _STEP for b in bias]))
    outputs = [layer.attend(q, k[:, :, start:], v[:, :, start:], None) for layer in (before, after)]

    def change(difference: Tensor) -> Tensor:
        return (difference.float() * captured.g.float()).sum(-1)[0].double().cpu()

    return change(outputs[0] - captured.o).sum(0), change(outputs[1] - outputs[0]) / _STEP
