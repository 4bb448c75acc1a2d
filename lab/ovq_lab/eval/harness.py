"""EleutherAI's lm-evaluation-harness on OVQ models and converted ones (`pip install './lab[harness]'`).

The harness runs transformers models without changes; nothing here computes a score. Its own command line,
`lm_eval`, works too, with `trust_remote_code=True` among its `--model_args`, but would load a converted model
with full attention: `ovq eval harness` and `evaluate_tasks` keep its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ovq.runtime.verbosity import is_quiet

MAX_LENGTH = 8192
"""Default maximum length in tokens; longer texts lose their beginning. Models here have no limit of their
own, and without this the harness would take 2048."""


def evaluate_tasks(
    model: PreTrainedModel,
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
        model: A model of this library, a converted one, or any causal language model of transformers;
            evaluated on its device and in its dtype.
        tokenizer: The model's, one of transformers.
        tasks: Names of tasks.
        batch_size: Requests at a time; scores do not depend on it.
        max_length: Maximum length in tokens.
        num_fewshot: Examples before each question; None: the task's default.
        limit: Use only this many examples of each task, for a quick look.
        include_path: A folder with your own tasks, as YAML.
        include_defaults: Also search the harness's own tasks for those that are not in this folder.
        metadata: For tasks that build their data, for example `max_seq_lengths` of RULER.

    Returns:
        The result of the harness's `simple_evaluate`: `results` by task, `samples`, `configs` and more.

    Raises:
        ValueError: If lm-eval is not installed, a task or `include_path` does not exist, or there is no
            tokenizer.

    Example:
        >>> from ovq.hf import OVQConfig, OVQForCausalLM
        >>> evaluate_tasks(OVQForCausalLM(OVQConfig(vocab_size=8)), None, ["piqa"])
        Traceback (most recent call last):
        ValueError: tokenizer: expected one of transformers, found none
    """
    if tokenizer is None:
        raise ValueError("tokenizer: expected one of transformers, found none")
    if include_path is not None and not Path(include_path).is_dir():
        # The harness would silently continue without the tasks in it.
        raise ValueError(f"include_path: expected a folder with tasks, found none at {include_path}")
    try:
        # Imported here, as it takes seconds.
        import lm_eval
    except ImportError as error:
        raise ValueError(
            "expected the package lm-eval to be installed, found it is not: pip install './lab[harness]'"
        ) from error
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def known(with_defaults: bool) -> TaskManager:
        path = None if include_path is None else str(include_path)
        return TaskManager(include_path=path, include_defaults=with_defaults, metadata=metadata)

    def missing(manager: TaskManager) -> list[str]:
        return sorted(set(tasks) - set(manager.match_tasks(list(tasks))))

    # Listing the thousands of tasks of the harness takes about ten seconds.
    manager = known(with_defaults=False)
    if missing(manager) and include_defaults:
        manager = known(with_defaults=True)
    if not tasks or missing(manager):
        found = ", ".join(missing(manager)) or "none"
        raise ValueError(f"tasks: expected names of tasks that the harness knows, found {found}")
    harness = HFLM(
        pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
    )
    for name in _WITH_BARS if is_quiet() else ():
        setattr(harness, name, _without_bars(getattr(harness, name)))
    return lm_eval.simple_evaluate(
        model=harness,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        metadata=metadata,
    )


# Methods of the harness that show progress bars. They set `disable`, so that TQDM_DISABLE does nothing.
_WITH_BARS = ("loglikelihood", "loglikelihood_rolling", "_loglikelihood_tokens", "generate_until")


def _without_bars(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: method(*args, **options | {"disable_tqdm": True})
