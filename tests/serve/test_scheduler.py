"""Continuous batching without a network: whoever joins and leaves, each answer is what it would be alone."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovq import convert
from ovq.hf import build_context
from ovq.hf.rows import Rows
from ovq.hf.streaming import Sampling
from ovq.serve.engine import Engine
from ovq.serve.errors import APIError
from ovq.serve.jobs import ContextEvent, FailEvent, Generation, Reading, TokenEvent
from ovq.serve.limits import Limits
from ovq.serve.model import ServedModel
from ovq.serve.scheduler import Scheduler
from tests.hf.common import BASELINES, make_model, random_ids
from tests.serve.common import converted_model, greedy, sampled, until

MODELS = {"ovq": make_model(), "baselines": make_model(**BASELINES), "converted": converted_model()}
PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 5, 9, 23)]
DOCUMENT = random_ids(1, 61, seed=3)[0].tolist()
NUM_TOKENS = 14


@functools.cache
def expected_of(place, is_after=False, name="ovq"):
    """What `generate` gives after one of the prompts, alone."""
    return greedy(MODELS[name], PROMPTS[place], NUM_TOKENS, before=DOCUMENT if is_after else ())


@functools.cache
def context_of(name="ovq"):
    build = convert.build_context if name == "converted" else build_context
    return build(MODELS[name], DOCUMENT)


class Log:
    """The events of a job."""

    def __init__(self):
        self.events = []

    def __call__(self, events):
        self.events += events

    def tokens(self, choice=0):
        return [e.token for e in self.events if isinstance(e, TokenEvent) and e.choice == choice]


def run(scheduler):
    while scheduler.step():
        pass


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2)
@given(data=st.data())
def test_answers_do_not_depend_on_who_else_is_served(name, data):
    limits = Limits(max_rows=data.draw(st.integers(1, 5)), step_tokens=data.draw(st.integers(1, 30)))
    scheduler = Scheduler(ServedModel(MODELS[name]), limits)
    asked = []
    for _ in range(data.draw(st.integers(1, 6))):
        place, is_after = data.draw(st.integers(0, 3)), data.draw(st.booleans())
        num_tokens, log = data.draw(st.integers(1, NUM_TOKENS)), Log()
        job = Generation(
            tokens=PROMPTS[place],
            deliver=log,
            max_tokens=num_tokens,
            context=context_of(name) if is_after else None,
        )
        scheduler.add(job)
        asked.append((log, expected_of(place, is_after, name)[:num_tokens]))
        for _ in range(data.draw(st.integers(0, 5))):
            scheduler.step()
        if data.draw(st.booleans()):
            gone = Generation(tokens=PROMPTS[3], deliver=print, max_tokens=NUM_TOKENS)
            scheduler.add(gone)
            scheduler.step()
            gone.is_cancelled = True
    run(scheduler)
    for log, expected in asked:
        assert log.tokens() == expected
        assert log.events[-1].finish_reason == "length"
    assert (scheduler.num_rows, len(scheduler.waiting), scheduler.state_bytes) == (0, 0, 0)


def test_sampled_answers_depend_on_their_seed_alone():
    model, options = MODELS["ovq"], {"temperature": 1.3, "top_p": 0.9, "top_k": 20}
    scheduler, logs = Scheduler(ServedModel(model), Limits()), []
    for place, (prompt, num_choices) in enumerate(zip(PROMPTS, (1, 3, 2, 1), strict=True)):
        logs.append(Log())
        sampling = Sampling(**options) if place < 3 else Sampling(temperature=0.7)
        scheduler.add(
            Generation(
                tokens=prompt,
                deliver=logs[-1],
                max_tokens=NUM_TOKENS,
                sampling=sampling,
                seed=40 + place,
                choices=range(num_choices),
            )
        )
        scheduler.step()
    run(scheduler)
    assert logs[0].tokens() == sampled(model, PROMPTS[0], NUM_TOKENS, seed=40, **options)
    for choice in range(3):
        # Each choice has a seed of its own.
        expected = sampled(model, PROMPTS[1], NUM_TOKENS, seed=41 + choice, **options)
        assert logs[1].tokens(choice) == expected
    assert logs[2].tokens(1) == sampled(model, PROMPTS[2], NUM_TOKENS, seed=43, **options)
    assert logs[3].tokens() == sampled(model, PROMPTS[3], NUM_TOKENS, seed=43, temperature=0.7)
    assert len({tuple(logs[1].tokens(choice)) for choice in range(3)}) == 3


def test_without_a_seed_answers_differ():
    log = Log()
    scheduler = Scheduler(ServedModel(MODELS["ovq"]), Limits())
    sampling = Sampling(temperature=1.0)
    scheduler.add(
        Generation(tokens=[1], deliver=log, max_tokens=NUM_TOKENS, sampling=sampling, choices=(0, 1))
    )
    run(scheduler)
    assert log.tokens(0) != log.tokens(1)


def test_an_end_token_ends_an_answer_and_is_told_apart():
    expected = expected_of(2)
    end = next(token for token in expected[2:] if expected.index(token) >= 2)
    scheduler, log = Scheduler(ServedModel(MODELS["ovq"]), Limits()), Log()
    scheduler.add(
        Generation(tokens=PROMPTS[2], deliver=log, max_tokens=NUM_TOKENS, ends=frozenset({end, 1000}))
    )
    run(scheduler)
    assert log.tokens() == expected[: expected.index(end) + 1]
    assert [e.is_end for e in log.events] == [False] * (len(log.events) - 1) + [True]
    assert [e.finish_reason for e in log.events] == [None] * (len(log.events) - 1) + ["stop"]


@torch.no_grad()
def test_logprobs_are_those_of_the_model():
    model, log = MODELS["ovq"], Log()
    scheduler = Scheduler(ServedModel(model), Limits())
    sampling = Sampling(temperature=0.5, top_k=2)
    scheduler.add(
        Generation(tokens=PROMPTS[2], deliver=log, max_tokens=6, sampling=sampling, seed=1, num_logprobs=3)
    )
    scheduler.add(Generation(tokens=PROMPTS[1], deliver=print, max_tokens=3))
    run(scheduler)
    text = torch.tensor([PROMPTS[2] + log.tokens()])
    # Before temperature and top-k.
    expected = model(text, use_cache=False).logits[0].float().log_softmax(-1)
    for step, event in enumerate(log.events):
        row = expected[len(PROMPTS[2]) - 1 + step]
        assert event.logprobs.logprob == pytest.approx(float(row[event.token]), abs=1e-5)
        assert [token for token, _ in event.logprobs.top] == row.topk(3).indices.tolist()
        assert [p for _, p in event.logprobs.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)


def test_a_long_document_does_not_hold_up_answers():
    scheduler = Scheduler(ServedModel(MODELS["ovq"]), Limits(step_tokens=4))
    document, short, running = Log(), Log(), Log()
    scheduler.add(Generation(tokens=PROMPTS[1], deliver=running, max_tokens=NUM_TOKENS))
    scheduler.step(), scheduler.step()
    before = len(running.tokens())
    scheduler.add(Reading(tokens=DOCUMENT, deliver=document))
    scheduler.add(Generation(tokens=PROMPTS[0], deliver=short, max_tokens=3))
    for step in range(5):
        scheduler.step()
        assert len(running.tokens()) == before + step + 1
    assert len(short.tokens()) == 3
    assert not document.events
    run(scheduler)
    (event,) = document.events
    assert isinstance(event, ContextEvent)
    assert event.context.num_tokens == len(DOCUMENT)
    log = Log()
    scheduler.add(Generation(tokens=PROMPTS[3], deliver=log, max_tokens=NUM_TOKENS, context=event.context))
    run(scheduler)
    assert log.tokens() == expected_of(3, True)


def test_rows_are_never_more_than_allowed_and_the_first_to_come_is_the_first_served():
    scheduler = Scheduler(ServedModel(MODELS["ovq"]), Limits(max_rows=3))
    logs = [Log() for _ in range(4)]
    for log, num_choices in zip(logs, (2, 2, 1, 3), strict=True):
        scheduler.add(Generation(tokens=PROMPTS[1], deliver=log, max_tokens=4, choices=range(num_choices)))
    first_seen = []
    while scheduler.step():
        assert scheduler.num_rows <= 3
        first_seen += [i for i, log in enumerate(logs) if log.events and i not in first_seen]
    assert first_seen == [0, 1, 2, 3]
    for log in logs:
        assert log.tokens() == expected_of(1)[:4]


def test_a_request_of_many_prompts_does_not_hold_up_those_that_come_after_it():
    scheduler, ends = Scheduler(ServedModel(MODELS["ovq"]), Limits(max_rows=2)), []

    def client(name):
        return lambda events: ends.extend(
            f"{name}{e.choice}" for e in events if isinstance(e, TokenEvent) and e.finish_reason
        )

    many, few = client("many"), client("few")
    for place in range(6):
        scheduler.add(Generation(tokens=PROMPTS[1], deliver=many, max_tokens=2 + place, choices=[place]))
    scheduler.step()
    for place in range(2):
        scheduler.add(Generation(tokens=PROMPTS[1], deliver=few, max_tokens=2, choices=[place]))
    run(scheduler)
    # One row for each, until there is nothing else to do.
    assert ends == ["many0", "many1", "few0", "few1", "many2", "many3", "many4", "many5"]


@pytest.mark.parametrize(("num_rows", "num_answers"), [(1, 1), (4, 1), (4, 4)])
def test_requests_of_many_prompts_take_turns_with_one_that_comes_after_all_have_a_row(num_rows, num_answers):
    scheduler, ends = Scheduler(ServedModel(MODELS["ovq"]), Limits(max_rows=num_rows)), []

    def client(name):
        return lambda events: ends.extend(
            name for event in events if isinstance(event, TokenEvent) and event.finish_reason
        )

    num_many = num_rows // num_answers
    for name in range(num_many):
        deliver = client(name)
        for _ in range(6):
            choices = range(num_answers)
            scheduler.add(
                Generation(tokens=PROMPTS[1], deliver=deliver, max_tokens=2 + name, choices=choices)
            )
    scheduler.step()
    scheduler.add(Generation(tokens=PROMPTS[1], deliver=client("one"), max_tokens=2, choices=[0]))
    run(scheduler)
    # After the rows that the others have, and one more turn of each at most.
    assert ends.index("one") <= 2 * num_rows


class Faulty(ServedModel):
    """A model that fails at a token."""

    def start(self, context):
        rows, fault = super().start(context), self.fault
        read = type(rows).read

        class Rows(type(rows)):
            def read(self, tokens):
                if fault in torch.as_tensor(tokens):
                    raise RuntimeError("out of memory")
                return read(self, tokens)

        rows.__class__ = Rows
        return rows


def test_what_waits_behind_a_wide_request_is_counted():
    """There is room for it, but its turn comes later."""

    def ask(num_answers):
        job = Generation(tokens=[1], deliver=Log(), max_tokens=10**6, choices=range(num_answers))
        engine.submit([job])

    engine = Engine(ServedModel(MODELS["ovq"]), Limits(max_rows=4, max_queue=2))
    engine.start()
    try:
        ask(3)
        until(lambda: engine.scheduler.num_rows == 3)
        ask(4)
        ask(1)
        until(lambda: len(engine.scheduler.waiting) == 2)
        with pytest.raises(APIError, match="at most 2 waiting prompts, found 3"):
            ask(1)
    finally:
        engine.stop()


def test_a_prompt_that_fails_fails_alone():
    served = Faulty(MODELS["ovq"])
    served.fault = 47
    scheduler, good, bad = Scheduler(served, Limits()), Log(), Log()
    scheduler.add(Generation(tokens=PROMPTS[2], deliver=good, max_tokens=5))
    scheduler.step()
    scheduler.add(Generation(tokens=[1, 47], deliver=bad, max_tokens=5))
    run(scheduler)
    assert [type(event) for event in bad.events] == [FailEvent]
    assert good.tokens() == expected_of(2)[:5]
    assert scheduler.num_rows == 0


@pytest.mark.parametrize("num_read", [2, 4], ids=["prompt", "answer"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=str)
def test_an_answer_without_numbers_fails_alone(options, num_read, monkeypatch):
    read = Rows.read

    def poisoned(rows, tokens):
        logits = read(rows, tokens)
        logits[[place for place, length in enumerate(rows.lengths) if length == num_read]] = torch.nan
        return logits

    monkeypatch.setattr(Rows, "read", poisoned)
    scheduler, good, bad = Scheduler(ServedModel(MODELS["ovq"]), Limits()), Log(), Log()
    scheduler.add(Generation(tokens=PROMPTS[2], deliver=good, max_tokens=9))
    scheduler.step()
    sampling = Sampling(**options)
    scheduler.add(Generation(tokens=[1, 5], deliver=bad, max_tokens=9, sampling=sampling, num_logprobs=1))
    run(scheduler)
    assert isinstance(bad.events[-1], FailEvent)
    assert len(bad.tokens()) == num_read - 2
    assert good.tokens() == expected_of(2)[:9]


@pytest.mark.parametrize("num_bad", [1, 3], ids=["one", "all"])
def test_a_job_fails_once_whatever_number_of_its_answers_do(num_bad, monkeypatch):
    read = Rows.read

    def poisoned(rows, tokens):
        logits = read(rows, tokens)
        if len(rows) == 3 and rows.lengths[0] == 6:
            logits[:num_bad] = torch.nan
        return logits

    monkeypatch.setattr(Rows, "read", poisoned)
    scheduler, log = Scheduler(ServedModel(MODELS["ovq"]), Limits()), Log()
    scheduler.add(Generation(tokens=[1, 5], deliver=log, max_tokens=30, choices=range(3)))
    run(scheduler)
    assert [type(event) for event in log.events].count(FailEvent) == 1
    assert isinstance(log.events[-1], FailEvent)
    counts = scheduler.counts
    assert (counts.failed, counts.finished, counts.cancelled) == (1, 0, 0)
    assert scheduler.num_rows == 0


def test_after_a_step_that_fails_others_are_served():
    served = Faulty(MODELS["ovq"])
    served.fault = expected_of(2)[0]
    scheduler, bad, good = Scheduler(served, Limits()), Log(), Log()
    scheduler.add(Generation(tokens=PROMPTS[2], deliver=bad, max_tokens=5))
    run(scheduler)
    assert isinstance(bad.events[-1], FailEvent)
    assert (scheduler.num_rows, scheduler.counts.failed) == (0, 1)
    served.fault = 1000
    scheduler.add(Generation(tokens=PROMPTS[2], deliver=good, max_tokens=5))
    run(scheduler)
    assert good.tokens() == expected_of(2)[:5]


def test_a_prompt_outlives_a_step_from_which_no_row_can_leave(monkeypatch):
    def fail(rows, places):
        raise RuntimeError("out of memory")

    scheduler, logs = Scheduler(ServedModel(MODELS["ovq"]), Limits()), [Log(), Log(), Log()]
    for place in (1, 2):
        scheduler.add(Generation(tokens=PROMPTS[place], deliver=logs[place], max_tokens=3 * place - 1))
    scheduler.step()
    scheduler.add(Generation(tokens=PROMPTS[0], deliver=logs[0], max_tokens=5))
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "keep", fail)
        scheduler.step()
    run(scheduler)
    assert [event.finish_reason for event in logs[1].events] == [None, "length"]
    assert isinstance(logs[2].events[-1], FailEvent)
    assert logs[0].tokens() == expected_of(0)[:5]
    assert scheduler.num_rows == 0
