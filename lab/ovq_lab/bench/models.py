"""Workloads of `ovq bench --what model`: training steps and generation of models of about equal size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.cache import CACHE_KEY
from ovq.hf.equal_sizes import equal_sizes
from ovq_lab.runtime.allocator import keep_freed_memory

VOCAB_SIZE, NUM_SLOTS, CHUNK_SIZE = 4096, 1024, 256
#: Hidden size, layers, heads and intermediate size, by the name of a size.
SIZES = {"2M": (128, 4, 2, 352), "30M": (512, 8, 8, 1408), "135M": (576, 30, 9, 1536)}
#: Names of the models in tables.
MODELS = {
    "llama": "Llama (SDPA)",
    "ovq": "OVQ and windows",
    "full_attention": "full attention",
    "mamba2": "Mamba2 and windows",
    "gated_deltanet": "Gated DeltaNet and windows",
}
# Tokens per call when the prompt is read before the measurement of `generate`.
_PIECE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelWorkload:
    """Training and generation of a model with random weights.

    Attributes:
        model: one of `MODELS`: transformers' Llama, or the backbone of `OVQForCausalLM` with alternating
            sliding-window layers and layers of this mixer (`"full_attention"`: in every layer).

    Example:
        >>> ModelWorkload(model="ovq", size="2M", length=64, num_threads=1).label
        'OVQ and windows, 2M'
    """

    model: str
    size: str
    length: int
    num_threads: int

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{MODELS[self.model]}, {self.size}"

    def row(self, what: str) -> dict[str, Any]:
        """The fields of a report row that describe the workload."""
        return {
            "what": what,
            "mixer": self.model,
            "label": self.label,
            "num_slots": None,
            "length": self.length,
            "dtype": "float32",
            "size": self.size,
            "parameters": self.num_parameters(),
        }

    def build(self) -> PreTrainedModel:
        """The model, in float32, with weights from one seed."""
        hidden_size, num_layers, num_heads, intermediate_size = SIZES[self.size]
        shape: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "tie_word_embeddings": True,
            "eos_token_id": None,
            "bos_token_id": None,
        }
        torch.manual_seed(0)
        if self.model == "llama":
            # More positions than any prompt has.
            return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=1 << 20))
        mixers = ("sliding_attention", self.model)
        if self.model == "full_attention":
            mixers = ("full_attention", "full_attention")
            shape["rope_mixers"] = ["full_attention"]
        config = OVQConfig(
            **shape,
            num_slots=NUM_SLOTS,
            chunk_size=CHUNK_SIZE,
            mixer_types=[mixers[i % 2] for i in range(num_layers)],
        )
        # Makes layers of other mixers as large as an OVQ layer.
        for name, value in equal_sizes(config).items():
            setattr(config, name, value)
        return OVQForCausalLM(config)

    def num_parameters(self) -> int:
        """Number of parameters of the model."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())

    def tokens(self) -> torch.Tensor:
        """`[1, length]` token ids."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(VOCAB_SIZE, (1, self.length), generator=generator)

    def training(self) -> Callable[[], float]:
        """A function that does one step: forward, loss, backward and optimizer (fused AdamW)."""
        # As `ovq train` does.
        keep_freed_memory()
        torch.set_num_threads(self.num_threads)
        model, ids = self.build().train(), self.tokens()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        # Without logits, as in `ovq train`. Llama always returns them.
        options = {} if self.model == "llama" else {"skip_logits": True}

        def step() -> float:
            loss = model(ids, labels=ids, use_cache=False, **options).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return step

    def generation(self, num_new: int) -> Callable[[], torch.Tensor]:
        """A function that generates `num_new` tokens after the prompt, and continues at each further call."""
        torch.set_num_threads(self.num_threads)
        model, ids = self.build().eval(), self.tokens()
        cache = self._read(model, ids[:, :-1])

        def generate() -> torch.Tensor:
            nonlocal ids
            ids = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=num_new,
                max_new_tokens=num_new,
                do_sample=False,
                # The argument's name in the installed version of transformers.
                **{CACHE_KEY: cache},
            )
            return ids

        return generate

    @torch.no_grad()
    def _read(self, model: PreTrainedModel, ids: torch.Tensor) -> Any:
        """The cache after the prompt; caches of keys and values only are filled with random numbers.

        The time to attend to them does not depend on their values, and reading a long prompt with exact
        attention would take long.
        """
        if not isinstance(model, OVQForCausalLM):
            kept = DynamicCache(config=model.config)
            heads = model.config.num_attention_heads
            shape = (1, heads, ids.shape[1], model.config.hidden_size // heads)
            for i in range(model.config.num_hidden_layers):
                kept.update(torch.randn(shape), torch.randn(shape), i)
            return kept
        cache = model.make_cache()
        if self.model == "full_attention":
            for mixer, layer in zip(model.mixers(), cache.layers, strict=True):
                spec = mixer.state_spec(ids.shape[1])
                layer.restore({key: torch.randn(1, *shape) for key, (shape, _) in spec.items()}, ids.shape[1])
            return cache
        for piece in ids.split(_PIECE, 1):
            model(piece, past_key_values=cache, logits_to_keep=1)
        return cache
