"""`OVQPreTrainedModel`: initialisation, saving and loading, caches, and changes of dictionary options."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ovq.hf.block import OVQBlock
from ovq.hf.cache import OVQCache
from ovq.hf.card import CARD_FILE, is_replaceable, model_card, save_card
from ovq.hf.configuration_ovq import OVQConfig
from ovq.hf.generation import execution_device
from ovq.layers import Mixer, OVQAttention
from ovq.layers.common import OwnWeights
from ovq.layers.heads import AttentionMixer
from ovq.layers.logn import check_logn_length
from ovq.layers.products import Linear
from ovq.ops.options import BEST_MERGE

# Config fields that do not affect the memory; all others, including future ones, do.
WITHOUT_EFFECT = frozenset(
    {"initializer_range", "tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}
)

# Arguments of `from_pretrained` for locating files.
PLACES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class OVQPreTrainedModel(PreTrainedModel):
    """Base class of `OVQModel` and `OVQForCausalLM`; refuses other models' weights, is saved with a card."""

    #: Kind of the contexts (`ovq.hf.context`) that the model makes.
    context_kind = "ovq"
    config: OVQConfig
    config_class = OVQConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OVQBlock"]  # noqa: RUF012  (transformers declares it so)
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": OVQBlock}  # noqa: RUF012  (likewise)

    def __init__(self, config: OVQConfig) -> None:
        # A copy, as `set_merge` and others change it, and more models may be made from the same config.
        super().__init__(copy.deepcopy(config))

    def post_init(self) -> None:
        """Finish `__init__`, as in transformers: the models within this one get its config.

        A model to be quantized gets projections of PyTorch's class: quantizers such as bitsandbytes leave
        derived ones as they are, and our kernels do not know quantized weights.
        """
        for module in self.modules():
            if isinstance(module, OVQPreTrainedModel):
                module.config = self.config
            if getattr(self.config, "quantization_config", None) is not None and type(module) is Linear:
                module.__class__ = nn.Linear  # type: ignore[assignment]  # its base class
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, OwnWeights):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # transformers names every option
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """The model in a folder or repository, as transformers loads it.

        Raises:
            ValueError: if it holds a model of another type, also if a config is passed. transformers would
                load weights with the same name and shape, and initialise all others at random.
        """
        if pretrained_model_name_or_path is not None and kwargs.get("config") is not None:
            # Without a config, `OVQConfig` refuses that of another model.
            places = {name: kwargs[name] for name in PLACES if name in kwargs}
            saved: dict[str, Any] = {}
            # A folder of weights alone has no config, so the one passed decides.
            with contextlib.suppress(OSError):
                saved, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **places)
            expected = OVQConfig.model_type
            if (found := saved.get("model_type", expected)) != expected:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: expected a model of type {expected!r}, found {found!r}"
                )
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing for the classes of this package, since every saved config names them (`AUTO_MAP`).

        The file of a derived class is copied beside a saved model, as in transformers.
        """
        if not cls.__module__.startswith("ovq."):
            super().register_for_auto_class(auto_class)

    def save_pretrained(  # type: ignore[override]  # transformers names every option
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save weights and configs as transformers does, and a model card if there is none.

        A card made by this method earlier, and not edited, is updated. With `push_to_hub=True`, no card is
        written, because it would replace the one in the repository; the method `push_to_hub` checks for one.
        """
        folder = Path(save_directory)
        # With adapters, only these are saved, so the folder holds no whole model.
        is_whole = not getattr(self, "_hf_peft_config_loaded", False)
        if is_main_process and is_whole and not push_to_hub and not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            save_card(model_card(self, name=folder.resolve().name), folder)
        super().save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            state_dict=state_dict,
            push_to_hub=push_to_hub,
            **kwargs,
        )

    def push_to_hub(  # type: ignore[override]  # a decorator of transformers hides the signature of its own
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Upload the model to the hub, with a new model card unless the repository has an edited one.

        transformers' own method would upload a template card. The tokenizer has its own `push_to_hub`; to
        upload a folder of `ovq train` as it is, use `hf upload`.

        Args:
            repo_id: `"user/name"`, or a name in your own account; created if necessary.
            revision: branch to commit to; created if necessary.
            tags: added to those of the card.
            commit_message, commit_description, private, token, create_pr, max_shard_size: as in transformers.

        Returns:
            The commit; `commit_url` is its address.
        """
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            with open(hub.hf_hub_download(repo_id, CARD_FILE, revision=revision), encoding="utf-8") as file:
                card = ModelCard(file.read())
        except EntryNotFoundError:
            card = model_card(self, name=repo_id)
        all_tags = list(dict.fromkeys([*(card.data.get("tags") or []), *(tags or [])]))
        if is_replaceable(card.content):
            card = model_card(self, name=repo_id, tags=all_tags)
        elif tags:
            card.data["tags"] = all_tags
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            card.save(os.path.join(folder, CARD_FILE))
            return hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    @property
    def device(self) -> torch.device:
        """Device for inputs, which differs from that of weights offloaded by accelerate."""
        return execution_device(self, super().device)

    def make_cache(self) -> OVQCache:
        """An empty cache of this model."""
        return OVQCache(self.config)

    def memory_fields(self) -> dict[str, Any]:
        """The config fields that a memory depends on: all except `WITHOUT_EFFECT`."""
        names = OVQConfig.field_defaults(self.config.mixer_types).keys()
        return {name: getattr(self.config, name) for name in sorted(names - WITHOUT_EFFECT)}

    def row_inputs(self, cache: OVQCache, lengths: Sequence[int], num_new: int) -> dict[str, Tensor]:
        """Arguments of `forward` for `num_new` tokens of rows that have read `lengths` tokens each.

        That is the mask `[B, P + T]` over cached and new columns, or nothing without padding.
        """
        num_columns = cache.get_seq_length()
        if not cache.layers[0].has_padding and min(lengths) >= num_columns:
            return {}
        num_real = torch.tensor(lengths, device=self.device)[:, None]
        column = torch.arange(num_columns + num_new, device=self.device)
        return {"attention_mask": (column >= num_columns - num_real).long()}

    def mixers(self) -> list[Mixer]:
        """The mixer of each layer."""
        return [module for module in self.modules() if isinstance(module, Mixer)]

    def set_num_slots(self, num_slots: int) -> None:
        """Give every OVQ layer `num_slots` slots from now on, and record it in the config.

        Earlier caches remain valid: their states are resized when they are next used.

        Raises:
            ValueError: if it is below 1, or the model has no OVQ layers, or has layers of another kind whose
                size depends on `num_slots`.

        Example:
            >>> from ovq.hf import OVQModel
            >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
            >>> model = OVQModel(config)
            >>> model.set_num_slots(4096)
            >>> model.config.num_slots
            4096
        """
        layers = self.ovq_layers().values()
        others = (mixer for mixer in self.mixers() if not isinstance(mixer, OVQAttention))
        if fixed := sorted({type(mixer).__name__ for mixer in others if "num_slots" in mixer.config_fields}):
            raise ValueError(
                f"expected OVQ layers alone to depend on num_slots, found {fixed}, whose size cannot change"
            )
        for layer in layers:
            layer.set_num_slots(num_slots)
        self.config.num_slots = num_slots

    def set_merge(self, merge: str, *, growth: str | None = None, value_weight: float | None = None) -> None:
        """Change the update rule of the dictionary in every OVQ layer, and record it in the config.

        Weights do not depend on the rule: a model trained with the paper's rule, `"existing"`, recalls most
        with `"nearest"` (docs/use/training.md). Earlier caches remain valid and continue from their slots.

        Args:
            merge: `"existing"`, `"updated"` or `"nearest"`.
            growth: schedule of the dictionary: `"plateau"`, `"linear"` or `"immediate"`; None for the
                default of `merge`.
            value_weight: weight of distances between values relative to those between keys, in rules that
                merge pairs; None for the current weight.

        Raises:
            ValueError: if the model has no OVQ layers, or as `OVQConfig` does for these options. Nothing is
                changed.

        Example:
            >>> from ovq.hf import OVQModel
            >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
            >>> model = OVQModel(config)
            >>> model.set_merge("nearest")
            >>> model.config.merge, model.config.growth, model.config.value_weight
            ('nearest', 'immediate', 0.35)
        """
        for layer in self.ovq_layers().values():
            layer.set_merge(merge, growth=growth, value_weight=value_weight)
            for name, value in layer.learning.items():
                if name != "ablation":
                    setattr(self.config, name, value)

    def set_state_dtype(self, state_dtype: str) -> None:
        """Keep the slots of every OVQ layer in this format from now on, and record it in the config.

        Slots in `"bfloat16"` take half the bytes of `"float32"`, those in `"int8"` a quarter, so that a
        memory of the same size holds two to four times as many (docs/results/recall.md). For inference: such
        layers refuse gradients. Earlier caches remain valid, and are converted when they are next used.

        Raises:
            ValueError: if there is no such format, or the model has no OVQ layers. Nothing is changed.

        Example:
            >>> from ovq.hf import OVQModel
            >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
            >>> model = OVQModel(config)
            >>> before = model.state_bytes(2048)
            >>> model.set_state_dtype("int8")
            >>> model.config.state_dtype, before > model.state_bytes(2048)
            ('int8', True)
        """
        for layer in self.ovq_layers().values():
            layer.set_state_dtype(state_dtype)
        self.config.state_dtype = state_dtype

    def set_logn_length(self, logn_length: int | None) -> None:
        """Scale logits beyond `logn_length` tokens from now on, and record it in the config.

        A softmax over more tokens than in training is flatter than the model expects. So the logits of the
        t-th token of a row are multiplied by log t / log `logn_length` if that is above 1, in all layers with
        full attention or OVQ. Weights and caches stay unchanged.

        Args:
            logn_length: best the length of the training texts, in tokens; None for no scaling.

        Raises:
            ValueError: if it is no integer of at least 2, or there is no such layer. Nothing is changed.

        Example:
            >>> from ovq.hf import OVQModel
            >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
            >>> model = OVQModel(config)
            >>> model.set_logn_length(256)
            >>> model.config.logn_length
            256
        """
        layers = [x for x in self.mixers() if isinstance(x, AttentionMixer) and x.supports_logn]
        if not layers:
            raise ValueError(
                "expected layers with log-n scaling, such as 'ovq' and 'full_attention', "
                f"found mixer_types {self.config.mixer_types}"
            )
        for layer in layers:
            layer.set_logn_length(logn_length)
        self.config.logn_length = logn_length

    def ask_as_recommended(self, *, logn_length: int | None = None) -> None:
        """Switch every OVQ layer of a trained model to the merge rule that recalls most.

        It is the second half of `OVQConfig.recommended`: train with the paper's rule, infer with this one,
        with as many slots as there is memory for (`set_num_slots`).

        Args:
            logn_length: length of the training texts in tokens, beyond which logits are scaled (see
                `set_logn_length`); None for no change.

        Raises:
            ValueError: as for `set_merge` and `set_logn_length`. Nothing is changed.

        Example:
            >>> from ovq.hf import OVQModel
            >>> config = OVQConfig.recommended(vocab_size=8, hidden_size=16, num_hidden_layers=2)
            >>> model = OVQModel(config)
            >>> model.ask_as_recommended(logn_length=2048)
            >>> model.config.merge, model.config.logn_length
            ('nearest', 2048)
        """
        check_logn_length(logn_length)
        self.set_merge(BEST_MERGE)
        if logn_length is not None:
            self.set_logn_length(logn_length)

    def ovq_layers(self) -> dict[int, OVQAttention]:
        """The OVQ mixers, by layer index.

        Raises:
            ValueError: if the model has none.
        """
        layers = {i: mixer for i, mixer in enumerate(self.mixers()) if isinstance(mixer, OVQAttention)}
        if not layers:
            raise ValueError(
                f"expected a model with 'ovq' layers, found mixer_types {self.config.mixer_types}"
            )
        return layers

    def state_bytes(self, num_tokens: int) -> int:
        """Bytes of the cache of one row after `num_tokens` tokens, computed for the dtype of the weights.

        Example:
            >>> from ovq.hf import OVQModel
            >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
            >>> model = OVQModel(config).eval()
            >>> cache = OVQCache(config)
            >>> _ = model(torch.zeros(1, 300, dtype=torch.long), past_key_values=cache)
            >>> model.state_bytes(300) == cache.nbytes
            True
        """
        return sum(mixer.state_bytes(num_tokens, self.dtype) for mixer in self.mixers())
