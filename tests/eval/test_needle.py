"""Needles are where and what they are said to be, and a model is scored as it would be by hand."""

import dataclasses
import io
import itertools
import json
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.progress import Seen
from tests.tiny import tiny_model

from ovq_lab.eval.needle import NeedleRow, ask, evaluate_needle
from ovq_lab.plots.draw import AXIS_NAMES
from ovq_lab.plots.needle import SCORES, needle_table, save_needle_figures
from ovq_lab.text import Document, TextSource, byte_tokenizer, split_of, train_tokenizer
from ovq_lab.text.haystack import Needle, NeedleBuilder, essay_texts, sentences

BYTES = byte_tokenizer()
NUMBERED = " ".join(f"This is sentence {i} of the essay." for i in range(200))
FORMS = {
    "word": r"[a-z]+-[a-z]+",
    "number": r"\d{7}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


def build(*, length=2000, depth=0.5, seed=0, index=0, tokenizer=BYTES, **options):
    return NeedleBuilder(tokenizer, texts=[NUMBERED], **options).build(
        length, depth=depth, seed=seed, index=index
    )


def text_of(needle, tokenizer=BYTES):
    return tokenizer.decode(needle.prompt)


def pairs():
    noise = text_of(build(length=1500)) + text_of(build(haystack="essay", value="uuid"))
    return train_tokenizer([Document(name="a", text=noise)], 400)


@pytest.mark.parametrize("haystack", ["noise", "essay"])
@pytest.mark.parametrize("value", FORMS)
def test_the_needle_is_in_the_text_and_the_question_begins_like_it(haystack, value):
    needle = build(haystack=haystack, value=value)
    text = text_of(needle)
    assert re.fullmatch(FORMS[value], needle.value)
    assert BYTES.decode(needle.answer) == f" {needle.value}"
    assert text.count(needle.value) == 1
    [key] = re.findall(rf"One of the special magic {value}s for (\S+) is: {needle.value}\.", text)
    assert text.endswith(f"for {key} in the text above? One of the special magic {value}s for {key} is:")
    assert key != needle.value
    assert len(needle.distractors) == 7
    others = [BYTES.decode(ids).strip() for ids in needle.distractors]
    assert len({*others, needle.value}) == 8
    assert all(re.fullmatch(FORMS[value], other) and other not in text for other in others)
    assert all(len(ids) == len(needle.answer) for ids in needle.distractors)


@pytest.mark.parametrize("haystack", ["noise", "essay"])
@pytest.mark.parametrize("tokenizer", [BYTES, pairs()], ids=["bytes", "pairs"])
def test_texts_are_as_long_as_fits(haystack, tokenizer):
    longest = max(
        len(tokenizer(f" {s}")["input_ids"]) for s in [*sentences(NUMBERED), "There and back again."]
    )
    for length in (400, 1000, 3777):
        needle = build(length=length, haystack=haystack, tokenizer=tokenizer)
        size = len(needle.prompt) + len(needle.answer)
        assert length - longest < size <= length
        # The parts are cut where a tokenizer of words would cut them.
        again = tokenizer(text_of(needle, tokenizer))["input_ids"]
        assert again == needle.prompt.tolist()


def test_depths():
    def share(depth):
        needle = build(length=5000, depth=depth)
        text = text_of(needle)
        start, end = text.index("The grass"), text.rindex("\nWhat is")
        place, size = text.index(" One of"), len(" One of the special magic numbers for ") + 20
        return (place - start) / (end - start - size)

    for depth in (0.25, 0.5, 0.75):
        assert share(depth) == pytest.approx(depth, abs=0.02)
    assert "Keep it in mind.\n One of the special" in text_of(build(depth=0))
    needle = build(depth=1)
    assert f"{needle.value}.\nWhat is" in text_of(needle)


def test_questions_depend_on_seed_and_number_alone():
    first = build(haystack="essay")
    same = build(haystack="essay")
    assert np.array_equal(first.prompt, same.prompt)
    assert [ids.tolist() for ids in first.distractors] == [ids.tolist() for ids in same.distractors]
    for change in ({"depth": 0.1}, {"length": 3000}):
        assert build(haystack="essay", **change).value == first.value
    for change in ({"seed": 1}, {"index": 1}):
        other = build(haystack="essay", **change)
        assert other.value != first.value
        numbers = [int(re.search(r"sentence (\d+)", text_of(needle))[1]) for needle in (first, other)]
        assert numbers[0] != numbers[1]


def test_essays_are_text_in_its_order_and_begin_again_where_it_ends():
    numbers = list(map(int, re.findall(r"sentence (\d+)", text_of(build(haystack="essay", length=9000)))))
    assert len(numbers) > 200
    assert all((a + 1) % 200 == b for a, b in itertools.pairwise(numbers))


def test_noise_is_the_same_five_sentences():
    text = text_of(build(depth=0))
    hay = text[text.index("The grass") : text.index("\nWhat")]
    expected = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    assert (expected * 30).startswith(hay)


def test_long_sentences_are_cut_between_words():
    parts = sentences("word " * 200 + "end. Next one!\n\nA heading\n\nThe last")
    assert parts[-3:] == ["Next one!", "A heading", "The last"]
    assert all(len(part) <= 300 for part in parts)
    assert " ".join(parts[:-3]) == "word " * 200 + "end."


def test_an_essay_begins_with_a_sentence_that_there_is_room_for():
    texts = [f"{'So long is this. ' * 3}{'This is far too long ' * 13}.", "Short."]
    for index in range(20):
        builder = NeedleBuilder(BYTES, haystack="essay", value="uuid", texts=texts)
        needle = builder.build(500, depth=0.5, seed=0, index=index)
        assert len(needle.prompt) + len(needle.answer) <= 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"haystack": "hay"}, "haystack: expected one of noise, essay, found 'hay'"),
        ({"value": "name"}, "value: expected one of word, number, uuid, found 'name'"),
        ({"num_distractors": 0}, "num_distractors: expected at least 1"),
        (
            {"num_distractors": 2000, "value": "word"},
            r"num_distractors: expected at most 10\d\d, as no more words",
        ),
        ({"depth": 1.5}, "depth: expected a number from 0 to 1, found 1.5"),
        ({"length": 250}, "length: expected room for a sentence beside the .* question, found 250"),
    ],
)
def test_what_cannot_be_built(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_essays_need_a_text():
    with pytest.raises(ValueError, match="texts: expected at least one sentence"):
        NeedleBuilder(BYTES, haystack="essay", texts=["", "\n"])


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_slots=8, chunk_size=16, sliding_window=8, initializer_range=0.5).double()


def by_hand(model, needle):
    """The scores from forward passes over the whole text, without a cache."""
    prompt = torch.from_numpy(needle.prompt)

    def logits(ids):
        with torch.no_grad():
            return model(ids[None], use_cache=False).logits[0].float()

    text = prompt
    for _ in range(len(needle.answer) + 3):
        text = torch.cat([text, logits(text)[-1:].argmax(-1)])
    said = BYTES.decode(text[len(prompt) :].tolist())
    sums, right = [], None
    for answer in (needle.answer, *needle.distractors):
        ids = torch.from_numpy(answer)
        scores = logits(torch.cat([prompt, ids]))[len(prompt) - 1 : -1].log_softmax(-1)
        sums.append(float(scores.gather(1, ids[:, None]).sum()))
        right = (scores.argmax(-1) == ids).float().mean() if right is None else right
    return needle.value in said, float(right), sums[0] > max(sums[1:])


def test_scores_are_those_of_forward_passes_over_the_whole_text(model, monkeypatch):
    monkeypatch.setattr("ovq_lab.eval.needle._EXTRA_TOKENS", 3)
    found = set()
    for index in range(4):
        needle = build(length=330, index=index, num_distractors=1)
        # What a random model says by itself, in the place of some of the values.
        prompt = torch.from_numpy(needle.prompt)[None]
        said = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
        )
        said = said[0, prompt.shape[1] :].numpy()
        if index in (1, 2):
            needle = dataclasses.replace(needle, answer=said, value=BYTES.decode(said))
        if index == 3:
            # One that is likelier than the value, and one that is not.
            needle = dataclasses.replace(needle, distractors=(said[:2], np.tile(needle.distractors[0], 3)))
        score = ask(model, BYTES, needle, piece_size=50)
        assert tuple(score) == pytest.approx(by_hand(model, needle))
        found.add(score)
    assert {score.is_generated for score in found} == {True, False}
    assert {score.is_chosen for score in found} == {True, False}
    assert max(score.token_accuracy for score in found) == 1


def test_a_repetition_penalty_of_the_model_is_left_out(model, monkeypatch):
    """It would apply to the tokens of the prompt, and the value is one of them."""
    monkeypatch.setattr("ovq_lab.eval.needle._EXTRA_TOKENS", 3)
    needle = build(length=330, num_distractors=1)
    prompt = torch.from_numpy(needle.prompt)[None]
    said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    said = said[0, prompt.shape[1] :].numpy()
    needle = dataclasses.replace(needle, answer=said, value=BYTES.decode(said))
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)
    assert ask(model, BYTES, needle).is_generated


@pytest.mark.parametrize(
    ("said", "is_found"),
    [
        (" {}.", True),
        ("\n{}", True),
        (" as I said, {}!", True),
        (" {:.6}\n", False),
        (" {:.3} {}", True),
        ("\n\n", False),
    ],
)
def test_a_value_is_found_wherever_it_is_said(model, monkeypatch, said, is_found):
    # As RULER scores it: what stands in the place of the space before it does not matter.
    needle = build(length=330, num_distractors=1)
    ids = BYTES.encode(said.format(needle.value, needle.value), add_special_tokens=False)
    text = torch.cat([torch.from_numpy(needle.prompt), torch.tensor(ids)])
    monkeypatch.setattr(model, "generate", lambda **options: text[None])
    assert ask(model, BYTES, needle).is_generated == is_found


def measure(model, builder, **options):
    return evaluate_needle(model, builder, reporter=Seen(), **options)


def test_rows_hold_the_means_of_the_scores(model, monkeypatch):
    monkeypatch.setattr("ovq_lab.eval.needle._EXTRA_TOKENS", 0)
    builder = NeedleBuilder(BYTES, value="word", num_distractors=2)
    options = {"lengths": [340, 400], "depths": [0, 1.0], "num_slots": [2, 32], "num_examples": 2}
    seen = Seen()
    rows = evaluate_needle(model, builder, seed=5, name="m", reporter=seen, **options)
    assert seen.done[-1] == seen.total == 2 * 2 * 2 * (340 + 400)
    places = [(slots, length, depth) for slots in (2, 32) for length in (340, 400) for depth in (0, 1)]
    assert [(row.num_slots, row.length, row.depth) for row in rows] == places
    assert model.config.num_slots == 8
    model.set_num_slots(32)
    scores = [ask(model, BYTES, builder.build(400, depth=1, seed=5, index=i)) for i in range(2)]
    assert rows[-1].choice == pytest.approx(np.mean([score.is_chosen for score in scores]))
    assert rows[-1].token_accuracy == pytest.approx(np.mean([score.token_accuracy for score in scores]))
    assert rows[-1].state_bytes == model.state_bytes(400)
    assert rows[-1].label == "m, 32 slots"
    model.set_num_slots(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "expected lengths, depths and at least one example"),
        ({"lengths": [400], "depths": []}, "expected lengths, depths"),
        ({"lengths": [400], "num_examples": 0}, "at least one example"),
        ({"lengths": [400, 100]}, "length: expected room for a sentence"),
        ({"lengths": [400], "depths": [-1]}, "depth: expected a number from 0 to 1"),
    ],
)
def test_what_cannot_be_asked(options, message):
    """It is refused before the model is used."""
    with pytest.raises(ValueError, match=message):
        measure(None, NeedleBuilder(BYTES), **options)


def test_a_tokenizer_of_another_model(model):
    for prompt, answer in (([1, 257], [3]), ([1], [257])):
        needle = Needle(prompt=np.array(prompt), answer=np.array(answer), value="x", distractors=())
        with pytest.raises(
            ValueError, match="tokenizer: expected token ids below 257, as the model knows, found 257"
        ):
            ask(model, BYTES, needle)


def row(mixer="ovq", num_slots=64, length=1024, depth=0.0, generated=0.5):
    return NeedleRow(
        mixer=mixer,
        num_slots=num_slots,
        haystack="noise",
        value="number",
        length=length,
        depth=depth,
        num_examples=4,
        num_distractors=7,
        generated=generated,
        token_accuracy=0.75,
        choice=1.0,
        state_bytes=1,
    )


ROWS = [
    *(row(length=length, depth=depth) for length in (1024, 4096) for depth in (0.0, 0.5)),
    row("mamba2", None, 4096, 0.5, generated=0.25),
]


def test_the_table_has_a_line_for_each_model_and_depth():
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(needle_table(ROWS, title="t"))
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines()]
    assert [[cell.strip() for cell in line] for line in lines if line] == [
        ["OVQ, 64 slots", "0%", "0.50 0.75 1.00", "0.50 0.75 1.00"],
        ["", "50%", "0.50 0.75 1.00", "0.50 0.75 1.00"],
        ["Mamba2", "50%", "", "0.25 0.75 1.00"],
    ]


def test_heat_maps_show_every_row(tmp_path, drawn):
    paths = save_needle_figures(ROWS, tmp_path)
    assert [path.name for path in paths] == [f"needle_{score}.png" for score in SCORES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    first, second = drawn[0].axes[:2]
    assert (first.get_title(), second.get_title()) == ("OVQ, 64 slots", "Mamba2")
    assert first.images[0].get_array().tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert sorted(text.get_text() for text in second.texts) == ["0.25"]
    assert [text.get_text() for text in first.get_yticklabels()] == ["0%", "50%"]
    assert [text.get_text() for text in first.get_xticklabels()] == ["1k", "4k"]
    # The colour bar says what it measures, and the titles need not.
    assert [figure.axes[-1].get_xlabel() for figure in drawn] == [AXIS_NAMES[score] for score in SCORES]


def test_rows_are_json():
    assert json.loads(json.dumps(dataclasses.asdict(row())))["choice"] == 1


def test_essays_are_of_the_documents_asked_for(tmp_path):
    names = [f"{i}.txt" for i in range(40)]
    for name in names:
        (tmp_path / name).write_text(f"Text {name}.")
    for held_out in (0.1, 0.5):
        splits = {f"Text {name}.": split_of(name, held_out=held_out) for name in names}
        for split in ("train", "test"):
            found = essay_texts(TextSource(dataset=str(tmp_path), held_out=held_out), split, 1)
            assert set(found) == {text for text in splits if splits[text] == split}
    source = TextSource(dataset=str(tmp_path), held_out=0.0)
    assert len(essay_texts(source, "all", 1)) == 40
    assert len(essay_texts(dataclasses.replace(source, max_documents=7), "all", 1)) == 7
    with pytest.raises(ValueError, match=r"dataset: expected documents for test in .*, found none"):
        essay_texts(source, "test", 1)


def test_essays_stop_at_enough(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("word " * 2**18)
    source = TextSource(dataset=str(tmp_path))
    # At least 4 MiB of characters, and more for longer essays.
    assert len(essay_texts(source, "all", 1)) == 4
    assert len(essay_texts(source, "all", 100_000)) == 5
