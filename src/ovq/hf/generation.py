"""The cache of a call of `generate`: which one it is, what it has read of the prompt, and what is padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ovq.hf.cache import CACHE_KEY, StateCache, one_of


class CachedGeneration:
    """What `generate` asks of models with caches of their own.

    These have `make_cache()`, and `checked_cache(cache)`, which raises ValueError for one of another model.
    """

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Add a new cache to the arguments of `forward` where a cache is used but none was given.

        A cache that was given with one row per prompt gets one row per beam or returned sequence.

        Raises:
            ValueError: a `cache_implementation` that cannot hold a state, or a prompt of which the cache has
                read every token.
        """
        model: Any = self
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"expected cache_implementation None or 'dynamic', found {implementation!r}: "
                "this model has a cache of its own, which is small already"
            )
        given = one_of(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if given is not None or generation_config.use_cache is not False:
            cache = model.make_cache() if given is None else model.checked_cache(given)
            model_kwargs[CACHE_KEY] = cache
            if not generation_config.is_assistant:
                # Assisted decoding begins to record what it reads, and other decoding need not pay for it.
                for layer in cache.layers:
                    layer.record_past = False
                if given is not None:
                    _keep_columns(given, generation_config, generation_mode, model_kwargs, batch_size)
            elif given is None:
                # What the large model rejects must be taken out again.
                cache.activate_past_recording()
            if given is None:
                return
            # transformers repeats inputs, but not a cache, for beams and for several returned sequences.
            repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            if given.num_rows == batch_size and repeats > 1:
                given.batch_repeat_interleave(repeats)
        # It marks a cache as the caller's, and makes none.
        own: Any = super()
        own._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Any:
        """The mask of a prompt without one.

        An assistant reads what was drawn before, pad tokens included, which transformers would take for
        padding.
        """
        own: Any = super()
        mask = own._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        return mask.cummax(1).values if generation_config.is_assistant else mask

    # `inputs_embeds` is a named parameter because `generate` looks for it in the signature.
    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of `forward` for the next step of `generate`.

        The caller may pass a cache and the mask of all columns, but only the last columns of token ids.
        transformers then treats all of these as new, although the cache may have read the first of them.
        """
        cache, mask = kwargs.get(CACHE_KEY), kwargs.get("attention_mask")
        if cache is not None and mask is not None:
            num_unread = mask.shape[1] - cache.get_seq_length()
            input_ids = input_ids[:, -num_unread:] if 0 < num_unread < input_ids.shape[1] else input_ids
        own: Any = super()
        return own.prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)


def _keep_columns(
    given: StateCache,
    generation_config: GenerationConfig,
    generation_mode: Any,
    model_kwargs: dict,
    batch_size: int,
) -> None:
    """Check that a prompt goes on beyond what its cache has read, and let assisted decoding know how far.

    From 5.24 on, transformers drops a mask of ones. Most decoding remembers how long that was, but assisted
    decoding then takes all columns for new ones, and would read again what the cache has read.
    """
    mask, num_read = model_kwargs.get("attention_mask"), given.get_seq_length()
    num_columns = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    if num_columns is None or num_read == 0:
        return
    if num_columns <= num_read:
        raise ValueError(
            f"expected a prompt of more tokens than the {num_read} columns that the cache has read, found "
            f"{num_columns}: pass those that were read, too, or a mask over them and the new ones"
        )
    if mask is None and generation_mode == GenerationMode.ASSISTED_GENERATION:
        device = given.layers[0].device
        model_kwargs["attention_mask"] = torch.ones(batch_size, num_columns, dtype=torch.int64, device=device)
