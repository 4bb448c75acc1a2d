"""Stage 2: the whole model learns to give the logits that it gave with all tokens, by LoRA on its attention.

The original model is the teacher: the same weights without the changes, and with a cache of all tokens. The
changes are those of peft, and what stage 1 has learned is learned on. For a share of the sequences, windows
of heads with slots are shorter, by a random factor: converted models like to live on their window
(arXiv 2510.05901).

Gradients reach the queries, the reading of slots, and the tokens of the same piece, exact or merged. What was
merged before is constant, and so is the decision which tokens are merged.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from ovq.convert.adapt.reading import SlotReading
from ovq.convert.attach import original_attention
from ovq.convert.cache import MemoryCache
from ovq.convert.config import MemoryConfig
from ovq.hf.cache import CACHE_KEY

# Logits are computed for so many tokens at a time.
_TOKENS_AT_ONCE = 256


class LogitErrors:
    """The divergence of a converted model's predictions from the original's, on sequences read in pieces.

    Args:
        model: a converted model; matrices of its attention get changes of low rank, which `merge` adds.
        reading: what stage 1 learns.
        rank: of the changes.
        seed: of their initial values, and of the windows' lengths.
        short_windows: share of the sequences with shorter windows.

    Raises:
        ValueError: the model's attention has no linear layers.
    """

    def __init__(
        self, model: Any, reading: SlotReading, *, rank: int, seed: int, short_windows: float
    ) -> None:
        from peft import LoraConfig, LoraModel

        names = _attention_matrices(model)
        if not names:
            raise ValueError(f"{type(model).__name__}: expected linear layers in its attention, found none")
        self._model, self._reading, self._seed, self._share = model, reading, seed, short_windows
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Not a PeftModel, which calls what transformers warns of.
            self._changed: Any = LoraModel(
                model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), "default"
            )

        # Steps would be lost to the rounding of narrower types.
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The changes, by name."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def start(self, number: int) -> None:
        """Begin new sequences, whose memories are empty; their number in the run determines their windows."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        config = self._model.memory_config
        if float(torch.rand((), generator=generator)) < self._share:
            config = shortened(config, float(torch.rand((), generator=generator)))
        self._memory = MemoryCache(config)
        self._all_tokens = DynamicCache(config=self._model.config)

    def add(self, ids: Tensor) -> float:
        """Read the next piece `[B, T]` of the sequences; gradients are added to those of the parameters.

        Returns:
            The mean of the divergence KL(original, converted) per token, in nats.
        """
        base = self._model.base_model
        self._changed.disable_adapter_layers()
        with torch.no_grad(), original_attention(self._model):
            wanted = base(ids, **{CACHE_KEY: self._all_tokens}, use_cache=True).last_hidden_state
        self._changed.enable_adapter_layers()
        with torch.enable_grad():
            self._reading.put_into(self._memory)
            found = base(ids, **{CACHE_KEY: self._memory}, use_cache=True).last_hidden_state
        divergence, gradient = self._divergence(found.detach().flatten(0, 1), wanted.flatten(0, 1))
        found.backward(gradient.view_as(found))
        return divergence

    def merge(self) -> None:
        """Add the changes to the model's matrices, which ends the stage."""
        self._changed.merge_and_unload()

    def _divergence(self, found: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
        """The mean divergence, and its gradient, of hidden states `[N, hidden_size]`."""
        output = self._model.get_output_embeddings()
        total, gradients = 0.0, []
        for part, wanted_part in zip(
            found.split(_TOKENS_AT_ONCE), wanted.split(_TOKENS_AT_ONCE), strict=True
        ):
            with torch.no_grad():
                target = output(wanted_part).float().log_softmax(-1)
            with torch.enable_grad():
                part = part.requires_grad_(True)
                loss = F.kl_div(
                    output(part).float().log_softmax(-1), target, reduction="sum", log_target=True
                ) / len(found)
                loss.backward()
            total += float(loss.detach())
            assert part.grad is not None
            gradients.append(part.grad)
        return total, torch.cat(gradients)


def check_peft() -> None:
    """Raise ValueError if peft is not installed."""
    try:
        importlib.import_module("peft")
    except ImportError:
        raise ValueError(
            "logit_tokens: expected 0 without the package peft, found more: pip install 'ovq[adapt]'"
        ) from None


def shortened(config: MemoryConfig, share: float) -> MemoryConfig:
    """A memory whose heads with slots keep a `share` of their window, at least a chunk.

    Example:
        >>> config = MemoryConfig(num_slots=[[64, 0]], window=[[96, 96]], chunk_size=32)
        >>> shortened(config, 0.4).window
        [[32, 96]]
    """
    size = config.chunk_size
    window = [
        [max(size, int(share * w / size) * size) if n else w for n, w in zip(slots, windows, strict=True)]
        for slots, windows in zip(config.num_slots, config.window, strict=True)
    ]
    return dataclasses.replace(config, window=window)


def _attention_matrices(model: nn.Module) -> list[str]:
    """Names of the linear layers inside the attention modules."""
    return [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        for part, child in module.named_modules()
        if isinstance(child, nn.Linear)
    ]
