"""Cache handling in `generate`: making or checking the cache, and which tokens it has read already."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ovq.hf.cache import CACHE_KEY, MOST_CROPPED, StateCache, one_of


class CachedGeneration:
    """Methods that `generate` calls, for models with their own cache classes.

    Such models have `make_cache()`, and `checked_cache(cache)`, which raises ValueError for another model's.
    """

    @property
    def most_drafts(self) -> int:
        """Largest number of drafts to verify at a time."""
        return MOST_CROPPED

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported, and so neither are `generate_batch` and `cache_implementation="paged"`, its users.

        Its loop runs in a thread, which loses the error of the model's first call and returns the prompts.
        """
        raise ValueError(
            "expected cache_implementation None or 'dynamic', found 'paged' (continuous batching): a state "
            "has no pages; call generate, or let rows join and leave a cache (concatenate)"
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Put the given cache into the arguments of `forward`, or a new one unless `use_cache` is False.

        A given cache with one row per prompt is expanded to one row per beam or returned sequence.

        Raises:
            ValueError: a `cache_implementation` that cannot hold a state, embeddings to be read in chunks, a
                cache that is given but not to be used, or a prompt of which it has read every token.
        """
        model: Any = self
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"expected cache_implementation None or 'dynamic', found {implementation!r}: "
                "this model has a cache of its own, which is small already"
            )
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            # transformers splits ids alone, and gives all embeddings with each piece of them.
            raise ValueError(
                "prefill_chunk_size: expected None with inputs_embeds, found "
                f"{generation_config.prefill_chunk_size}"
            )
        given = one_of(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if given is not None and generation_config.use_cache is False:
            # Every step would read the whole text again, after what the cache has read.
            raise ValueError("use_cache: expected True with a cache that is given, found False")
        is_checkpointing = model.training and getattr(model.base_model, "gradient_checkpointing", False)
        if given is None and is_checkpointing:
            # Not every layer would get it.
            generation_config.use_cache = False
        if generation_config.use_cache is not False:
            cache = model.make_cache() if given is None else model.checked_cache(given)
            model_kwargs[CACHE_KEY] = cache
            if given is None:
                if generation_config.is_assistant:
                    # Drafts that the large model rejects must be cropped.
                    cache.activate_past_recording()
                    cache.is_of_assistant = True
                return
            if not generation_config.is_assistant:
                _check_given_cache(given, generation_config, generation_mode, model_kwargs, batch_size)
            # transformers repeats inputs, but not a cache, for beams and for several returned sequences.
            repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            if given.num_rows == batch_size and repeats > 1:
                given.batch_repeat_interleave(repeats)
        # transformers then marks the cache as the caller's and makes none.
        own: Any = super()
        own._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Any:
        """The attention mask of a prompt that has none.

        The prompt of an assistant contains sampled tokens, maybe pad tokens, which transformers would mask.
        """
        own: Any = super()
        mask = own._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        return mask.cummax(1).values if generation_config.is_assistant else mask

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Outputs for the part of the prompt that the cache has not read.

        The caller may pass a cache and a mask over all columns, but token ids of the last columns only.
        transformers then treats all ids as new, although the cache may have read the first of them.
        """
        cache, num_columns = model_kwargs.get(CACHE_KEY), _num_columns(generation_config, model_kwargs)
        if cache is not None and num_columns is not None and model_kwargs.get("inputs_embeds") is None:
            num_unread = num_columns - cache.get_seq_length()
            if num_unread > input_ids.shape[1]:
                raise ValueError(
                    f"input_ids: expected at least the last {num_unread} of {num_columns} columns, which the "
                    f"cache has not read, found {input_ids.shape[1]}"
                )
            input_ids = input_ids[:, -num_unread:] if num_unread > 0 else input_ids
        own: Any = super()
        return own._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _get_candidate_generator(
        self, generation_config: GenerationConfig, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The source of the drafts of assisted decoding.

        Raises:
            ValueError: `input_ids` without the tokens that the cache has read, drafts beside embeddings,
                drafts of more tokens than the cache can crop, or by the model's own first layers.
        """
        if (found := generation_config.assistant_early_exit) is not None:
            raise ValueError(
                f"assistant_early_exit: expected None, as all layers share a cache, found {found}"
            )
        model_kwargs = kwargs["model_kwargs"]
        num_columns = _num_columns(generation_config, model_kwargs) or 0
        has_embeds = model_kwargs.get("inputs_embeds") is not None
        if has_embeds and (input_ids.shape[1] or not generation_config.prompt_lookup_num_tokens):
            # The first call of the model reads them without the drafts, and so verifies none.
            raise ValueError(
                "inputs_embeds: expected None in assisted decoding, or no ids beside them and prompt lookup, "
                f"found embeddings and {input_ids.shape[1]} ids"
            )
        if not has_embeds and input_ids.shape[1] < num_columns:
            # transformers cuts the mask to the length of the ids.
            raise ValueError(
                f"input_ids: expected all {num_columns} columns in assisted decoding, with those that the "
                f"cache has read, found {input_ids.shape[1]}"
            )
        own: Any = super()
        drafts = own._get_candidate_generator(generation_config, input_ids, *args, **kwargs)
        for option, attribute in (
            ("prompt_lookup_num_tokens", "num_output_tokens"),
            ("num_assistant_tokens", "num_assistant_tokens"),
        ):
            if (found := getattr(drafts, attribute, 0)) > self.most_drafts:
                raise ValueError(
                    f"{option}: expected at most {self.most_drafts}, to be verified exactly, found {found}"
                )
        if hasattr(drafts, "num_assistant_tokens"):
            update = drafts.update_candidate_strategy

            def update_within_limit(*args: Any) -> None:
                update(*args)
                # The schedule "heuristic" raises the number after each round in which all were accepted.
                drafts.num_assistant_tokens = min(drafts.num_assistant_tokens, self.most_drafts)

            drafts.update_candidate_strategy = update_within_limit
        return drafts

    # `inputs_tensor` is a named parameter because `generate` looks for it in the signature.
    def _assisted_decoding(self, *args: Any, inputs_tensor: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate by drafts. The cache then goes on recording only if it did before."""
        own: Any = super()
        cache = kwargs.get(CACHE_KEY)
        if isinstance(cache, StateCache):
            cache.num_prompt, was_recording = args[0].shape[1], cache.is_recording
        try:
            return own._assisted_decoding(*args, inputs_tensor=inputs_tensor, **kwargs)
        finally:
            if isinstance(cache, StateCache):
                cache.num_prompt = None
                for layer in cache.layers:
                    layer.record_past = was_recording

    # `inputs_embeds` is a named parameter because `generate` looks for it in the signature.
    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Arguments of `forward` for the next step of `generate`.

        Assisted decoding begins with the ids of all columns, although the cache may have read the first.
        """
        cache, mask = kwargs.get(CACHE_KEY), kwargs.get("attention_mask")
        if cache is not None and mask is not None:
            num_unread = mask.shape[1] - cache.get_seq_length()
            input_ids = input_ids[:, -num_unread:] if 0 < num_unread < input_ids.shape[1] else input_ids
        # Of `stop_strings` and token healing, which `generate` has made use of by now.
        kwargs.pop("tokenizer", None)
        own: Any = super()
        return own.prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)


def execution_device(model: Any, own: torch.device) -> torch.device:
    """Device on which accelerate runs a model whose weights it may have offloaded; `own` if it has not."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    found = getattr(hook, "execution_device", None)
    return own if found is None else torch.device(found)


def _num_columns(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> int | None:
    """Columns of a prompt, those that a given cache has read included; None if unknown.

    From 5.24 on, transformers drops a mask of ones and remembers its length.
    """
    mask = model_kwargs.get("attention_mask")
    return getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]


def _check_given_cache(
    given: StateCache,
    generation_config: GenerationConfig,
    generation_mode: Any,
    model_kwargs: dict,
    batch_size: int,
) -> None:
    """Check that the prompt is longer than what its cache has read, and embeddings are those of all columns;
    give assisted decoding its mask back.

    Without a mask of ones, which transformers drops, assisted decoding takes all columns for new ones.
    """
    num_columns, num_read = _num_columns(generation_config, model_kwargs), given.get_seq_length()
    if num_columns is None or num_read == 0:
        return
    if num_columns <= num_read:
        raise ValueError(
            f"expected a prompt of more tokens than the {num_read} columns that the cache has read, found "
            f"{num_columns}: pass those that were read, too, or a mask over them and the new ones"
        )
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None and embeds.shape[1] != num_columns:
        # transformers leaves out as many of them as the cache has read columns.
        raise ValueError(
            f"inputs_embeds: expected those of all {num_columns} columns, with those that the cache has "
            f"read, found {embeds.shape[1]}"
        )
    if model_kwargs.get("attention_mask") is None and generation_mode == GenerationMode.ASSISTED_GENERATION:
        device = given.layers[0].device
        model_kwargs["attention_mask"] = torch.ones(batch_size, num_columns, dtype=torch.int64, device=device)
