"""What is compared: tasks, methods, and the trial of one method on one task with one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossmeta.experiments.statistics import LARGEST

# Of a series that is kept: (step, value), None where it is not finite.
Point = tuple[float, float | None]
# Seeds of one trial's streams of random numbers lie this far apart.
STREAM = 1_000_003


class Diverged(Exception):
    """Raised by a method whose training diverged: the trial is finished, and all its measures are None."""


class Failed(Exception):
    """Raised by a method that failed while the others shall go on: the trial is finished, and its message is kept."""


@dataclass(frozen=True)
class Measure:
    """One number that a trial gives.

    Attributes:
        name: the key in what a method returns, and the heading in a table.
        higher_is_better: None for a number that is shown but not compared.
        percent: whether a share is shown in percent.
        digits: decimals in a table.
        shown: whether tables have it; what only serves to choose among candidates need not be seen.
        ratio: whether tables also have how many times the (first) reference's it is.
    """

    name: str
    higher_is_better: bool | None
    percent: bool = False
    digits: int = 4
    shown: bool = True
    ratio: bool = False


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Attributes:
        name: of the table.
        prepare: called with a seed and a device, gives that seed's data. It is called once per seed, and all methods of
            the seed share what it gives: they must not change it. It raises FileNotFoundError, ImportError or
            ValueError where the data cannot be had, with a message that says what to do.
        measures: what every method measures.
        settings: of JSON's types; all that decides what a trial of this task is. A trial of other settings is trained
            anew.
    """

    name: str
    prepare: Callable[[int, torch.device], Any]
    measures: tuple[Measure, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        label: of the row.
        train: trains a model on a trial and gives every measure of the task by name, None where training diverged; it
            may give further numbers, which are kept.
        settings: of JSON's types; all that decides what ``train`` does. A trial of other settings is trained anew.
    """

    label: str
    train: Callable[[Trial], Mapping[str, float | None]]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuned:
    """A row that is, on every task, the best of several methods.

    The best has the best mean of a measure over seeds of its own; a trial that diverged counts as the worst. Among
    equals it is the first. Candidates with the same label and settings are trained once, however many rows name them.

    Attributes:
        label: of the row.
        candidates: to choose from, or a function that gives them for a task.
        by: the measure that decides, taken on held-out data and never on the test data.
        seeds: for choosing; none of them is reported.
        then: turns the best candidate into the method that is reported, where that is another one.
        beside: gives what lies beside the best candidate: it is tried too, and what is beside the one that is best
            then, until nothing new is; so that the best does not lie at an edge of what was tried.

    Example:
        >>> def plain(rate: float) -> Method:
        ...     return Method(f"plain, rate {rate:g}", train, {"rate": rate})
        >>> rates = tuple(plain(rate) for rate in (0.01, 0.1))
        >>> Tuned("plain, tuned rate", rates, by="selection error", seeds=(100, 101))
    """

    label: str
    candidates: tuple[Method, ...] | Callable[[Task], tuple[Method, ...]]
    by: str
    seeds: tuple[int, ...]
    then: Callable[[Method], Method] | None = None
    beside: Callable[[Method], tuple[Method, ...]] | None = None


@dataclass
class Trial:
    """One method, on one task, with one seed.

    Attributes:
        task: the task.
        seed: of this trial. Methods that are compared get the same ones.
        device: where to train.
        data: what ``task.prepare`` gave; is not to be changed.
        scratch: shared by the methods of one task and seed, for what several of them need. What is put there must not
            depend on which method comes first: fill it inside of :meth:`seeded`.
        progress: to be called now and then with the share that is done, in [0, 1].
        folder: for figures.
        series: by name, what :meth:`record` was told.
    """

    task: Task
    seed: int
    device: torch.device
    data: Any
    scratch: dict[Any, Any]
    progress: Callable[[float], None]
    folder: Path
    series: dict[str, list[Point]] = field(default_factory=dict)

    def record(self, name: str, step: float, value: float | None) -> None:
        """A number to be followed over the training, which is kept with the trial and drawn in its report.

        It decides nothing, and a trial without it is as good. A step that is not after the last one begins the series
        anew, so that of several trainings the last counts. A hundred points of a series are kept.

        Args:
            name: of the series, the same in all rows that are to be drawn together.
            step: of training; a finite number.
            value: what is not finite is a hole.

        Raises:
            ValueError: for a step that is no finite number.

        Example:
            >>> trial.record("validation error", 100, 0.12)
        """
        number: Any = step
        if isinstance(step, np.generic) or (isinstance(step, Tensor) and step.numel() == 1):
            number = step.item()
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= LARGEST:
            raise ValueError(f"record: step of {name!r} must be a finite number, got {step!r}")
        step = number
        known = self.series.setdefault(name, [])
        if known and step <= known[-1][0]:
            known.clear()
        known.append((step, value))

    def random_seed(self, stream: int) -> int:
        """The seed of one stream of random numbers, for a generator."""
        return self.seed + STREAM * stream

    @contextmanager
    def seeded(self, stream: int) -> Iterator[None]:
        """The global random numbers (Python, NumPy, torch) from a stream; afterwards as if nothing had been drawn."""
        with seeded(self.random_seed(stream), self.device):
            yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global random numbers from a seed, torch's on the CPU and the device; afterwards they go on as before."""
    on_cuda = device.type == "cuda"
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - others draw from NumPy's global generator
    with torch.random.fork_rng([device] if on_cuda else []):
        # Not torch.manual_seed: it would move the random numbers of every device.
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
