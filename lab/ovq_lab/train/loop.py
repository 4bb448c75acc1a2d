"""The training loop: transformers' `Trainer`, which provides checkpoints, resuming, bfloat16 and several
processes.

Run it as `ovq train recall-ovq --out runs/ovq`, or as `torchrun --nproc-per-node 2 -m ovq train ...`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME
from transformers.utils.logging import disable_progress_bar

from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.card import CARD_FILE, is_untouched
from ovq.hf.equal_sizes import equal_sizes
from ovq.layers.registry import fields_of_mixers
from ovq.ops.ablation import with_ablation
from ovq.runtime.files import claimed, open_to_others, read_json, writing
from ovq.runtime.progress import AnyReporter, AnyWork
from ovq_lab.train.carry import CarryTrainer
from ovq_lab.train.checkpoints import SealingTrainer, finished_checkpoints, newest_checkpoint
from ovq_lab.train.config import CONFIG_FILE, RunConfig, TrainArgs
from ovq_lab.train.data import CORPUS_FILE, training_data
from ovq_lab.train.initial import check_initial, load_initial
from ovq_lab.train.sharding import (
    gather_weights,
    is_first_process,
    prepare_sharding,
    sharding_arguments,
)
from ovq_lab.train.text import CarriedTextDataset
from ovq_lab.train.values import parse_value


def model_config(config: RunConfig) -> OVQConfig:
    """The transformers config of a run's model.

    Mixer sizes that the run does not set are those of `equal_sizes`, for a fair comparison.

    Example:
        >>> from ovq_lab.train.recipes import get_recipe
        >>> model_config(get_recipe("recall-ovq")).mixer_types
        ['sliding_attention', 'ovq']
    """
    fields = dataclasses.asdict(config.model)
    mixer_types = list(config.model.mixer_types)
    fields |= {"mixer_types": mixer_types, "num_hidden_layers": len(mixer_types)}
    fields |= {"vocab_size": config.task.vocab_size}
    # Recipes set the fields of all mixers.
    own = OVQConfig.field_defaults(mixer_types)
    given = {n: value for n, value in with_ablation(fields).items() if n in own and value is not None}
    declared = fields_of_mixers(mixer_types)
    for name, text in config.model.own_fields.items():
        given[name] = parse_value(text, declared[name].kind, f"model.{name}") if name in declared else text
    return OVQConfig(**equal_sizes(OVQConfig(**given)) | given)


def build_model(config: RunConfig, checkpoint: Path | None = None) -> OVQForCausalLM:
    """The model of a run with initial weights, which are determined by the run's seed.

    Sizes are those of the checkpoint if there is one: it may be older than the current `equal_sizes`.
    """
    set_seed(config.train.seed)
    if checkpoint is not None and (checkpoint / CONFIG_NAME).is_file():
        sizes = OVQConfig.from_pretrained(checkpoint)
    else:
        sizes = model_config(config)
    model = OVQForCausalLM(sizes)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    torch.nn.init.normal_(embedding.weight, std=config.model.embedding_std)
    return model


def train(config: RunConfig, out: Path, *, reporter: AnyReporter, label: str = "train") -> OVQForCausalLM:
    """Train a model, from scratch or from the weights of `train.init_from`; save it, its configuration and
    its checkpoints in a folder.

    Args:
        config: The run; saved as `run_config.json` before training starts.
        out: The folder of the run; created if necessary.

    Returns:
        The trained model, in evaluation mode; with `train.sharding`, this process's part of it.

    Raises:
        ValueError: If the model's settings are invalid or not those of `train.init_from`, the folder already
            holds a run or a model, or has another process at work in it, or the batch cannot be divided
            among the processes.
        OSError: If the folder cannot be written.
    """
    # Validates the settings before minutes are spent on reading a corpus.
    described = model_config(config)
    _trackers(config.train.report_to)
    if config.train.init_from is not None:
        for note in check_initial(config.train.init_from, described):
            if is_first_process():
                reporter.say(f"train.init_from: {note}")
    is_new = not out.exists()
    with _alone(out):
        # Only the first of several processes checks; the others could already find its file.
        if is_first_process():
            if (out / CONFIG_FILE).exists():
                raise ValueError(
                    f"--out: expected a folder without a run (or --resume), found {out / CONFIG_FILE}"
                )
            if (out / CONFIG_NAME).exists():
                # Its weights would be overwritten.
                raise ValueError(f"--out: expected a folder without a model, found {out / CONFIG_NAME}")
            if (found := next(out.glob("checkpoint-*"), None)) is not None:
                # Only the newest checkpoints stay, of whatever program they are.
                raise ValueError(f"--out: expected a folder without checkpoints, found {found}")
            # This also checks that the folder can be written, before any work is done.
            config.save(out)
        try:
            return _run(config, out, reporter=reporter, label=label)
        except ValueError:
            # A run that failed validation (a missing corpus, for example) can be retried in the same folder.
            if is_first_process() and not any(out.glob("checkpoint-*")):
                for name in (CONFIG_FILE, CORPUS_FILE):
                    (out / name).unlink(missing_ok=True)
                if is_new:
                    # Where others have put something into it meanwhile, it stays.
                    with contextlib.suppress(OSError):
                        out.rmdir()
            raise


def _alone(out: Path) -> contextlib.AbstractContextManager[None]:
    """Lock the folder of a run against other runs; the first process holds the lock for all."""
    return claimed(out, command="ovq train") if is_first_process() else contextlib.nullcontext()


def resume(out: Path, *, reporter: AnyReporter, label: str = "train") -> OVQForCausalLM:
    """Resume the run in a folder from its newest undamaged checkpoint, with the losses that an uninterrupted
    run would have; reports newer checkpoints that it skips.

    A run that was interrupted before its first checkpoint was complete starts again from its configuration,
    and says so. The model of one that has done all its steps is loaded.

    Returns:
        The trained model, in evaluation mode; with `train.sharding`, this process's part of it.

    Raises:
        ValueError: If the folder holds no run, a model without its card or checkpoints, or only damaged
            checkpoints, or another process is using it.
        OSError: If the folder cannot be written.
    """
    config = RunConfig.load(out)
    say = reporter.say if is_first_process() else lambda _: None
    with _alone(out):
        if _is_trained(out):
            return OVQForCausalLM.from_pretrained(out).eval()
        checkpoint = newest_checkpoint(out, say)
        if checkpoint is None:
            _check_can_start_again(out)
            say(f"{out}: stopped before its first checkpoint, the run starts again from its {CONFIG_FILE}")
        return _run(config, out, reporter=reporter, label=label, checkpoint=checkpoint, is_resumed=True)


def has_ended(out: Path) -> bool:
    """Whether the run in a folder has done all its steps and saved its model and, last, its card."""
    if not _is_trained(out):
        return False
    text = (out / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    # The card that is saved with the model knows nothing of the run.
    return "\n## Training\n" in text or not is_untouched(text)


def _is_trained(out: Path) -> bool:
    """Whether the run in a folder has done all its steps and saved its model."""
    config, state = RunConfig.load(out), out / TRAINER_STATE_NAME
    if not (state.is_file() and (out / CARD_FILE).is_file()):
        return False
    try:
        found = read_json(state)
    except ValueError:
        # It is written last, and was not on a disk that was full, or before the power went.
        return False
    step = found.get("global_step") if isinstance(found, dict) else None
    if not isinstance(step, int):
        raise ValueError(
            f"{state}: expected the state of a trainer, with its global_step, found another file"
        )
    # The configuration may have been extended to more steps since.
    return step >= config.train.steps


def _check_can_start_again(out: Path) -> None:
    """Raise ValueError if a run without an undamaged checkpoint has any results that a restart would lose."""
    if damaged := finished_checkpoints(out):
        names = ", ".join(folder.name for folder in damaged)
        raise ValueError(
            f"--resume: expected an undamaged checkpoint in {out}, found only damaged ones ({names}); "
            "without them the run starts again from its configuration"
        )
    # Written last, after the model.
    if (out / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"--resume: expected an unfinished run, found a trained model in {out}")


def _run(
    config: RunConfig,
    out: Path,
    *,
    reporter: AnyReporter,
    label: str,
    checkpoint: Path | None = None,
    is_resumed: bool = False,
) -> OVQForCausalLM:
    # Saving a small model takes too short a time for a progress bar.
    disable_progress_bar()
    data = training_data(config, out, checkpoint, reporter, is_resumed=is_resumed)
    model = build_model(config, checkpoint)
    if config.train.init_from is not None and checkpoint is None:
        load_initial(config.train.init_from, model, data.tokenizer)
    if data.tokenizer is not None:
        # Generation stops at the end of a text. The Trainer would set these too, with a warning.
        for name in ("eos_token_id", "pad_token_id"):
            for config_of in (model.config, model.generation_config):
                setattr(config_of, name, getattr(data.tokenizer, name))
    is_carrying = isinstance(data.examples, CarriedTextDataset)
    trainer = (CarryTrainer if is_carrying else SealingTrainer)(
        model=model,
        args=_training_arguments(config, out, is_carrying=is_carrying),
        train_dataset=data.examples,
        eval_dataset=data.held_out,
        data_collator=_as_it_is,
        processing_class=data.tokenizer,
    )
    # It prints dictionaries; the reporter shows the same numbers.
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        trainer.add_callback(_ReportCallback(config, reporter.start(label, total=config.train.steps)))
    if isinstance(trainer, CarryTrainer) and checkpoint is not None:
        trainer.load_carried(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    gather_weights(trainer)
    with writing(out):
        trainer.save_model()
        trainer.save_state()
        if is_first_process():
            open_to_others(out)
    return model.eval()


def _as_it_is(batch: Any) -> dict[str, Any]:
    """Identity collator, for data sets that build whole batches."""
    return batch


def _training_arguments(config: RunConfig, out: Path, *, is_carrying: bool) -> TrainingArguments:
    args = config.train
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if is_carrying and args.batch_size % num_processes == 0:
        # Each window is a micro-batch, so a step needs the memory of one window only.
        args = dataclasses.replace(args, micro_batches=args.batch_size // num_processes)
    num_parts = args.micro_batches * num_processes
    if args.batch_size % num_parts:
        raise ValueError(
            f"train.batch_size: expected a multiple of {num_parts} (train.micro_batches times the number of "
            f"processes), found {args.batch_size}"
        )
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size // num_parts,
        gradient_accumulation_steps=args.micro_batches,
        learning_rate=args.learning_rate,
        **_learning_rate_decay(args),
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        adam_beta2=args.adam_beta2,
        max_grad_norm=args.max_grad_norm,
        bf16=args.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        seed=args.seed,
        logging_steps=args.log_every,
        # With it, losses that are no numbers are replaced by earlier ones.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if args.eval_every else "no",
        eval_steps=args.eval_every or None,
        # One window at a time needs no more memory than a micro-batch.
        per_device_eval_batch_size=1,
        save_strategy="steps" if args.save_every else "no",
        save_steps=args.save_every or args.steps,
        # Goes into the config of the model, which is not for training alone.
        use_cache=True,
        # Keeps the order of the curriculum, and lets a resumed run skip by index.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        # There are no unused parameters; the search would walk the graph at every step.
        ddp_find_unused_parameters=False,
        report_to=_trackers(args.report_to),
        **sharding_arguments(args),
    )
    # One process drives one device: otherwise every visible GPU would get a batch of its own by DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    prepare_sharding(arguments)
    return arguments


def _learning_rate_decay(args: TrainArgs) -> dict[str, Any]:
    """The scheduler arguments of transformers for `learning_rate_decay`."""
    if args.learning_rate_decay == "linear":
        return {"lr_scheduler_type": "linear"}
    return {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": args.min_learning_rate_share},
    }


def _trackers(names: tuple[str, ...]) -> list[str]:
    """The integrations that losses are logged to, by their names in transformers."""
    if names == ("none",):
        return []
    available = get_available_reporting_integrations()
    if names == ("auto",):
        return [name for name in available if name == "tensorboard"]
    for name in names:
        if name not in available:
            raise ValueError(
                "train.report_to: expected auto, none or an installed tracker "
                f"({', '.join(available) or 'nothing is'}), found {name!r}"
            )
    return list(names)


class _ReportCallback(TrainerCallback):
    """Shows the steps, the losses and the current length."""

    def __init__(self, config: RunConfig, work: AnyWork) -> None:
        self._config = config
        self._work = work
        self._loss = self._held_out = ""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.3f}, "
        if logs and "eval_loss" in logs:
            self._held_out = f"held out {float(logs['eval_loss']):.3f}, "

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        length = self._config.train.length_at(state.global_step - 1)
        self._work.update(state.global_step, note=f"{self._loss}{self._held_out}length {length}")
