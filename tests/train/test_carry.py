"""A state carried from window to window is that of the whole document; its gradient ends with the window."""

import logging

import pytest
import torch
from tests.disks import full_disk
from tests.tiny import losses
from tests.train.text_common import quiet, stopped_at, tiny_config, write_texts
from transformers import AutoTokenizer

from ovq.hf import OVQCache, OVQForCausalLM
from ovq_lab.mixers import MIXERS
from ovq_lab.text import TextSource, load_corpus
from ovq_lab.train import loop
from ovq_lab.train.carry import CarryTrainer, load_lanes, save_lanes
from ovq_lab.train.text import CarriedTextDataset, PackedTextDataset, read_positions

CARRY = {"carry_state": True}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return write_texts(tmp_path, monkeypatch)


def trainer_of(config, folder, tmp_path, model):
    corpus = load_corpus(TextSource(dataset=str(folder), held_out=0), "train")
    return CarryTrainer(
        model=model,
        args=loop._training_arguments(config, tmp_path / "out", is_carrying=True),
        train_dataset=CarriedTextDataset(config, corpus),
        data_collator=loop._as_it_is,
    )


def longest_document(corpus, config):
    """The windows of the longest document, and the whole of it."""
    document = int(corpus.num_tokens.argmax())
    end = int(corpus.num_tokens[document]) + 1
    whole = read_positions(corpus, document, 0, end)
    (length,) = config.train.lengths
    windows = [(start, min(start + length, end)) for start in range(0, end, length)]
    return whole, windows


def as_window(whole, start, stop):
    inputs, targets = (torch.from_numpy(part[start:stop])[None] for part in whole)
    place = {"lane": 0, "num_read": start, "is_last": stop == len(whole[0])}
    return {"input_ids": inputs, "labels": targets, "shift_labels": targets} | place


def tensors(window):
    """What a model takes of a window."""
    return {name: value for name, value in window.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_the_windows_of_a_document_have_the_loss_of_the_whole(folder, tmp_path, mixer):
    config = tiny_config(folder, mixer, CARRY)
    # In training VQ-attention moves its slots and Raven's router has noise; others do the same in both modes.
    model = loop.build_model(config).train(mixer not in ("vq", "raven"))
    trainer = trainer_of(config, folder, tmp_path, model)
    corpus = load_corpus(TextSource(dataset=str(folder), held_out=0), "train")
    whole, windows = longest_document(corpus, config)
    assert len(windows) > 3
    at_once = model(**tensors(as_window(whole, 0, len(whole[0])))).loss
    carried = sum(
        trainer.compute_loss(model, as_window(whole, *window), num_items_in_batch=len(whole[0]))
        for window in windows
    )
    torch.testing.assert_close(carried, at_once)
    # Each window by itself is another matter: the state is what makes the difference.
    alone = sum(
        model(**tensors(as_window(whole, *window)), num_items_in_batch=len(whole[0])).loss
        for window in windows
    )
    assert (alone - at_once).abs() > 1e-3
    assert not trainer._carried


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_no_gradient_flows_into_the_window_before(folder, tmp_path, mixer):
    config = tiny_config(folder, mixer, CARRY)
    model = loop.build_model(config).train()
    trainer = trainer_of(config, folder, tmp_path, model)
    first = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 1, 2, 3, 4, 5]])}
    second = {"input_ids": torch.tensor([[6, 7, 8, 9, 6, 7, 8, 9]])}
    for window in (first, second):
        window |= {"labels": window["input_ids"], "shift_labels": window["input_ids"], "lane": 3}
    embedding = model.get_input_embeddings().weight

    trainer.compute_loss(model, first | {"num_read": 0, "is_last": False})
    (cache,) = trainer._carried.values()
    held = [t for layer in cache.layers for t in layer.__dict__.values() if isinstance(t, torch.Tensor)]
    assert held
    assert not any(t.requires_grad for t in held)
    trainer.compute_loss(model, second | {"num_read": 10, "is_last": True}).backward()
    assert not embedding.grad[1:6].any()
    assert embedding.grad[6:10].any(dim=1).all()

    # In one piece there is such a gradient.
    embedding.grad = None
    both = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    targets = both.clone()
    targets[:, :10] = -100
    model(both, shift_labels=targets).loss.backward()
    assert embedding.grad[1:6].any()


def test_a_lane_that_has_lost_its_state_is_refused(folder, tmp_path):
    config = tiny_config(folder, task=CARRY)
    model = loop.build_model(config)
    trainer = trainer_of(config, folder, tmp_path, model)
    window = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 2]])}
    window |= {"lane": 1, "is_last": False}
    with pytest.raises(ValueError, match="lane 1: expected the state of 16 tokens, found none"):
        trainer.compute_loss(model, window | {"num_read": 16})
    trainer.compute_loss(model, window | {"num_read": 0})
    with pytest.raises(ValueError, match="lane 1: expected the state of 16 tokens, found that of 2"):
        trainer.compute_loss(model, window | {"num_read": 16})


def test_lanes_on_a_full_disk_are_an_error_of_the_system(tmp_path):
    config = loop.model_config(tiny_config("anywhere"))
    cache = OVQCache(config)
    OVQForCausalLM(config)(torch.arange(9)[None], past_key_values=cache)
    with full_disk(1000), pytest.raises(OSError, match=r"lanes: cannot be written \("):
        save_lanes(tmp_path / "lanes", {3: cache})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_lanes_are_saved_as_they_are(tmp_path, mixer):
    config = loop.model_config(tiny_config("anywhere", mixer))
    model = OVQForCausalLM(config).eval()
    lanes = {}
    for lane, length in ((0, 3), (11, 21)):
        lanes[lane] = OVQCache(config)
        model(torch.arange(length)[None], past_key_values=lanes[lane])
    save_lanes(tmp_path / "lanes", lanes)
    loaded = load_lanes(tmp_path / "lanes", config, "cpu")
    assert set(loaded) == set(lanes)
    for lane, cache in lanes.items():
        more = torch.arange(9)[None]
        assert loaded[lane].get_seq_length() == cache.get_seq_length()
        one, other = (model(more, past_key_values=each).logits for each in (cache, loaded[lane]))
        assert torch.equal(one, other)


@pytest.mark.parametrize(("mixer", "is_carrying"), [("ovq", True), ("full_attention", True), ("ovq", False)])
def test_a_resumed_run_is_bit_identical(folder, tmp_path, mixer, is_carrying):
    config = tiny_config(folder, mixer, {"carry_state": is_carrying}, save_every=2)
    resumed_out = tmp_path / "resumed"
    with quiet() as reporter:
        whole = loop.train(config, tmp_path / "whole", reporter=reporter)
        # Lanes are then within documents.
        stopped_at(config, 4, tmp_path / "whole", resumed_out)
        resumed = loop.resume(resumed_out, reporter=reporter)
    assert (resumed_out / "checkpoint-4" / "carried-0.safetensors").is_file() == is_carrying
    assert losses(resumed_out) == losses(tmp_path / "whole")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_run_goes_on_with_the_corpus_it_began_with_or_not_at_all(folder, tmp_path):
    config = tiny_config(folder, save_every=2)
    with quiet() as reporter:
        loop.train(config, tmp_path / "whole", reporter=reporter)
        stopped = stopped_at(config, 4, tmp_path / "whole", tmp_path / "stopped")
        (folder / "a.txt").write_text("another text")
        with pytest.raises(ValueError, match=r"corpus.json: expected the corpus of this run"):
            loop.resume(stopped, reporter=reporter)
        (stopped / "corpus.json").unlink()
        with pytest.raises(
            ValueError, match=r"corpus.json: expected the digest of the run.s corpus, found none"
        ):
            loop.resume(stopped, reporter=reporter)


@pytest.mark.parametrize("has_read", [False, True])
def test_a_run_stopped_before_its_first_checkpoint_reads_the_same_corpus_again(folder, tmp_path, has_read):
    config = tiny_config(folder, task={"tokenizer": "bpe:262"})
    stopped = tmp_path / "stopped"
    with quiet() as reporter:
        whole = loop.train(config, tmp_path / "whole", reporter=reporter)
        config.save(stopped)
        if has_read:
            (stopped / "corpus.json").write_text((tmp_path / "whole" / "corpus.json").read_text())
        again = loop.resume(stopped, reporter=reporter)
        assert losses(stopped) == losses(tmp_path / "whole")
        torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
        (stopped / "trainer_state.json").unlink()
        (folder / "a.txt").write_text("another text")
        with pytest.raises(ValueError, match=r"corpus.json: expected the corpus of this run"):
            loop.resume(stopped, reporter=reporter)


@pytest.mark.parametrize("is_carrying", [False, True])
def test_training_learns_and_leaves_a_model_that_reads_text(
    folder, tmp_path, is_carrying, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = tiny_config(
        folder, task={"carry_state": is_carrying, "tokenizer": "bpe:262"}, steps=40, learning_rate=2e-2
    )
    with quiet() as reporter:
        loop.train(config, tmp_path / "run", reporter=reporter)
    assert caplog.text == ""
    measured = losses(tmp_path / "run")
    assert measured[0] > 4
    assert measured[-1] < 1.5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = OVQForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == 262
    assert model.config.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    prompt = tokenizer("k 12345 12345", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0]) == "k 12345 12345 12345 12345"


def test_micro_batches_of_packed_windows_change_nothing(folder, tmp_path):
    with quiet() as reporter:
        for parts in (1, 4):
            loop.train(tiny_config(folder, micro_batches=parts), tmp_path / str(parts), reporter=reporter)
    torch.testing.assert_close(losses(tmp_path / "1"), losses(tmp_path / "4"), rtol=1e-4, atol=1e-4)


def test_the_logged_loss_is_the_mean_over_targets(folder, tmp_path):
    config = tiny_config(folder, steps=1)
    corpus = load_corpus(TextSource(dataset=str(folder), held_out=0), "train")
    batch = PackedTextDataset(config, corpus).__getitems__(range(4))
    model = loop.build_model(config)
    with torch.no_grad():
        logits = model(batch["input_ids"], cu_seqlens=batch["cu_seqlens"]).logits
    expected = torch.nn.functional.cross_entropy(logits[0], batch["shift_labels"][0])
    with quiet() as reporter:
        loop.train(config, tmp_path / "run", reporter=reporter)
    torch.testing.assert_close(losses(tmp_path / "run")[0], expected.item(), rtol=1e-4, atol=1e-4)
