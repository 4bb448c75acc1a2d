"""EleutherAI's lm-evaluation-harness on OVQ models (`pip install 'ovq[harness]'`).

The harness takes transformers models as they are; nothing here computes a score. With all of its own options:

    python -m ovq.eval.harness run --model hf --model_args pretrained=runs/ovq,max_length=8192 --tasks piqa

which is its command line after the Auto classes have learned of OVQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovq.hf import OVQForCausalLM

MAX_LENGTH = 8192
"""Tokens the harness shows a model at most; longer texts lose their beginning. Models here have no bound of
their own, and the harness would take 2048."""


def evaluate_tasks(
    model: OVQForCausalLM,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 1,
    max_length: int = MAX_LENGTH,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: str | Path | None = None,
    include_defaults: bool = True,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run tasks of the harness.

    Args:
        model: Run where it is, in its dtype.
        tokenizer: The model's, of transformers.
        tasks: Names of tasks.
        batch_size: Requests at a time; scores do not depend on it.
        max_length: Tokens the model is shown at most.
        num_fewshot: Examples before each question; what the task says if not given.
        limit: Only the first so many examples of each task, for a quick look.
        include_path: Folder with tasks of one's own, as YAML.
        include_defaults: Look for tasks that are not there among the harness's own.
        metadata: For tasks that build their data, such as `max_seq_lengths` of RULER.

    Returns:
        What the harness's `simple_evaluate` returns: `results` by task, `samples`, `configs` and more.

    Raises:
        ValueError: If lm-eval is not installed, there is no such task, or no tokenizer.

    Example:
        >>> from ovq.hf import OVQConfig
        >>> evaluate_tasks(OVQForCausalLM(OVQConfig(vocab_size=8)), None, ["piqa"])
        Traceback (most recent call last):
        ValueError: tokenizer: expected one of transformers, found none
    """
    if tokenizer is None:
        raise ValueError("tokenizer: expected one of transformers, found none")
    lm_eval = _import_harness()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def known(with_defaults: bool) -> TaskManager:
        path = None if include_path is None else str(include_path)
        return TaskManager(include_path=path, include_defaults=with_defaults, metadata=metadata)

    def missing(manager: TaskManager) -> list[str]:
        return sorted(set(tasks) - set(manager.match_tasks(list(tasks))))

    # To list the thousands of tasks of the harness takes some ten seconds.
    manager = known(with_defaults=False)
    if missing(manager) and include_defaults:
        manager = known(with_defaults=True)
    if not tasks or missing(manager):
        found = ", ".join(missing(manager)) or "none"
        raise ValueError(f"tasks: expected names of tasks that the harness knows, found {found}")
    return lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
        ),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        metadata=metadata,
    )


def _import_harness() -> Any:
    """The package lm_eval, which takes seconds to import."""
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError(
            "expected the package lm-eval to be installed, found it is not: pip install 'ovq[harness]'"
        ) from error
    return lm_eval


def main() -> None:
    """The harness's own command line; importing this module has registered OVQ with the Auto classes."""
    _import_harness()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
