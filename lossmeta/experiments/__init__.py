"""Comparisons of methods on tasks, with seeds paired; knows no paper."""

from lossmeta.experiments.runner import run
from lossmeta.experiments.trial import Diverged, Failed, Measure, Method, Task, Trial, Tuned

__all__ = ["Diverged", "Failed", "Measure", "Method", "Task", "Trial", "Tuned", "run"]
