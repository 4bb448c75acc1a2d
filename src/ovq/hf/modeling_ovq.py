"""The OVQ language model for transformers: one pre-norm backbone for all mixers.

Everything that depends on the version of transformers is in `cache.py` and `generation.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ovq.hf.block import OVQBlock, is_token, with_steps
from ovq.hf.cache import CACHE_KEY, MOST_CROPPED, OVQCache, one_cache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.hf.generation import CachedGeneration
from ovq.hf.loss import can_be_pieced, loss_in_pieces
from ovq.hf.packing import PACKING_KWARGS, check_tensors, packed_offsets
from ovq.hf.pretrained import OVQPreTrainedModel
from ovq.layers import SequenceLayout
from ovq.layers.common import RMSNorm, check_kwargs
from ovq.layers.products import Linear

# Keyword arguments of `forward` that transformers passes and its decorators use.
_TRANSFORMERS_KWARGS = frozenset({"output_hidden_states", "output_attentions", "return_dict"})


@dataclass
class OVQModelOutput(BaseModelOutputWithPast):
    """Output of `OVQModel`: the usual fields and, in training, the sum of the layers' auxiliary losses.

    Attributes:
        auxiliary_loss: a scalar, already weighted (`"vq"` has one); None if there is none.
    """

    auxiliary_loss: Tensor | None = None


class OVQModel(OVQPreTrainedModel):
    """Embedding, layers and final norm.

    Example:
        >>> import torch
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> OVQModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 16])
    """

    def __init__(self, config: OVQConfig):
        super().__init__(config)
        config = self.config
        # Fields may have been set since, and a model of such a config could be saved but not loaded.
        config.check_fields()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OVQBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: OVQCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: OVQCache | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> OVQModelOutput:
        """Run the backbone.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, P + T]` of 0 and 1 over cached and new columns, padding left or right. None:
                all tokens are real.
            position_ids: `[B, T]`; must rise by one from token to token or, in one row without mask and
                cache, start over where a packed row begins. No layer needs them, because only differences of
                positions matter.
            past_key_values: an `OVQCache`, updated in place.
            inputs_embeds: `[B, T, hidden_size]`, instead of `input_ids`.
            use_cache: return a cache. None: `config.use_cache`, but not while training or with packed rows.
            cache: newer name of `past_key_values`.
            cu_seqlens: `[R + 1]` offsets of rows packed into one (`B == 1`). The forms that the collators of
                transformers and trl use are equivalent: `cu_seq_lens_q`, `seq_idx`, restarting positions.
            kwargs: `output_hidden_states`, `return_dict`, and `ovq.hf.packing.PACKING_KWARGS`.

        Raises:
            ValueError: if an input has a wrong shape, or a keyword argument is unknown.
        """
        _check_kwargs(self.config, kwargs, _TRANSFORMERS_KWARGS | PACKING_KWARGS)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds, found both or neither")
        _check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        if inputs_embeds is None:
            try:
                inputs_embeds = self.embed_tokens(input_ids)
            except IndexError:
                check_ids("input_ids", input_ids, self.config.vocab_size)
                raise
        past = one_cache(past_key_values, cache)
        if past is not None and len(past.layers) != len(self.layers):
            raise ValueError(
                f"expected a cache of {len(self.layers)} layers, as the model has, "
                f"found one of {len(past.layers)}"
            )
        num_past = 0 if past is None else past.num_columns
        cu_seqlens = packed_offsets(
            cu_seqlens,
            position_ids,
            kwargs,
            inputs=inputs_embeds,
            is_continued=attention_mask is not None or num_past > 0,
        )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if past is None and use_cache:
            past = OVQCache(self.config)
        if past is not None and self.gradient_checkpointing and self.training:
            # The backward pass would run the layers again with a cache that has already been updated.
            raise ValueError("expected no cache while training with gradient checkpointing, found one")
        batch_size, num_new, _ = inputs_embeds.shape
        layout = SequenceLayout.of(
            attention_mask,
            batch_size=batch_size,
            num_past=num_past,
            num_new=num_new,
            cu_seqlens=cu_seqlens,
        )
        if layout.new_mask is not None:
            # As in layers: zero times NaN would reach the gradients. Of ids, too, so that results are equal.
            inputs_embeds = inputs_embeds.masked_fill(~layout.new_mask[..., None], 0)
        if position_ids is not None and cu_seqlens is None:
            _check_positions(position_ids, layout)
        recorded, is_captured = None, kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if past is not None and past.is_recording:
            if num_new > MOST_CROPPED and cu_seqlens is None:
                if is_captured:
                    raise ValueError(
                        f"output_hidden_states: expected at most {MOST_CROPPED} tokens at a time with a "
                        f"cache that records what it reads, found {num_new}"
                    )
                return self._read_recording(inputs_embeds, attention_mask, past)
            recorded = past.to_record(self, inputs_embeds, attention_mask)

        hidden_states = inputs_embeds
        auxiliary_loss: Tensor | None = None
        layers: list[OVQBlock] = list(self.layers)  # type: ignore[arg-type]  # a ModuleList says Module
        decoded = None if is_captured or past is None or not is_token(hidden_states, layout) else past
        while layers:
            if decoded is not None:
                hidden_states, layers = with_steps(layers, hidden_states, layout, decoded)
                if not layers:
                    break
            layer, *layers = layers
            # Outside the layer, because gradient checkpointing runs a layer twice.
            step = layer.mixer.begin_step()
            hidden_states, own_loss = layer(hidden_states, layout, past_key_values=past, step=step)
            if own_loss is not None:
                auxiliary_loss = own_loss if auxiliary_loss is None else auxiliary_loss + own_loss
        if past is not None:
            # Only now, as the tokens of a failed call do not count as read. None if nothing is recorded.
            past.recorded = recorded
        kept: dict[str, Any] = {CACHE_KEY: past}
        return OVQModelOutput(
            last_hidden_state=self.norm(hidden_states),
            auxiliary_loss=auxiliary_loss,
            **kept,
        )

    def _read_recording(self, inputs: Tensor, mask: Tensor | None, past: OVQCache) -> OVQModelOutput:
        """Outputs of many tokens, of which only the last `MOST_CROPPED` are recorded in the cache."""
        kept: dict[str, Any] = {CACHE_KEY: past}
        first, last = inputs.split([inputs.shape[1] - MOST_CROPPED, MOST_CROPPED], 1)
        of_first = None if mask is None else mask[:, :-MOST_CROPPED]
        try:
            for layer in past.layers:
                layer.record_past = False
            outputs = [self(None, of_first, inputs_embeds=first, return_dict=True, **kept)]
        finally:
            past.activate_past_recording()
        outputs.append(self(None, mask, inputs_embeds=last, return_dict=True, **kept))
        return OVQModelOutput(torch.cat([each.last_hidden_state for each in outputs], 1), **kept)


class OVQForCausalLM(CachedGeneration, OVQPreTrainedModel, GenerationMixin):
    """The language model: `OVQModel` and an output layer, with loss and `generate`.

    Example:
        >>> import torch
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = OVQForCausalLM(config).eval()
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> model.generate(prompt, max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (likewise)

    def __init__(self, config: OVQConfig):
        super().__init__(config)
        self.model = OVQModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: OVQCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: OVQCache | None = None,
        cu_seqlens: Tensor | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, cache, inputs_embeds, cu_seqlens: as in
                `OVQModel.forward`.
            labels: `[B, T]`, usually `input_ids`; shifted here. -100 is ignored. With `cu_seqlens` the first
                token of each row is ignored too, because no token before it belongs to its row. In training
                the loss includes the layers' auxiliary losses. (The Trainer's label smoothing takes labels
                out of the batch: set -100 at the beginnings of rows yourself.)
            use_cache: return a cache. None: as in `OVQModel.forward`, and not with labels.
            logits_to_keep: compute logits for the last positions only, this many (0: for all), or for these
                indices; not with labels.
            skip_logits: return the loss without logits (`None`). Logits are then only computed at positions
                with a target, which is all that training needs, and in pieces: memory does not grow with
                positions times vocabulary, unless the output layer has hooks or an adapter, or the loss is a
                custom one.
            kwargs: those of `OVQModel.forward`; `num_items_in_batch` for the loss (from the Trainer);
                `shift_labels` `[B, T]` instead of `labels`: the target of each position, so that the target
                of the last one may lie outside this call; -100 is ignored.

        Raises:
            ValueError: if an input has a wrong shape, a keyword argument is unknown, or `skip_logits` is set
                without labels or with `logits_to_keep`.
        """
        allowed = _TRANSFORMERS_KWARGS | PACKING_KWARGS | {"num_items_in_batch", "shift_labels"}
        _check_kwargs(self.config, kwargs, allowed)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        # No parameter: the Trainer takes those with "label" in their names for always given.
        shift_labels = kwargs.pop("shift_labels", None)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        check_tensors(
            input_ids=input_ids, inputs_embeds=inputs_embeds, labels=labels, shift_labels=shift_labels
        )
        for name, given in (("shift_labels", shift_labels), ("labels", labels)):
            if given is not None and inputs is not None and given.shape != inputs.shape[:2]:
                raise ValueError(
                    f"{name}: expected shape {list(inputs.shape[:2])}, that of the input, "
                    f"found {list(given.shape)}"
                )
            if given is not None:
                _check_integers(name, given)
        past = one_cache(past_key_values, cache)
        if labels is not None and shift_labels is None and inputs is not None:
            _check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
            # Without labels, only the backbone needs the offsets, and it calls this itself.
            cu_seqlens = packed_offsets(
                cu_seqlens,
                position_ids,
                kwargs,
                inputs=inputs,
                is_continued=attention_mask is not None or (past is not None and past.get_seq_length() > 0),
            )
            kwargs = {name: value for name, value in kwargs.items() if name not in PACKING_KWARGS}
        # PyTorch's loss takes int64 alone.
        labels = None if labels is None else labels.long()
        # transformers takes a view of them, and those of a window are a part of longer rows.
        targets: Any = None if shift_labels is None else shift_labels.long().contiguous()
        if targets is None and labels is not None:
            if cu_seqlens is not None:
                labels = labels.masked_fill(_is_first(cu_seqlens, labels.shape[1]), -100)
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        has_targets = targets is not None
        if skip_logits and not has_targets:
            raise ValueError("skip_logits: expected False without labels, found True")
        if has_targets and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(
                "logits_to_keep: expected 0 with labels, as the loss takes the logits of all positions, "
                f"found {logits_to_keep}"
            )
        if has_targets:
            # Sequences with targets are not continued, so evaluation need not pay for a cache.
            use_cache = bool(use_cache)
        outputs = self.model(
            input_ids,
            attention_mask,
            # Offsets contain all information of the positions.
            position_ids if cu_seqlens is None else None,
            past,
            inputs_embeds,
            use_cache,
            cu_seqlens=cu_seqlens,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        has_more = outputs.auxiliary_loss is not None and torch.is_grad_enabled() and self.training
        if has_more and not has_targets and not torch.compiler.is_compiling():
            warnings.warn(
                "labels: expected some in training, as the loss has an auxiliary part (of the mixer 'vq'), "
                "found none, as with label smoothing: without them nobody adds it",
                stacklevel=2,
            )
        # A compiled graph keeps all positions, as its shapes must not depend on the labels.
        if skip_logits and not torch.compiler.is_compiling():
            kept = targets != -100
            targets, hidden_states = targets[kept], hidden_states[kept]
            check_ids("labels", targets, self.config.vocab_size)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept]
        loss = logits = None
        if skip_logits and can_be_pieced(self.lm_head, self.loss_function):
            loss = loss_in_pieces(hidden_states, self.lm_head.weight, targets, num_items_in_batch)
        else:
            logits = self.lm_head(hidden_states)
        if has_targets:
            if loss is None:
                try:
                    loss = self.loss_function(
                        logits,
                        # For custom losses, which shift the labels themselves.
                        None if skip_logits else labels,
                        self.config.vocab_size,
                        num_items_in_batch=num_items_in_batch,
                        shift_labels=targets,
                    )
                except IndexError:
                    check_ids("labels", targets[targets != -100], self.config.vocab_size)
                    raise
            if outputs.auxiliary_loss is not None:
                # The other losses of a step's micro-batches are summed, each weighted by its share of the
                # step's targets.
                num_targets = (targets != -100).sum()
                share = 1 if num_items_in_batch is None else num_targets / num_items_in_batch
                loss = loss + share * outputs.auxiliary_loss
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_KEY: getattr(outputs, CACHE_KEY)},
        )

    def _prepare_position_ids_for_generation(self, *args: Any) -> None:
        """Return None, as no layer needs positions; `generate` would extend them with every token."""

    def checked_cache(self, cache: Any) -> OVQCache | None:
        """`cache`; ValueError unless it is an `OVQCache` or None."""
        return one_cache(cache, None)


def _check_kwargs(config: OVQConfig, kwargs: dict[str, Any], allowed: frozenset[str]) -> None:
    is_asked = kwargs.get("output_attentions", config.output_attentions)
    check_kwargs(kwargs, allowed, output_attentions=is_asked)


def _check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden_size: int) -> None:
    check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds)
    if input_ids is not None and input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected shape [B, T], found {list(input_ids.shape)}")
    if input_ids is not None:
        _check_integers("input_ids", input_ids)
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != hidden_size):
        raise ValueError(
            f"inputs_embeds: expected shape [B, T, {hidden_size}], found {list(inputs_embeds.shape)}"
        )


def _check_integers(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, found {ids.dtype}")


def check_ids(name: str, ids: Tensor | None, vocab_size: int) -> None:
    """Raise ValueError for ids outside of the vocabulary."""
    if ids is None or ids.numel() == 0:
        return
    # One transfer from the device.
    lowest, highest = torch.stack(ids.aminmax()).tolist()
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"{name}: expected ids from 0 to {vocab_size - 1}, found {lowest} to {highest}")


def _is_first(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Mask `[T]` of the tokens at which a packed row begins."""
    # Empty rows at the end begin after the last token.
    is_first = torch.zeros(num_tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
    return is_first.index_fill(0, cu_seqlens[:-1].long(), True)[:-1]


def _check_positions(position_ids: Tensor, layout: SequenceLayout) -> None:
    """Refuse positions that do not rise by one from each real token of a row to the next."""
    if position_ids.shape[-1] == 1:
        return
    steps = position_ids.diff(dim=-1)
    if layout.new_mask is not None:
        steps = steps.masked_fill(~(layout.new_mask[:, 1:] & layout.new_mask[:, :-1]), 1)
    if bool((steps != 1).any()):
        raise ValueError(
            "expected position_ids that rise by one from token to token, found others; "
            "to pack several rows into one, pass cu_seqlens"
        )
