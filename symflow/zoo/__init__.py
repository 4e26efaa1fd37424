"""Zoos: many networks of one architecture, trained at once on one task."""

from symflow.zoo.settings import batch_order
from symflow.zoo.store import Zoo
from symflow.zoo.tasks import Task, breast_cancer, digits, idx, mnist, task
from symflow.zoo.train import train

__all__ = [
    "Task",
    "Zoo",
    "batch_order",
    "breast_cancer",
    "digits",
    "idx",
    "mnist",
    "task",
    "train",
]
