"""Putting a question to a trained model, by the measure in `ovq.eval` that it is for."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ovq.eval.accuracy import evaluate
from ovq.eval.language import evaluate_language
from ovq.eval.needle import evaluate_needle
from ovq.eval.reading import token_bytes
from ovq.hf import OVQForCausalLM
from ovq.plots.language import octave_losses
from ovq.research.reproduce.questions import Evaluation, LanguageEvaluation, NeedleEvaluation, Question
from ovq.runtime.progress import Reporter
from ovq.text import Corpus, load_corpus
from ovq.text.haystack import NeedleBuilder, essay_texts

_LANGUAGE_FIELDS = (
    *("mixer", "num_slots", "length", "loss", "bits_per_byte", "state_bytes"),
    *("sawtooth", "sawtooth_error"),
)

# A model keeps its texts while it is asked at one length and depth after the other.
_texts = functools.lru_cache(maxsize=4)(essay_texts)


def num_parts(question: Question) -> int:
    """In how many steps the answer to a question comes, for progress reports."""
    return question.num_examples * (1 if isinstance(question, Evaluation) else question.num_tokens)


def check_text(question: Question) -> None:
    """See to it that there is text enough for a question, as far as that can be known without a model.

    Raises:
        ValueError: If its corpus cannot be read, or too little of it is held out for tests.
    """
    match question:
        case LanguageEvaluation():
            _windows(question)
        case NeedleEvaluation():
            _texts(question.source, "test", question.length)


def _windows(question: LanguageEvaluation, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """The documents that the windows of a question are cut from.

    Raises:
        ValueError: If they have fewer.
    """
    source, length = question.source, question.length
    corpus = load_corpus(source, "test", tokenizer=tokenizer)
    # The end of a text stands before each document, and windows do not overlap.
    found = int(((corpus.num_tokens + 1) // length).sum())
    if found < question.num_examples:
        raise ValueError(
            f"{source.dataset}: expected {question.num_examples} windows of {length} tokens in the documents "
            f"held out for tests, found {found}; hold out more than {source.held_out:g} of the corpus "
            "(held_out)"
        )
    return corpus


@functools.singledispatch
def ask(question: Question, model: OVQForCausalLM, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Put a question to a model.

    Args:
        question: What to ask.
        model: Run where it is, in its dtype.
        folder: Where it was loaded from, with its tokenizer if it reads text.
        reporter: Where to show progress, in `num_parts` steps.

    Returns:
        The answer, as JSON can hold it.

    Raises:
        ValueError: If the model cannot be asked.
    """
    raise TypeError(f"expected a question that can be asked, found {type(question).__name__}")


@ask.register
def _(question: Evaluation, model: OVQForCausalLM, folder: Path, reporter: Reporter) -> dict[str, Any]:
    [row] = evaluate(
        model,
        question.task,
        lengths=[question.num_tokens],
        num_slots=_sizes(question),
        num_examples=question.num_examples,
        seed=question.seed,
        reporter=reporter,
    )
    return dataclasses.asdict(row)


@ask.register
def _(
    question: LanguageEvaluation, model: OVQForCausalLM, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    corpus = _windows(question, tokenizer)
    [row] = evaluate_language(
        model,
        corpus,
        lengths=[question.length],
        num_slots=_sizes(question),
        num_windows=question.num_examples,
        block_size=question.block_size,
        bytes_of_tokens=token_bytes(tokenizer),
        first_token=corpus.end_of_text,
        reporter=reporter,
    )
    # Without the losses of each window by itself, which are many.
    return {
        **{name: getattr(row, name) for name in _LANGUAGE_FIELDS},
        "position_losses": {str(last): loss for _, last, loss in octave_losses(row)},
    }


@ask.register
def _(question: NeedleEvaluation, model: OVQForCausalLM, folder: Path, reporter: Reporter) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = _texts(question.source, "test", question.length)
    [row] = evaluate_needle(
        model,
        NeedleBuilder(tokenizer, haystack="essay", value=question.value, texts=texts),
        lengths=[question.length],
        depths=[question.depth],
        num_slots=_sizes(question),
        num_examples=question.num_examples,
        seed=question.seed,
        reporter=reporter,
    )
    return {name: value for name, value in dataclasses.asdict(row).items() if name != "name"}


def _sizes(question: Question) -> list[int]:
    """The size of the dictionary as the measures take it."""
    return [] if question.num_slots is None else [question.num_slots]
