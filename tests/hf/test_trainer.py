"""The model in transformers' Trainer: what it hands to `forward`, and what it makes of the outputs."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from ovq.hf import OVQForCausalLM
from ovq_lab.train.checkpoints import SealingTrainer
from tests.hf.common import BASELINES, make_config, random_ids

TRAINING = Path(__file__).parent.parent.parent / "docs" / "use" / "training.md"

# The name changed in transformers 5.24.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(TrainingArguments, name)
)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {CHECKPOINTING: True, "bf16": True},
    ],
    ids=str,
)
def test_training_and_evaluation_in_the_trainer(tmp_path, options):
    torch.manual_seed(0)
    model = OVQForCausalLM(make_config(initializer_range=0.02))
    ids = random_ids(8, 12).repeat(4, 1)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=12,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:5])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    predictions = trainer.predict(rows[:5])
    assert predictions.metrics["test_loss"] < before - 0.5
    # Logits alone: a cache among the outputs would be gathered with them.
    assert predictions.predictions.shape == (5, 12, model.config.vocab_size)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch():
    model, ids = OVQForCausalLM(make_config()).double(), random_ids(4, 12)
    labels = ids.clone()
    labels[0, :9] = -100
    num_items = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels).loss
    parts = [
        model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=num_items).loss for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_label_smoothing_is_that_of_the_next_token(tmp_path):
    """The Trainer shifts labels only for models whose class it knows by name."""
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    model, ids = OVQForCausalLM(make_config()).eval(), random_ids(2, 9)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_what_the_documentation_advises_trains_as_the_laboratory_does(tmp_path):
    [program] = re.findall(r"```python\n([^`]*DataCollatorWithFlattening[^`]*)```", TRAINING.read_text())
    names = {}
    exec(program, names)
    model = OVQForCausalLM(make_config(**BASELINES))
    # As mamba-ssm and flash-linear-attention exempt parameters of any shape.
    model.model.layers[0].mixer.o_proj.weight._no_weight_decay = True
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        weight_decay=0.5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": random_ids(1, length)[0].tolist()} for length in (5, 9, 12, 7)]
    trainer = names["OVQTrainer"](
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=names["Packed"]()
    )
    decayed = trainer.get_decay_parameter_names(model)
    assert sorted(decayed) == sorted(SealingTrainer(model, arguments).get_decay_parameter_names(model))
    assert {"lm_head.weight", "model.layers.1.mixer.o_proj.weight"} <= set(decayed)
    assert "model.layers.0.mixer.o_proj.weight" not in decayed
    exempt = re.compile(r"norm|beta|A_log|skip|bias|temperature")
    assert not [name for name in decayed if exempt.search(name)]
    trainer.train()
    assert trainer.predict(rows).metrics["test_loss"] > 0
    assert not trainer.predict(rows).predictions


def test_an_auxiliary_loss_that_nobody_adds_is_said():
    model, ids = OVQForCausalLM(make_config(mixer_types=["vq", "vq"], num_hidden_layers=2)), random_ids(2, 9)
    with pytest.warns(UserWarning, match=r"labels: expected some in training, .* found none"):
        model.train()(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids)
        model.eval()(ids)
        OVQForCausalLM(make_config()).train()(ids)
