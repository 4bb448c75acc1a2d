"""`adapt`: a little training for a converted model, that goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovq.convert.adapt.heads import HeadErrors
from ovq.convert.adapt.logits import LogitErrors, check_peft
from ovq.convert.adapt.reading import SlotReading
from ovq.convert.adapt.settings import AdaptSettings
from ovq.convert.adapt.texts import Sequences
from ovq.convert.attach import ConvertedMixin, set_memory
from ovq.convert.context import fingerprint
from ovq.ops.serialization import read_file, write_file
from ovq.text import Corpus

FORMAT = "ovq-adaptation"
VERSION = "1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptProgress:
    """How far an adaptation is.

    Attributes:
        stage: 1 or 2.
        tokens: tokens of this stage read so far, by all runs. total: those that it reads.
        loss: of the last batch: the mean relative error of outputs in stage 1, the divergence in stage 2.
        tokens_per_second: of this run and stage.
    """

    stage: int
    tokens: int
    total: int
    loss: float
    tokens_per_second: float


def adapt(
    model: Any,
    corpus: Corpus,
    *,
    settings: AdaptSettings | None = None,
    tokenizer: Any = None,
    checkpoint: str | os.PathLike | None = None,
    progress: Callable[[AdaptProgress], None] | None = None,
) -> Any:
    """Train a converted model a little, in place, so that it reads its memory better.

    Stage 1: every query head learns a factor for the scores of slots of several tokens, and what is added to
    them, so that the output of its layer's attention is as it was with all tokens, on what the original model
    computes for a text. These are numbers of `memory_config` afterwards. Stage 2: matrices of the attention
    get changes of low rank (LoRA), so that the model predicts what the original predicts; they are added to
    the weights in the end. Every sequence starts with an empty memory, which goes from piece to piece.

    Args:
        model: a converted model.
        corpus: the texts, as tokens of the model's tokenizer.
        settings: how much is read and how it is learned from; `AdaptSettings()` if None.
        tokenizer: the model's, which `settings.needle_share` needs.
        checkpoint: a file that is written now and then; if it is there, the run goes on from it and ends with
            the same weights as without the interruption. It is left there.
        progress: called after each batch of sequences.

    Returns:
        The model.

    Raises:
        ValueError: a model that is not converted or has no slots; a corpus too small, or with tokens that the
            model does not know; a checkpoint of another run; stage 2 without peft; needles without a
            tokenizer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ovq.convert import attach
        >>> from ovq.text import TextSource, load_corpus
        >>> sizes = dict(vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()
        >>> model = attach(model, num_slots=4, window=16, chunk_size=8)
        >>> corpus = load_corpus(TextSource(dataset="stdlib", subset="json", held_out=0), "train")
        >>> settings = AdaptSettings(head_tokens=256, logit_tokens=0, length=128, piece_size=64)
        >>> _ = adapt(model, corpus, settings=settings)
        >>> len(model.memory_config.slot_bias[0])
        2
    """
    settings = AdaptSettings() if settings is None else settings
    _check(model, corpus)
    if settings.logit_tokens:
        check_peft()
    run = _Run(model, corpus, settings, tokenizer, None if checkpoint is None else Path(checkpoint))
    was_training = model.training
    needed_grad = [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        for stage in (1, 2):
            run.read(stage, progress)
    finally:
        for parameter, was_needed in needed_grad:
            parameter.requires_grad_(was_needed)
        model.train(was_training)
    return model


class _Run:
    """An adaptation, with all that a checkpoint holds.

    Args:
        model, corpus, settings, tokenizer: as for `adapt`. path: the checkpoint's, or None.
    """

    def __init__(
        self, model: Any, corpus: Corpus, settings: AdaptSettings, tokenizer: Any, path: Path | None
    ) -> None:
        self._model, self._settings, self._path = model, settings, path
        self._sequences = Sequences(
            corpus,
            length=settings.length,
            seed=settings.seed,
            needle_share=settings.needle_share,
            tokenizer=tokenizer,
        )
        self._reading = SlotReading(model.memory_config, model.config.num_attention_heads).to(model.device)
        # What a checkpoint must agree with.
        self._about = {
            "settings": json.dumps(dataclasses.asdict(settings)),
            "corpus": corpus.digest,
            **(fingerprint(model) if path is not None else {}),
        }
        self._stage, self._done = 1, 0
        self._saved: dict[str, Tensor] = {}
        if path is not None and path.exists():
            self._load(path)

    def read(self, stage: int, progress: Callable[[AdaptProgress], None] | None) -> None:
        """Read what is left of a stage, and let the model have what was learned."""
        settings, total = self._settings, self._settings.num_batches(stage)
        if self._stage > stage or not total:
            return
        if self._stage < stage:
            self._stage, self._done, self._saved = stage, 0, {}
        errors: HeadErrors | LogitErrors
        parameters = {f"reading.{name}": p for name, p in self._reading.named_parameters()}
        groups: list[dict[str, Any]] = [{"params": list(parameters.values()), "rate": settings.head_rate}]
        if stage == 1:
            errors = HeadErrors(self._model, self._reading)
        else:
            errors = LogitErrors(
                self._model,
                self._reading,
                rank=settings.lora_rank,
                seed=settings.seed,
                short_windows=settings.short_windows,
            )
            parameters |= errors.parameters()
            groups.append({"params": list(errors.parameters().values()), "rate": settings.lora_rate})
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
        state = _State(parameters, optimizer)
        state.restore(self._saved)
        started, before = time.monotonic(), self._done
        per_batch = settings.length * settings.batch_size
        while self._done < total:
            # Stage 2 goes on in the corpus where stage 1 has stopped.
            number = self._done + (settings.num_batches(1) if stage == 2 else 0)
            batch = self._sequences.batch(number, settings.batch_size)
            _check_tokens(self._model, int(batch.max()))
            batch = batch.to(self._model.device)
            errors.start(number)
            loss = self._learn(errors, batch, optimizer, self._done / total, 1 / total)
            self._done += 1
            if self._path is not None and (self._done % settings.save_every == 0 or self._done == total):
                self._save(state)
            if progress is not None:
                seconds = max(time.monotonic() - started, 1e-9)
                progress(
                    AdaptProgress(
                        stage=stage,
                        tokens=self._done * per_batch,
                        total=total * per_batch,
                        loss=loss,
                        tokens_per_second=(self._done - before) * per_batch / seconds,
                    )
                )
        set_memory(self._model, self._reading.applied(self._model.memory_config))
        if isinstance(errors, LogitErrors):
            errors.merge()

    def _learn(
        self,
        errors: HeadErrors | LogitErrors,
        batch: Tensor,
        optimizer: torch.optim.Optimizer,
        begin: float,
        share: float,
    ) -> float:
        """Read sequences `[B, T]`, with a step after each piece; returns the mean error.

        `begin` says how much of the stage has been read, and `share` how much of it the batch is.
        """
        pieces = batch.split(self._settings.piece_size, dim=1)
        total = 0.0
        for i, piece in enumerate(pieces):
            loss = errors.add(piece)
            total += loss * piece.shape[1] / batch.shape[1]
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * _schedule(begin + share * i / len(pieces))
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return total

    def _save(self, state: _State) -> None:
        assert self._path is not None
        metadata = {"format": FORMAT, "version": VERSION, "stage": str(self._stage), "done": str(self._done)}
        write_file(self._path, state.tensors(), metadata=metadata | self._about)

    def _load(self, path: Path) -> None:
        metadata, self._saved = read_file(
            path, what="the checkpoint of an adaptation", file_format=FORMAT, version=VERSION
        )
        for name, expected in self._about.items():
            if (found := metadata.get(name)) != expected:
                raise ValueError(
                    f"{path}: expected the checkpoint of a run with {name} {expected:.300}, found "
                    f"{found or 'none':.300}: go on with the same options, or delete it"
                )
        self._stage, self._done = int(metadata["stage"]), int(metadata["done"])
        own = {n.removeprefix("reading."): t for n, t in self._saved.items() if n.startswith("reading.")}
        self._reading.load_state_dict(own)


class _State:
    """Parameters and what their optimizer knows of them, as tensors by name.

    Args:
        parameters: by name, in the order of the optimizer. optimizer: an AdamW.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer

    def tensors(self) -> dict[str, Tensor]:
        """All of them, on the CPU."""
        found = {name: p.detach() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            found |= {f"adam.{key}.{name}": x for key, x in self._optimizer.state.get(p, {}).items()}
        return {name: x.detach().cpu().contiguous().clone() for name, x in found.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` has returned; nothing if it is empty."""
        if not tensors:
            return
        for name, p in self._parameters.items():
            p.copy_(tensors[name])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors]
            for key in keys:
                saved = tensors[f"adam.{key}.{name}"]
                # AdamW counts steps on the CPU.
                self._optimizer.state[p][key] = saved if key == "step" else saved.to(p.device)


def _schedule(done: float) -> float:
    """Factor of the learning rates after a share `done` of a stage: up for a twentieth, then down to 0."""
    return min((done + 1e-3) / 0.05, (1 - done) / 0.95)


def _check(model: Any, corpus: Corpus) -> None:
    """Raise ValueError for what can be told before anything is read."""
    if not isinstance(model, ConvertedMixin):
        raise ValueError(
            f"model: expected a converted one, found {type(model).__name__}; see ovq.convert.attach"
        )
    _check_tokens(model, corpus.end_of_text)


def _check_tokens(model: Any, largest: int) -> None:
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"corpus: expected token ids below {model.config.vocab_size}, as the model knows, found {largest}"
        )
