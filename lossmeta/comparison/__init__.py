"""What of this library helps on a task of your own: plain training against every method that applies."""

from lossmeta.comparison._compare import ComparisonResult, compare, run
from lossmeta.comparison._parts import TaskError
from lossmeta.comparison._task import OwnTask
from lossmeta.comparison._task_file import load, write_new

__all__ = ["ComparisonResult", "OwnTask", "TaskError", "compare", "load", "run", "write_new"]
