"""Models as files that others load: what is refused on loading, and what is written beside the weights."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, PreTrainedModel

from ovq.hf.card import CARD_FILE, model_card, save_card
from ovq.hf.configuration_ovq import OVQConfig

# Arguments of `from_pretrained` that say where a file is.
_PLACES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class HubModel(PreTrainedModel):
    """A model that refuses weights of other models, and is saved with a card."""

    config: OVQConfig

    @classmethod
    def from_pretrained(  # type: ignore[override]  # transformers names every option
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """The model in a folder or repository, as transformers loads it.

        Raises:
            ValueError: if it holds a model of another type, also where a config is passed. transformers would
                load what has the same name and shape, and draw all other weights at random.
        """
        if pretrained_model_name_or_path is not None and kwargs.get("config") is not None:
            # Without a config, `OVQConfig` refuses that of another model.
            places = {name: kwargs[name] for name in _PLACES if name in kwargs}
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
        """Does nothing for the classes of this package, since every saved config names them (`AUTO_MAP`).

        For a class derived from one of them, its file is copied beside a saved model, as in transformers.
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
        """Save weights and configs as transformers does, and a model card where there is none.

        A card that was made by this method earlier, and not edited, is brought up to date. With
        `push_to_hub=True`, no card is written, because it would replace the one in the repository; the method
        `push_to_hub` looks whether there is one.
        """
        folder = Path(save_directory)
        # Only adapters are saved once there are some: the folder then holds no whole model.
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
        """Upload the model to the hub, with a model card if the repository has none.

        transformers' own method would upload its template of a card. The tokenizer has a `push_to_hub` of its
        own; to upload a folder of `ovq train` as it is, use `hf upload`.

        Args:
            repo_id: `"user/name"`, or a name in your own account; created if necessary.
            commit_message: first line of the commit.
            commit_description: text of the commit.
            private: whether a new repository is private; None for the account's default.
            token: of the hub; None for the one of `hf auth login`.
            revision: branch to commit to; created if necessary.
            create_pr: open a pull request instead of committing.
            max_shard_size: largest size of one file of weights.
            tags: added to those of the card.

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
        if tags:
            card.data["tags"] = list(dict.fromkeys([*card.data.get("tags", []), *tags]))
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

    def state_bytes(self, num_tokens: int) -> int:
        """Bytes of the cache of one row after `num_tokens` tokens, for the card."""
        raise NotImplementedError


def check_source(source: str, *, flag: str) -> None:
    """Check that there is a folder, or that the hub may have a model of this name: for a path, the hub's own
    error speaks of repositories.

    Args:
        source: folder of a saved model, or a name on the hub.
        flag: the option or field that it comes from, for error messages.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> check_source("no/such/folder", flag="--model")
        Traceback (most recent call last):
        ValueError: --model: expected the folder of a model or a name on the hub, found 'no/such/folder'
    """
    if Path(source).is_dir():
        return
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise ValueError(
            f"{flag}: expected the folder of a model or a name on the hub, found {source!r}"
        ) from None


def check_loaded(source: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Raise ValueError unless a saved model had all weights of the model that was loaded, and no others.

    Args:
        source: what it was loaded from.
        report: what `from_pretrained` returns with `output_loading_info=True`.
    """
    faults = [
        f"{name} of shape {list(found)} where {list(expected)} belongs"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    faults += [f"no {name}" for name in sorted(report["missing_keys"])]
    faults += [f"{name}, which has no place" for name in sorted(report["unexpected_keys"])]
    if faults:
        others = f" and {len(faults) - 1} faults more" if len(faults) > 1 else ""
        raise ValueError(
            f"{source}: expected the weights of the model that config.json describes, "
            f"found {faults[0]}{others}"
        )
