"""What is known is not read again, and answers are what they are when everything is."""

import functools
import random

import httpx
import openai
import pytest
import torch

from ovq.serve.jobs import BeginEvent, Generation
from ovq.serve.limits import Limits
from ovq.serve.model import ServedModel
from ovq.serve.prefixes import MIN_TOKENS, Known, Prefixes
from ovq.serve.scheduler import Scheduler
from tests.hf.common import is_greedy, random_ids
from tests.serve.common import reading_service, running, text_service, until
from tests.serve.test_scheduler import DOCUMENT, MODELS, NUM_TOKENS, Log, context_of, run

TEXT = random_ids(1, 400, seed=9)[0].tolist()


class Rows:
    """A state that knows what it has read, and takes 1,000 bytes with its key, of four bytes per token."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.nbytes = 1000 - 4 * len(tokens)

    def copied(self):
        return Rows(self.tokens)


def kept(*prompts, root="root", max_bytes=10**5):
    prefixes = Prefixes(max_bytes)
    for prompt in prompts:
        prefixes.add(root, prompt, Rows(prompt))
    return prefixes


def test_a_prompt_goes_on_from_its_longest_prefix():
    prefixes = kept(TEXT[:40], TEXT[:90], [*TEXT[:60], 1, 2, 3])
    for length, expected in ((41, 40), (90, 40), (91, 90), (400, 90), (40, 0), (1, 0)):
        found = prefixes.find("root", TEXT[:length])
        assert found.num_tokens == expected
        assert (found.rows is None) == (expected == 0)
        assert expected == 0 or found.rows.tokens == TEXT[:expected]
    assert prefixes.find("root", [*TEXT[:60], 1, 2, 3, 4]).num_tokens == 63
    assert prefixes.find("other", TEXT) == Known()


@pytest.mark.parametrize("place", [0, 17, 39])
def test_one_other_token_is_another_prompt(place):
    other = TEXT[:80]
    other[place] += 1
    found = kept(TEXT[:40]).find("root", other)
    assert (found.rows, found.num_tokens) == (None, 0)


def test_forks_are_told_where_they_are_worth_it():
    prefixes = kept(TEXT[:100])
    ways = {n: prefixes.find("root", [*TEXT[:n], 0, 0]).fork for n in (MIN_TOKENS - 1, MIN_TOKENS, 99)}
    assert ways == {MIN_TOKENS - 1: 0, MIN_TOKENS: MIN_TOKENS, 99: 99}
    # Once there is a state, only what is after it counts.
    prefixes.add("root", TEXT[:60], Rows(TEXT[:60]))
    assert (
        prefixes.find("root", [*TEXT[:70], 0])
        == Known(rows=prefixes.find("root", TEXT[:61]).rows, num_tokens=60)
        or prefixes.find("root", [*TEXT[:70], 0]).fork == 0
    )
    assert prefixes.find("root", [*TEXT[:95], 0]).fork == 95
    # The same prompt again: one token has to be left.
    assert prefixes.find("root", TEXT[:100]).fork == 99


def test_what_was_not_used_for_longest_goes_first():
    prefixes = kept(TEXT[:40], TEXT[:80], [7, *TEXT[:50]], max_bytes=3500)
    assert (len(prefixes), prefixes.nbytes, prefixes.num_evicted) == (3, 3000, 0)
    prefixes.find("root", TEXT[:41])
    prefixes.add("root", TEXT[:120], Rows(TEXT[:120]))
    assert (len(prefixes), prefixes.nbytes, prefixes.num_evicted) == (3, 3000, 1)
    assert [prefixes.find("root", TEXT[:n]).num_tokens for n in (41, 81, 121)] == [40, 40, 120]
    # The same prompt takes the place of what was there, and what is too large is not kept.
    prefixes.add("root", TEXT[:120], Rows(TEXT[:120]))
    assert (len(prefixes), prefixes.nbytes) == (3, 3000)
    none = kept(TEXT[:40], max_bytes=999)
    assert (len(none), none.nbytes) == (0, 0)


def test_nothing_is_left_of_what_is_forgotten():
    prefixes = kept(TEXT[:40], TEXT[:80], [*TEXT[:60], 0], max_bytes=10_000)
    prefixes.add("other", TEXT[:40], Rows(TEXT[:40]))
    prefixes.forget(lambda root: root == "root")
    assert (len(prefixes), prefixes.nbytes) == (1, 1000)
    assert prefixes.find("root", TEXT) == Known()
    for _ in range(20):
        prompt = random.sample(range(1000), 50)
        prefixes.add("other", prompt, Rows(prompt))
    assert len(prefixes) == prefixes.nbytes // 1000 == 10


def test_prefixes_know_what_a_list_knows():
    """Random prompts with common beginnings, in little room."""
    source = random.Random(0)
    prefixes, used = Prefixes(6000), {}
    for step in range(3000):
        prompt = tuple(source.choices((1, 2), k=source.randint(1, 9)))
        if source.random() < 0.5:
            prefixes.add("root", prompt, Rows(prompt))
            used[prompt] = step
            if len(used) > 6:
                del used[min(used, key=used.get)]
        else:
            best = max(
                (p for p in used if len(p) < len(prompt) and prompt[: len(p)] == p), key=len, default=()
            )
            found = prefixes.find("root", prompt)
            assert found.num_tokens == len(best)
            if best:
                assert found.rows.tokens == best
                used[best] = step
        assert len(prefixes) == len(used)


def test_tokens_of_several_bytes_part_where_they_differ():
    source, prefixes, used = random.Random(1), Prefixes(10**6), []
    for _ in range(300):
        # Some share bytes of a token that they do not share.
        prompt = [token for token in source.choices((1, 255, 256, 70_000), k=4) for _ in range(9)]
        shared = max((next((n for n in range(36) if other[n] != prompt[n]), 36) for other in used), default=0)
        fork = min(shared, len(prompt) - 1)
        assert prefixes.find("root", prompt).fork == (fork if fork >= MIN_TOKENS else 0)
        prefixes.add("root", prompt, Rows(prompt))
        used.append(prompt)


@functools.cache
def is_answer(answer, prompt, name, is_after=False):
    """Whether it is the greedy one to a prompt that is read as a whole."""
    text = torch.tensor([*(DOCUMENT if is_after else ()), *prompt, *answer])
    return is_greedy(MODELS[name], text, len(answer))


def asked(scheduler, prompt, num_tokens=NUM_TOKENS, context=None):
    log = Log()
    job = Generation(tokens=list(prompt), deliver=log, max_tokens=num_tokens, context=context)
    scheduler.add(job)
    return job, log


def num_known(log):
    return sum(event.num_known for event in log.events if isinstance(event, BeginEvent))


@pytest.mark.parametrize("name", MODELS)
def test_the_next_turn_of_a_chat_reads_what_is_new(name):
    """Two chats at once: each goes on from its own state."""
    scheduler = Scheduler(ServedModel(MODELS[name]), Limits(step_tokens=25))
    prompts, known = [tuple(TEXT[:70]), tuple(TEXT[200:265])], [0, 0]
    for turn in range(3):
        logs = [asked(scheduler, prompt, num_tokens=20)[1] for prompt in prompts]
        run(scheduler)
        assert [num_known(log) for log in logs] == known
        for i, (prompt, log) in enumerate(zip(prompts, logs, strict=True)):
            answer = log.tokens()
            assert is_answer(tuple(answer), prompt, name)
            # The last token of an answer is read with the next prompt.
            known[i] = len(prompt) + len(answer) - 1
            prompts[i] = (*prompt, *answer, *TEXT[100 + turn : 108 + turn])
    assert scheduler.counts.known_tokens > scheduler.counts.prompt_tokens


@pytest.mark.parametrize("name", MODELS)
def test_a_document_before_questions_is_read_twice_and_no_more(name):
    scheduler = Scheduler(ServedModel(MODELS[name]), Limits())
    known = []
    for question in range(4):
        prompt = (*TEXT[:120], question, question + 1)
        _, log = asked(scheduler, prompt, 6)
        run(scheduler)
        known.append(num_known(log))
        assert len(log.tokens()) == 6
        assert is_answer(tuple(log.tokens()), prompt, name)
    assert known == [0, 0, 120, 120]


@pytest.mark.parametrize("change", ["token", "context", "settings"])
def test_what_differs_is_read_again(change, monkeypatch):
    scheduler = Scheduler(ServedModel(MODELS["ovq"]), Limits())
    prompt, context = tuple(TEXT[:60]), None
    asked(scheduler, prompt)
    run(scheduler)
    if change == "token":
        prompt = (prompt[0] + 1, *prompt[1:])
    elif change == "context":
        context = context_of("ovq")
    else:
        monkeypatch.setattr(MODELS["ovq"].config, "num_slots", MODELS["ovq"].config.num_slots + 1)
    _, log = asked(scheduler, (*prompt, 1, 2), context=context)
    run(scheduler)
    assert num_known(log) == 0


def test_states_that_go_on_from_a_context_go_with_it():
    scheduler = Scheduler(ServedModel(MODELS["ovq"]), Limits())
    for context in (None, context_of("ovq")):
        asked(scheduler, TEXT[:60], context=context)
    run(scheduler)
    assert len(scheduler.prefixes) == 2
    scheduler.forget(context_of("ovq"))
    assert len(scheduler.prefixes) == 1


def test_what_is_read_after_a_deleted_context_is_not_kept():
    scheduler, context = Scheduler(ServedModel(MODELS["ovq"]), Limits()), context_of("ovq")
    _, log = asked(scheduler, TEXT[:60], 30, context=context)
    scheduler.step()
    assert len(scheduler.prefixes) == 1
    scheduler.forget(context)
    # Beside an answer that is being written, a prompt that was sent before.
    asked(scheduler, TEXT[:60], context=context)
    run(scheduler)
    assert len(log.tokens()) == 30
    assert len(scheduler.prefixes) == 0


def test_settings_of_a_converted_model_are_written_out_once(monkeypatch):
    model, written = MODELS["converted"], []
    served = ServedModel(model)
    monkeypatch.setattr(type(model), "memory_fields", lambda self: written.append(1) or {"n": len(written)})
    before = served.settings
    assert served.settings == before
    assert len(written) == 1


def test_without_room_everything_is_read():
    scheduler = Scheduler(ServedModel(MODELS["ovq"]), Limits(prefix_bytes=0))
    for _ in range(3):
        _, log = asked(scheduler, TEXT[:80])
        run(scheduler)
        assert num_known(log) == 0
    assert (len(scheduler.prefixes), scheduler.counts.known_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("name", "num_arrivals"),
    [("ovq", 20), ("converted", 8), pytest.param("ovq", 1000, marks=pytest.mark.slow)],
)
def test_random_arrivals_get_what_each_would_get_alone(name, num_arrivals):
    """Prompts that begin alike, answers that are given up, room for a few states only."""
    source, pending = random.Random(num_arrivals), []
    # Room for few states: some are evicted between the arrivals that would use them.
    model = ServedModel(MODELS[name])
    size = model.start(context_of(name)).nbytes
    limits = Limits(max_rows=6, step_tokens=23, prefix_bytes=5 * size)
    scheduler, num_checked = Scheduler(model, limits), 0
    prompts = [
        (*TEXT[first : first + 33 * n], *tail)
        for first in (0, 50)
        for n in (1, 2)
        for tail in ((), (1,), (1, 2, 3))
    ]
    for _ in range(num_arrivals):
        prompt, is_after = source.choice(prompts), source.random() < 0.3
        job, log = asked(
            scheduler, prompt, source.randint(1, NUM_TOKENS), context_of(name) if is_after else None
        )
        pending.append((job, log, prompt, is_after))
        if source.random() < 0.2:
            source.choice(pending)[0].is_cancelled = True
        for _ in range(source.randint(0, 6)):
            scheduler.step()
        if len(pending) > 20:
            run(scheduler)
            num_checked += check_all(pending, name)
            assert scheduler.prefixes.nbytes <= limits.prefix_bytes
    run(scheduler)
    num_checked += check_all(pending, name)
    assert num_checked > 0.5 * num_arrivals
    assert scheduler.counts.known_tokens > 0
    assert scheduler.prefixes.num_evicted > 0
    assert (scheduler.num_rows, len(scheduler.waiting), scheduler.state_bytes) == (0, 0, 0)


def check_all(pending, name):
    num_checked, longest = 0, {}
    for job, log, *key in sorted(pending, key=lambda each: -len(each[1].tokens())):
        found = tuple(log.tokens())
        assert longest.setdefault((*key,), found)[: len(found)] == found
        if not job.is_cancelled:
            assert log.events[-1].finish_reason == "length"
            assert len(found) == job.max_tokens
            num_checked += 1
    for (prompt, is_after), found in longest.items():
        assert is_answer(found, prompt, name, is_after)
    pending.clear()
    return num_checked


def test_a_chat_over_http_says_what_was_not_read():
    with running(text_service()) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        messages, known = [{"role": "user", "content": "What is a slot? " * 8}], []
        for _ in range(3):
            options = {"model": "text", "temperature": 0, "max_tokens": 20}
            options["extra_body"] = {"ignore_eos": True}
            answer = client.chat.completions.create(messages=messages, **options)
            known.append(answer.usage.prompt_tokens_details.cached_tokens)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            messages.append({"role": "user", "content": "And then?"})
        assert known[0] == 0 < known[1] < known[2] < answer.usage.prompt_tokens
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        assert f"ovq_known_tokens_total {float(sum(known))}" in lines
        kept = next(line for line in lines if line.startswith("ovq_prefixes "))
        assert float(kept.split()[1]) == len(server.service.engine.scheduler.prefixes) > 0


def test_states_after_a_context_go_when_it_is_deleted():
    with running(reading_service()) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        client.post("/contexts", body={"name": "book", "token_ids": DOCUMENT}, cast_to=object)
        prompt = " ".join(map(str, TEXT[:60]))
        client.completions.create(model="ids", prompt=prompt, max_tokens=1, extra_body={"context": "book"})
        prefixes = server.service.engine.scheduler.prefixes
        assert len(prefixes) == 1
        httpx.delete(f"{server.url}/v1/contexts/book")
        until(lambda: not len(prefixes))
