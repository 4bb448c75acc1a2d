"""Converted models (`ovq.convert`) for vLLM: the library's model and its caches, one row per request."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching
from vllm.sequence import IntermediateTensors

from ovq.convert import MemoryCache, attach
from ovq.convert.attach import set_weight_dtype
from ovq.convert.step import token_stream
from ovq.hf.cache import CACHE_KEY
from ovq_vllm.checks import memory_config_of, weight_dtype_of
from ovq_vllm.layers import BlockLayer
from ovq_vllm.memories import Block, Memories
from ovq_vllm.model import loaded_weights


class OVQConvertedForCausalLM(nn.Module, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching):
    """A pretrained model with the memory specified in its config.

    Args:
        vllm_config: the config of the engine.
        prefix: prefix of the layer names.

    Raises:
        ValueError: the model cannot be converted, or its logits are not just the output layer's product.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        # A copy, as the model changes it.
        config = copy.deepcopy(vllm_config.model_config.hf_config)
        memory, self._weight_dtype = memory_config_of(config), weight_dtype_of(vllm_config)
        lm = AutoModelForCausalLM.from_config(config, dtype=vllm_config.model_config.dtype).eval()
        self._own_class = type(lm)
        self.lm = attach(lm, config=memory)
        cache = self._checked_cache()
        self._memories = Memories(self.lm.make_cache, Block(cache))
        # The model's only layer as vLLM sees it. Its blocks hold the memories of all layers, one after the
        # other: budgets differ, and vLLM would pad a block per layer to the largest.
        spec = {"memories": ((self._memories.block.num_bytes,), torch.uint8)}
        # vLLM parses the layer index from the name.
        self._blocks = BlockLayer(spec, vllm_config, f"{prefix}.memories.0".lstrip("."))

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        """How vLLM copies a block for a request that continues from it: as a whole."""
        return (get_temporal_copy_spec,)

    @torch.no_grad()
    def _checked_cache(self) -> MemoryCache:
        """A cache after two tokens; ValueError unless `compute_logits` gives the model's own logits."""
        caches = self.lm.make_cache(), self.lm.make_cache()
        tokens = torch.tensor([[1, 2]])
        expected = self.lm(tokens, **{CACHE_KEY: caches[0]}).logits
        found = self.compute_logits(self._read(tokens, torch.arange(2)[None], caches[1]))
        if not torch.equal(found, expected):
            raise ValueError(
                f"{type(self.lm).__name__}: expected logits that are a product of its last layer's outputs, "
                "found others: `ovq serve` runs the model"
            )
        return caches[0]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings `[T, hidden_size]` of tokens `[T]`."""
        return self.lm.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """As `forward` of `ovq_vllm.model.OVQForCausalLM`."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        assert inputs is not None
        step = self._blocks.step
        if step is None:
            # vLLM profiles memory with arbitrary positions, such as all 0.
            own = torch.arange(len(positions), device=positions.device)
            return self._read(inputs[None], own[None], self.lm.make_cache())[0]
        out = inputs.new_zeros(len(positions), self.lm.config.hidden_size, dtype=self.lm.dtype)
        for rows, cache in self._memories.calls(step.groups, self._blocks.kv_cache[0]):
            out[rows] = self._read(inputs[rows], positions[rows], cache)
        return out

    def _read(self, inputs: Tensor, positions: Tensor, cache: MemoryCache) -> Tensor:
        """Final hidden states, normalised, of new tokens `[R, T]` or their embeddings; updates the cache."""
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        given: dict[str, Any] = {name: inputs, "position_ids": positions, CACHE_KEY: cache}
        if (stream := token_stream(self.lm, self._own_class, **given)) is not None:
            return self.lm.base_model.norm(stream.to(self.lm.dtype))
        return self.lm.base_model(**given).last_hidden_state

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits `[R, vocab_size]`."""
        return self.lm.get_output_embeddings()(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights as `save_pretrained` names them.

        Raises:
            ValueError: the model has no such weight. vLLM itself checks that none is missing.
        """
        loaded = {f"lm.{name}" for name in loaded_weights(self.lm, weights)}
        set_weight_dtype(self.lm, self._weight_dtype)
        return loaded
