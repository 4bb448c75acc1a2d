"""trl's SFTTrainer on a few lines of text: padded, without padding, packed, and with an adapter of peft."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from tests.peers.models import SETS, make

pytestmark = pytest.mark.peers

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEXTS = [
    " ".join((WORDS * 2)[start : start + length]) for start, length in enumerate([9, 3, 14, 6, 2, 11, 8, 5])
]

#: What SFTConfig calls each way of putting texts into a batch.
LAYOUTS = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 32},
}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(params=SETS)
def model(request):
    return make(request.param).float()


def make_trainer(model, tokenizer, folder, *, peft_config=None, **options):
    set_seed(0)
    texts = Dataset.from_dict({"text": TEXTS})
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=len(TEXTS),
        learning_rate=1e-2,
        num_train_epochs=6,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )
    return SFTTrainer(
        model,
        arguments,
        train_dataset=texts,
        eval_dataset=texts,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def loss_of_each_alone(model, tokenizer):
    """The mean loss of a token, each text read by itself."""
    total = count = 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_in_a_batch_do_not_see_each_other(model, tokenizer, tmp_path, layout):
    expected = loss_of_each_alone(model.eval(), tokenizer)
    trainer = make_trainer(model, tokenizer, tmp_path, **LAYOUTS[layout])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training(model, tokenizer, tmp_path, layout):
    trainer = make_trainer(model, tokenizer, tmp_path, **LAYOUTS[layout])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


def test_training_an_adapter(model, tokenizer, tmp_path):
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(model, tokenizer, tmp_path, peft_config=adapter)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
