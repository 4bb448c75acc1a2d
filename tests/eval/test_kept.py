"""What is kept of a recall task: counted again token by token, from the slots of a model."""

import dataclasses

import numpy as np
import pytest
import torch
from tests.progress import Seen
from tests.tiny import tiny_model

from ovq.hf import model_assignments
from ovq_lab.eval import kept
from ovq_lab.eval.accuracy import evaluate
from ovq_lab.eval.kept import COUNT_NAMES, evaluate_kept
from ovq_lab.tasks import IGNORE_INDEX, RecallTask

TASK = RecallTask(length=90, vocab_size=20, key_length=2, pair_share=0.6)
CHUNK = 4


def build_model(*mixer_types, **changes):
    # Large weights, so that an untrained model has opinions.
    sizes = {"vocab_size": 20, "sliding_window": 4, "num_slots": 4, "initializer_range": 1.0}
    return tiny_model(mixer_types=list(mixer_types), chunk_size=CHUNK, **sizes, **changes)


def run(model, task=TASK, **arguments):
    options = {"num_slots": 12, "merge": "nearest", "num_examples": 5, "seed": 3, "reporter": Seen()}
    return evaluate_kept(model, task, **options | arguments)


def test_places_of_pairs_hold_the_pairs():
    starts, pairs = TASK.pair_places(3, indices=[4, 7], split="test")
    inputs = TASK.build(3, indices=[4, 7], split="test").inputs
    stored = TASK.num_stored
    assert starts.shape == pairs.shape == (2, stored + TASK.num_queries)
    for row in range(2):
        spelled = [tuple(inputs[row, start : start + 3]) for start in starts[row]]
        assert len(set(spelled[:stored])) == stored
        assert [spelled[pair] for pair in pairs[row]] == spelled
        assert (starts[row, stored:] > TASK.context_length).all()


@pytest.mark.parametrize(("merge", "offset"), [("existing", None), ("nearest", None), ("nearest", 3)])
def test_pairs_with_a_slot_of_their_own_counted_by_hand(merge, offset, monkeypatch):
    """Question by question: who is in the slots that a shorter text ends with."""
    if offset is not None:
        # The token after a pair, which may begin the next.
        monkeypatch.setattr(kept, "_most_read", lambda *_: (offset, 0.5))
    model = build_model("sliding_attention", "ovq")
    row = run(model, merge=merge)
    # In batches of one, the same.
    monkeypatch.setattr(kept, "TOKENS_PER_BATCH", 100)
    again = run(model, merge=merge)
    assert again.weight == pytest.approx(row.weight, rel=1e-5)
    assert dataclasses.replace(again, weight=row.weight) == row
    model.set_num_slots(12)
    model.set_merge(merge)
    inputs = torch.from_numpy(TASK.build(3, indices=range(5), split="test").inputs)
    starts, pairs = TASK.pair_places(3, indices=range(5), split="test")
    logits = model(inputs).logits
    own, clean, right = [], [], []
    for b in range(5):
        for q in range(TASK.num_stored, len(starts[b])):
            asked = starts[b, q] + 1
            read_so_far = asked // CHUNK * CHUNK
            slots = model_assignments(model, inputs[b : b + 1, :read_so_far])[1].slots[0]
            in_heads = []
            for head in slots.tolist():
                found = []
                for other in range(q):
                    token = starts[b, other] + row.offset
                    if pairs[b, other] != pairs[b, q] or token > asked:
                        continue
                    if token >= read_so_far:
                        found.append((True, True))
                        continue
                    others = [i for i in range(len(starts[b])) if pairs[b, i] != pairs[b, q]]
                    readers = {starts[b, i] + row.offset for i in others}
                    everyone = readers | {starts[b, i] + j for i in others for j in range(3)}
                    # A token that is read for this pair is this pair's, even if it begins the next.
                    everyone -= {starts[b, i] + row.offset for i in range(len(starts[b])) if i not in others}
                    members = {t for t, slot in enumerate(head) if slot == head[token]}
                    found.append((not members & readers, not members & everyone))
                in_heads.append((any(a for a, _ in found), any(c for _, c in found)))
            own.append(sum(a for a, _ in in_heads))
            clean.append(sum(c for _, c in in_heads))
            right.append(int(logits[b, asked].argmax()) == int(inputs[b, asked + 1]))
    own, clean, right = np.array(own), np.array(clean), np.array(right)
    assert row.num_questions == len(own) == 5 * TASK.num_queries
    assert row.own_share == (own > 0).mean()
    assert row.clean_share == (clean > 0).mean() < row.own_share < 1
    assert row.heads_share == {str(n): (own == n).mean() for n in range(3)}
    assert row.own_accuracy == right[own > 0].mean()
    assert row.shared_accuracy == right[own == 0].mean()
    assert 0 < row.accuracy == right.mean()


def test_a_question_is_right_if_all_its_tokens_are(monkeypatch):
    real = kept.answers_of

    def half_right(model, batch):
        real(model, batch)
        right = batch.labels[batch.labels != IGNORE_INDEX]
        return right + np.arange(len(right)) % 2

    monkeypatch.setattr(kept, "answers_of", half_right)
    task = dataclasses.replace(TASK, value_length=2)
    assert run(build_model("ovq"), task, num_examples=1).accuracy == 0


def test_the_accuracy_is_that_of_an_evaluation():
    model = build_model("sliding_attention", "ovq")
    row = run(model)
    options = {"lengths": [90], "num_slots": [12], "merges": ["nearest"], "num_examples": 5, "seed": 3}
    [usual] = evaluate(model, TASK, **options, reporter=Seen())
    assert (row.accuracy, row.num_questions) == (usual.accuracy, usual.num_questions)
    assert (row.mixer, row.num_slots, row.merge, row.length) == ("ovq", 12, "nearest", 90)
    assert (model.config.num_slots, model.config.merge) == (4, "existing")


def test_slots_and_their_ages_counted_by_hand():
    model = build_model("ovq")
    row = run(model, num_examples=2)
    model.set_num_slots(12)
    model.set_merge("nearest")
    inputs = torch.from_numpy(TASK.build(3, indices=range(2), split="test").inputs)
    found = model_assignments(model, inputs[:, : TASK.context_length])[0]
    counts = found.state.count.flatten().tolist()
    assert len(counts) == 2 * 2 * 12
    names = ["1", "2", "3-4", "3-4", "5-8", "5-8", "5-8", "5-8", *["9-16"] * 8, *["17-32"] * 16]
    for name in COUNT_NAMES:
        assert row.slot_counts[name] == sum(names[c - 1] == name for c in counts) / len(counts)
    for field, positions in (("oldest", found.oldest), ("mean_position", found.mean_position)):
        parts = [int(16 * float(x) / TASK.context_length) + 1 for x in positions.flatten()]
        expected = {str(part): parts.count(part) / len(parts) for part in range(1, 17)}
        assert getattr(row, field) == expected
    shares = found.state.count.double() / found.state.count.sum(-1, keepdim=True)
    effective = torch.special.entr(shares).sum(-1).exp().mean()
    assert row.effective_slots == pytest.approx(float(effective))
    assert row.largest_share == pytest.approx(float(shares.amax(-1).mean()))
    assert row.context_length == TASK.context_length


def test_with_room_for_every_token_all_pairs_have_slots_of_their_own():
    row = run(build_model("ovq"), num_slots=90)
    assert row.own_share == row.clean_share == row.slot_counts["1"] == 1
    assert row.shared_accuracy is None
    assert row.own_accuracy == row.accuracy


def test_slots_of_very_many_tokens_are_one_kind():
    tally = kept._Tally()
    tally.add_memory(torch.tensor([[[0] * 1000, [0] * 257 + [1] * 743]]), 1000)
    tally.add_questions(*[np.ones((1, 1), dtype=int)] * 3)
    assert tally.fields()["slot_counts"]["over 256"] == 1


@pytest.mark.parametrize("offset", [2, 3])
def test_the_token_that_is_read_is_the_one_with_the_most_weight(offset):
    """Every question attends to itself, and to a token of its pair or the one after it."""
    starts, pairs = TASK.pair_places(3, indices=range(2), split="test")
    places = kept._Pairs(TASK, starts, pairs)
    asked = places.questions
    assert asked.tolist() == (starts[0, TASK.num_stored :] + 1).tolist()
    weights = torch.zeros(2, len(asked), 90)
    for b in range(2):
        for q in range(len(asked)):
            pair = pairs[b, TASK.num_stored + q]
            weights[b, q, starts[b, pair] + offset] = 0.375
            # More on itself, which tells nothing of the pair.
            weights[b, q, asked[q]] = 0.625
    assert kept._most_read(weights, places) == (offset, 0.375)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected a model with 'ovq' layers"):
        run(build_model("full_attention"))
    with pytest.raises(
        ValueError, match="expected a task of at most 20 token ids, as the model knows, found 30"
    ):
        run(build_model("ovq"), dataclasses.replace(TASK, vocab_size=30))
