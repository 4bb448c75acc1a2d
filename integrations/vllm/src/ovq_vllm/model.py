"""`OVQForCausalLM` for vLLM: the library's model on the tokens of many requests at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncsByType, get_temporal_copy_spec
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ovq.hf import OVQConfig, OVQModel
from ovq.layers import Mixer
from ovq.layers.constant import ConstantStateMixer
from ovq.layers.products import Linear
from ovq_vllm.checks import check_model
from ovq_vllm.layers import ConstantLayer, ExactLayer, OVQLayer
from ovq_vllm.state import block_spec, hosts
from ovq_vllm.step import RequestLayout


class OVQForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """The language model.

    Args:
        vllm_config: the config of the engine.
        prefix: prefix of the layer names.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: OVQConfig = vllm_config.model_config.hf_config
        check_model(self.config)
        spec = _spec_of(vllm_config)
        self._num_tensors = len(spec)
        self.model = OVQModel(self.config)
        self.lm_head = Linear(self.config.hidden_size, self.config.vocab_size)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        names = [f"{prefix}.layers.{i}.mixer".lstrip(".") for i in range(len(self.config.mixer_types))]
        mixers = [block.mixer for block in self.model.layers]
        own = {
            i: OVQLayer(mixers[i], spec, vllm_config, names[i])
            for i, kind in enumerate(self.config.mixer_types)
            if kind == "ovq"
        }
        self._layers = [
            own.get(i) or _guest(mixers[i], names[i], own[host], index)
            for i, (host, index) in enumerate(hosts(self.config.mixer_types))
        ]
        # Submodules, so that vLLM finds them.
        self.attention = nn.ModuleList(x.attention for x in self._layers if isinstance(x, ExactLayer))

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of an OVQ layer's block."""
        return tuple(shape for shape, _ in _spec_of(vllm_config).values())

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Dtypes of the tensors of an OVQ layer's block."""
        return tuple(dtype for _, dtype in _spec_of(vllm_config).values())

    def get_mamba_state_copy_funcs(
        self, mamba_types: set[MambaAttentionBackendEnum]
    ) -> MambaStateCopyFuncsByType:
        """How vLLM copies a block for a request that continues from it: each tensor unchanged."""
        return dict.fromkeys(mamba_types, (get_temporal_copy_spec,) * self._num_tensors)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings `[T, hidden_size]` of tokens `[T]`."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states `[T, hidden_size]`, normalised, of the new tokens of all requests.

        Args:
            input_ids: `[T]`.
            positions: `[T]`, position of each token in its request.
            intermediate_tensors: None, as pipeline parallelism is not supported.
            inputs_embeds: `[T, hidden_size]`, instead of `input_ids`.
        """
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        place = positions[None] + 1
        # An upper bound suffices for `num_past`.
        layout = RequestLayout(num_past=int(place.max()), num_new=place.shape[1], place=place)
        for block, layer in zip(self.model.layers, self._layers, strict=True):
            inputs = block.mixer_norm(x)
            x = x + (layer(inputs, layout) if isinstance(layer, ExactLayer) else layer(inputs))
            x = x + block.mlp(block.mlp_norm(x))
        return self.model.norm(x)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits `[R, vocab_size]`."""
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights as `save_pretrained` names them.

        Raises:
            ValueError: the model has no such weight. vLLM itself checks that none is missing.
        """
        return loaded_weights(self, weights)


def _guest(mixer: Mixer, name: str, host: OVQLayer, index: int) -> ConstantLayer | ExactLayer:
    if isinstance(mixer, ConstantStateMixer):
        return ConstantLayer(mixer, host, index)
    return ExactLayer(mixer, name, host, index)


def loaded_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Load weights into a model; returns the names of the loaded parameters.

    Raises:
        ValueError: the model has no such weight.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = set()
    for name, weight in weights:
        if name not in parameters:
            raise ValueError(f"expected weights of {type(model).__name__}, found {name!r}")
        default_weight_loader(parameters[name], weight)
        loaded.add(parameters[name])
    # Tied parameters count under all their names.
    return {name for name, parameter in parameters.items() if parameter in loaded}


def _spec_of(vllm_config: VllmConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return block_spec(vllm_config.model_config.hf_config, vllm_config.model_config.dtype)
