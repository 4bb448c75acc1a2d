"""Synthetic tasks: each builds its examples from a seed, so nothing has to be downloaded."""

from ovq.tasks.base import IGNORE_INDEX, SPLITS, Task, TaskBatch, example_generator
from ovq.tasks.mqar import MQARTask
from ovq.tasks.positional import PositionalRecallTask
from ovq.tasks.recall import RecallTask
from ovq.tasks.regression import RegressionTask

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (RecallTask, PositionalRecallTask, RegressionTask, MQARTask)
}
"""Every task by its name in configurations."""

__all__ = [
    "IGNORE_INDEX",
    "SPLITS",
    "TASKS",
    "MQARTask",
    "PositionalRecallTask",
    "RecallTask",
    "RegressionTask",
    "Task",
    "TaskBatch",
    "example_generator",
]
