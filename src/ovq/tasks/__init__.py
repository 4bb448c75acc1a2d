"""Synthetic tasks, which build their examples from a seed, and language modelling on real text."""

from ovq.tasks.base import IGNORE_INDEX, SPLITS, Task, TaskBatch, example_generator
from ovq.tasks.mqar import MQARTask
from ovq.tasks.positional import PositionalRecallTask
from ovq.tasks.recall import RecallTask
from ovq.tasks.registry import TASKS, register_task, task_class
from ovq.tasks.regression import RegressionTask
from ovq.tasks.text import TextTask

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
    "TextTask",
    "example_generator",
    "register_task",
    "task_class",
]
