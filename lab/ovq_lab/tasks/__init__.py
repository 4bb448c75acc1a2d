"""Synthetic tasks, whose examples are generated from a seed, and language modelling on real text."""

from ovq_lab.tasks.base import IGNORE_INDEX, SPLITS, Task, TaskBatch, example_generator
from ovq_lab.tasks.mqar import MQARTask
from ovq_lab.tasks.positional import PositionalRecallTask
from ovq_lab.tasks.recall import RecallTask
from ovq_lab.tasks.registry import TASKS, register_task, task_class
from ovq_lab.tasks.regression import RegressionTask
from ovq_lab.tasks.text import TextTask

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
