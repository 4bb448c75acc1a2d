"""The tasks by name."""

from __future__ import annotations

from ovq.plugins import find, register
from ovq_lab.tasks.base import Task
from ovq_lab.tasks.mqar import MQARTask
from ovq_lab.tasks.positional import PositionalRecallTask
from ovq_lab.tasks.recall import RecallTask
from ovq_lab.tasks.regression import RegressionTask
from ovq_lab.tasks.text import TextTask

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (RecallTask, PositionalRecallTask, RegressionTask, MQARTask)
}
"""Every synthetic task by its name in configurations."""


def task_class(name: str) -> type[Task] | type[TextTask]:
    """The class of a built-in task, a registered one, or one from an installed package's entry point.

    Raises:
        ValueError: If the name is unknown, or the package's entry point is no task.

    Example:
        >>> task_class("recall").__name__
        'RecallTask'
    """
    if name == TextTask.name:
        return TextTask
    return find(TASKS, name, base=Task, what="task")


def register_task(cls: type[Task]) -> None:
    """Register a task under its name in configurations, for this process.

    A package can do the same by an entry point of the group `ovq.tasks`.

    Args:
        cls: The class; its `name` must be an identifier.

    Raises:
        ValueError: If the name is taken or no identifier, or the class is no `Task`.

    Example:
        >>> register_task(RecallTask)  # again, which changes nothing
    """
    name = getattr(cls, "name", "")
    if name == TextTask.name:
        raise ValueError(f"task {name!r}: expected a name that is free, found {TextTask.__qualname__}")
    register(TASKS, str(name), cls, base=Task, what="task")
