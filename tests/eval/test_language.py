"""The loss of long documents: read in pieces as in one, by position, by place in a chunk, by byte."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.progress import Seen
from tests.tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ovq_lab.eval.dictionaries import Dictionary, each_dictionary
from ovq_lab.eval.language import LanguageRow, evaluate_language, take_windows
from ovq_lab.eval.reading import token_bytes, token_losses
from ovq_lab.plots.language import language_table, octave_losses, position_table, save_language_figures
from ovq_lab.text import Document, byte_tokenizer, train_tokenizer


def make_model(*mixers, **changes):
    fields = {"vocab_size": 30, "mixer_types": list(mixers), "num_slots": 5, "chunk_size": 8}
    return tiny_model(**fields | {"sliding_window": 6, "initializer_range": 0.3} | changes).double()


def random_ids(length, seed=0, vocab_size=30):
    return np.random.default_rng(seed).integers(vocab_size, size=length)


def measure(model, documents, **options):
    return evaluate_language(model, documents, reporter=Seen(), **options)


@pytest.fixture(scope="module")
def ovq():
    return make_model("sliding_attention", "ovq")


@pytest.mark.parametrize(
    "mixers",
    [
        ("sliding_attention", "ovq"),
        ("sliding_attention", "full_attention"),
        ("vq", "linear_attention"),
        ("gated_deltanet", "mamba2", "sink_attention"),
    ],
    ids="+".join,
)
def test_a_document_in_pieces_costs_what_it_costs_at_once(mixers):
    model, ids = make_model(*mixers), random_ids(90)
    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        logits = model(tokens[None, :-1]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").numpy()
    for piece_size in (7, 16, 1000, 2**64):
        found = token_losses(model, ids, piece_size=piece_size)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_logits_are_formed_for_a_few_tokens_at_a_time(ovq, monkeypatch):
    ids = random_ids(60)
    expected = token_losses(ovq, ids)
    most = []
    output = ovq.lm_head.forward
    monkeypatch.setattr(ovq.lm_head, "forward", lambda x: most.append(len(x)) or output(x))
    monkeypatch.setattr("ovq_lab.eval.reading._MOST_LOGITS", 10 * 30)
    np.testing.assert_allclose(token_losses(ovq, ids), expected, rtol=1e-6)
    assert max(most) == 10


def test_a_row_says_what_the_losses_of_its_windows_are(ovq):
    documents = [random_ids(130, seed=1), random_ids(70, seed=2)]
    seen = Seen()
    [row] = evaluate_language(ovq, documents, lengths=[64], num_windows=3, block_size=20, reporter=seen)
    assert (seen.total, seen.done) == (192, [64, 128, 192])
    windows = [documents[0][:64], documents[1][:64], documents[0][64:128]]
    losses = np.stack([token_losses(ovq, window) for window in windows]).astype(np.float64)
    assert row.num_windows == 3
    assert row.loss == pytest.approx(losses.mean())
    blocks = [losses[:, first : first + 20].mean(1) for first in (0, 20, 40, 60)]
    np.testing.assert_allclose(row.window_losses, np.stack(blocks, 1))
    np.testing.assert_allclose(row.block_losses, np.stack(blocks).mean(1))
    # Chunks of 8; the first block of 20 is left out, and the last chunk is not whole.
    chunks = losses[:, 24:56].reshape(-1, 8)
    np.testing.assert_allclose(row.phase_losses, chunks.mean(0))
    rises = chunks[:, 4:].mean(1) - chunks[:, :4].mean(1)
    assert row.sawtooth == pytest.approx(rises.mean())
    assert row.sawtooth_error == pytest.approx(rises.std(ddof=1) / math.sqrt(len(rises)))
    assert row.state_bytes == ovq.state_bytes(64)
    assert row.tokens_per_second > 0
    assert row.bits_per_byte is None


@pytest.mark.parametrize(("chunk_size", "block_size", "fall"), [(8, 20, -4), (8, 2**64, -4), (9, 20, -5)])
def test_a_sawtooth_is_seen(chunk_size, block_size, fall, monkeypatch):
    # In each chunk the loss falls by 1 a token; the middle one of an odd number is in neither half.
    monkeypatch.setattr(
        "ovq_lab.eval.language.token_losses",
        lambda _m, ids, **_o: 10.0 - np.arange(len(ids) - 1) % chunk_size,
    )
    model = make_model("ovq", chunk_size=chunk_size)
    [row] = measure(model, [random_ids(200)], lengths=[200], block_size=block_size)
    assert row.phase_losses == tuple(10.0 - i for i in range(chunk_size))
    assert (row.sawtooth, row.sawtooth_error) == (fall, 0)


def test_windows_without_whole_chunks_show_no_sawtooth():
    [row] = measure(make_model("ovq", chunk_size=64), [random_ids(60)], lengths=[60])
    assert (row.phase_losses, row.sawtooth, row.sawtooth_error) == ((), None, None)
    [row] = measure(make_model("ovq", chunk_size=1), [random_ids(60)], lengths=[60])
    assert row.sawtooth is None
    # One chunk has no error.
    [row] = measure(make_model("ovq"), [random_ids(25)], lengths=[25])
    assert (row.sawtooth is None, row.sawtooth_error) == (False, None)


def test_dictionaries_of_several_sizes_on_the_same_weights(ovq):
    rows = measure(ovq, [random_ids(80)], lengths=[40, 80], num_slots=[1, 40])
    assert [(row.num_slots, row.length) for row in rows] == [(1, 40), (1, 80), (40, 40), (40, 80)]
    assert rows[1].loss != rows[3].loss
    assert rows[1].state_bytes < rows[3].state_bytes
    assert ovq.config.num_slots == 5
    [alone] = measure(ovq, [random_ids(80)], lengths=[80])
    assert alone.num_slots == 5
    [full] = measure(make_model("full_attention"), [random_ids(80)], lengths=[80], num_slots=[1, 40])
    assert full.num_slots is None


def test_dictionaries_kept_by_several_rules_on_the_same_weights(ovq):
    rules = ["existing", "nearest"]
    rows = measure(ovq, [random_ids(80)], lengths=[80], merges=rules)
    assert [(row.merge, row.label) for row in rows] == [
        ("existing", "OVQ, 5 slots"),
        ("nearest", "OVQ, nearest, 5 slots"),
    ]
    assert rows[0].loss != rows[1].loss
    other = make_model("sliding_attention", "ovq", merge="nearest")
    assert measure(other, [random_ids(80)], lengths=[80])[0].loss == rows[1].loss
    [full] = measure(make_model("full_attention"), [random_ids(80)], lengths=[80], merges=rules)
    assert full.merge is None


def test_the_dictionary_is_put_back_after_an_error(ovq):
    def measured():
        for _ in each_dictionary(ovq, [Dictionary(64, "nearest")]):
            assert (ovq.config.num_slots, ovq.config.merge) == (64, "nearest")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        measured()
    # The generator ends with the frame of the loop.
    assert (ovq.config.num_slots, ovq.config.merge) == (5, "existing")


def test_bits_per_byte_do_not_depend_on_the_tokens():
    text = "Ein Käfer krabbelt über die Straße. " * 6
    byte = byte_tokenizer()
    pairs = train_tokenizer([Document(name="a", text=text)], 300)
    for tokenizer in (byte, pairs):
        ids = np.array(tokenizer(text)["input_ids"])
        lengths = token_bytes(tokenizer)
        assert lengths[ids].sum() == len(text.encode())
        assert lengths[tokenizer.eos_token_id] == 0
        model = make_model("ovq", vocab_size=len(tokenizer))
        [row] = measure(model, [ids], lengths=[len(ids)], bytes_of_tokens=lengths)
        num_bytes = lengths[ids[1:]].sum()
        assert row.bits_per_byte == pytest.approx(row.loss * (len(ids) - 1) / math.log(2) / num_bytes)


def test_bytes_of_tokens_that_are_words():
    words = Tokenizer(models.WordLevel({"▁one": 0, "▁zwölf": 1, "a": 2}, unk_token="a"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    assert token_bytes(tokenizer).tolist() == [4, 7, 1, 0]


def test_bytes_of_tokens_that_are_bytes_of_unknown_characters():
    """As in the tokenizers of Llama 2 and Mistral; by itself such a byte is decoded as a mark of three."""
    letters = {letter: 256 + i for i, letter in enumerate("▁ab")}
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | letters
    pairs = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    pairs.normalizer = normalizers.Replace(" ", "▁")
    pairs.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>")
    text = "a b 漢字 é\n😀"
    assert token_bytes(tokenizer)[tokenizer(text)["input_ids"]].sum() == len(text.encode())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "expected lengths"),
        ({"lengths": [101]}, "length: expected at most 100, the tokens of the longest document, found 101"),
        ({"lengths": [1]}, "expected at least 1 window of at least 2 tokens, found"),
        (
            {"lengths": [10], "num_windows": 0},
            "expected at least 1 window of at least 2 tokens, found 0 of 10",
        ),
        ({"lengths": [10], "block_size": 0}, "at least 1, found"),
        ({"lengths": [10], "piece_size": 0}, "at least 1, found"),
    ],
)
def test_what_cannot_be_measured_is_refused(ovq, options, message):
    with pytest.raises(ValueError, match=message):
        measure(ovq, [random_ids(97), random_ids(100)], **options)


def test_the_loss_of_a_model_that_has_diverged_is_no_number():
    model = make_model("ovq")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    [row] = measure(model, [random_ids(40)], lengths=[20])
    assert math.isnan(row.loss)


def test_tokens_the_model_does_not_know_are_refused(ovq):
    for ids in (np.arange(3, 31), np.array([-1, 2]), np.array([4])):
        with pytest.raises(ValueError, match="expected at least 2 token ids below 30, as the model knows, f"):
            token_losses(ovq, ids)


def test_windows_do_not_overlap_and_begin_with_beginnings():
    documents = [np.arange(10), np.arange(100, 104), np.arange(200, 209)]
    windows = take_windows(documents, 4, 6)
    assert [window[0] for window in windows] == [0, 100, 200, 4, 204]
    assert [window[0] for window in take_windows(documents, 4, 2)] == [0, 100]
    started = take_windows(documents, 4, 9, first_token=7)
    assert [window.tolist() for window in started] == [
        *([7, *range(first, first + 3)] for first in (0, 100, 200)),
        *(list(range(first, first + 4)) for first in (3, 203)),
    ]
    assert len(take_windows([np.arange(7)], 4, 9, first_token=7)) == 2


def test_what_stands_before_a_document_is_read_before_it(ovq):
    document = random_ids(90)
    rows = measure(ovq, [document], lengths=[70], first_token=5, bytes_of_tokens=np.ones(30, dtype=int))
    losses = token_losses(ovq, np.array([5, *document[:69]]))
    assert rows[0].loss == pytest.approx(losses.mean(dtype=np.float64))
    assert rows[0].bits_per_byte == pytest.approx(rows[0].loss / math.log(2))


def row(mixer="ovq", num_slots=64, length=4096, **changes):
    fields = {
        "num_windows": 2,
        "loss": 2.5,
        "bits_per_byte": 3.6067,
        "tokens_per_second": 12345.0,
        "state_bytes": 2048,
        "block_size": 1024,
        "window_losses": ((4.0, 3.0, 2.0, 1.0), (4.0, 3.0, 3.0, 2.0)),
        "chunk_size": 4,
        "phase_losses": (2.5, 2.0, 2.0, 1.5),
        "sawtooth": -0.5,
        "sawtooth_error": 0.125,
    }
    return LanguageRow(**{"mixer": mixer, "num_slots": num_slots, "length": length, **fields, **changes})


def cells_of(table):
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    return [cells for line in lines if (cells := [part.strip() for part in line.split("│")[1:-1]])]


def test_tables_show_the_numbers_they_are_given():
    rows = [row(length=1024), row(), row("mamba2", None, sawtooth_error=None, bits_per_byte=None)]
    assert cells_of(language_table(rows, title="t")) == [
        ["OVQ, 64 slots", "1024", "2", "2.5000", "3.6067", "12,345", "2.0 KiB"],
        ["OVQ, 64 slots", "4096", "2", "2.5000", "3.6067", "12,345", "2.0 KiB"],
        ["Mamba2", "4096", "2", "2.5000", "", "12,345", "2.0 KiB"],
    ]
    # The last block is one position short.
    last = f"{(1024 * 2.5 + 1023 * 1.5) / 2047:.4f}"
    table = position_table(rows, title="t")
    assert [column.header for column in table.columns] == [
        "model",
        "0-1k",
        "1k-2k",
        "2k-4k",
        "2nd - 1st half of chunk",
    ]
    assert cells_of(table) == [
        ["OVQ, 64 slots", "4.0000", "3.0000", last, "-0.5000 ± 0.1250"],
        ["Mamba2", "4.0000", "3.0000", last, "-0.5000"],
    ]


def test_octaves_of_any_number_of_blocks():
    short = row(length=2500, window_losses=((4.0, 3.0, 2.0),))
    assert octave_losses(short) == [(0, 1024, 4.0), (1024, 2048, 3.0), (2048, 2500, 2.0)]


def test_figures_show_every_model_at_the_longest_length(tmp_path, drawn):
    rows = [row(length=1024), row(), row(name="big"), row("mamba2", None, phase_losses=())]
    paths = save_language_figures(rows, tmp_path)
    assert [path.name for path in paths] == ["loss.png", "chunk.png"]
    shown = [{line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines} for figure in drawn]
    labels = ["OVQ, 64 slots", "big, 64 slots", "Mamba2"]
    assert shown[0] == {label: [4.0, 3.0, 2.5, 1.5] for label in labels}
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == [512, 1536, 2560, 3584]
    assert [shown[1][label] for label in labels[:2]] == [[0.5, 0.0, 0.0, -0.5]] * 2
    assert "Mamba2" not in shown[1]


def test_figures_are_pictures(tmp_path):
    [path] = save_language_figures([row(phase_losses=())], tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rows_are_json():
    assert json.loads(json.dumps(dataclasses.asdict(row())))["window_losses"][0] == [4.0, 3.0, 2.0, 1.0]
