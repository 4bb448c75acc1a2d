"""Synthetic tasks: each builds its examples from a seed, so nothing has to be downloaded."""

from ovq.tasks.base import IGNORE_INDEX, SPLITS, Task, TaskBatch, example_generator
from ovq.tasks.recall import RecallTask

TASKS: dict[str, type[Task]] = {RecallTask.name: RecallTask}
"""Every task by its name in configurations."""

__all__ = ["IGNORE_INDEX", "SPLITS", "TASKS", "RecallTask", "Task", "TaskBatch", "example_generator"]
