"""Trains every method on every task with every seed."""

from __future__ import annotations

import errno
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lossmeta.experiments import memory, report, run_folder
from lossmeta.experiments.progress import Progress
from lossmeta.experiments.records import FolderError, Header, Record, Run, TaskHeader, canonical
from lossmeta.experiments.statistics import LARGEST
from lossmeta.experiments.trial import Diverged, Failed, Method, Point, Task, Trial, Tuned, seeded

Reported = Mapping[str, Mapping[str, Mapping[str, str]]]
# Of a series that are kept.
POINTS = 100
# What a method may meet when it writes a figure, and what is no fault of it.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class TrialError(RuntimeError):
    """A method failed; says on which task and with which seed. What was finished before is in the folder."""


class _Unavailable(Exception):
    """The data of a task cannot be had."""


def run(
    recipe: str,
    tasks: Sequence[Task],
    methods: Sequence[Method | Tuned],
    *,
    seeds: int | Sequence[int],
    device: str,
    folder: Path,
    settings: Mapping[str, Any],
    reference: str | Sequence[str] | None = None,
    about: str = "",
    legend: str = "",
    reported: Reported | None = None,
    threads: int | None = None,
    corrected: Sequence[str] = (),
) -> int:
    """Trains what is not yet in the folder, shows the tables and returns the exit status.

    Every finished trial is written at once. A run that was stopped goes on where it was; more seeds, tasks and methods
    may be asked for than before.

    Args:
        recipe: its name, for messages and for the folder.
        tasks: one table each. Those whose data cannot be had are left out and named.
        methods: one row each.
        seeds: to be reported; a number stands for 0, 1, ...
        device: as a user writes it, ``"cpu"`` or ``"cuda"``.
        folder: of the results.
        settings: of the run, of JSON's types. A folder with others is refused.
        reference: label of the row that the others are compared with; several give several comparisons.
        about: one line.
        legend: below the tables: what the rows are.
        reported: columns beside ours, what a paper reports: heading, task, label of the row, text.
        threads: on the CPU, while this runs; None leaves them as they are. 1 is fastest for small models.
        corrected: labels of rows that compete: p is also corrected for their number, and the best of them is
            recommended where it is ahead of the best reference, else none.

    Returns:
        0; 1 where the results could not be written; 2 for what the user must change; 130 after Ctrl-C.

    Raises:
        ValueError: where tasks and methods do not fit together.
        TrialError: where a method fails other than by diverging.

    Example:
        >>> error = Measure("error", higher_is_better=False)
        >>> task = Task("mean of 100", lambda seed, device: torch.randn(100, device=device), (error,))
        >>> mean = Method("mean", lambda trial: {"error": trial.data.mean().abs().item()})
        >>> median = Method("median", lambda trial: {"error": trial.data.median().abs().item()})
        >>> options = {"seeds": 10, "device": "cpu", "folder": Path("runs/mean"), "settings": {}}
        >>> status = run("mean", [task], [mean, median], reference="mean", **options)
    """
    seeds = tuple(range(seeds) if isinstance(seeds, int) else seeds)
    references = (reference,) if isinstance(reference, str) else tuple(reference or ())
    _check(tasks, methods, references, corrected)

    def fail(message: str, status: int) -> int:
        print(f"lossmeta {recipe}: {message}", file=sys.stderr)
        return status

    try:
        where = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        return fail(f"--device {device} cannot be used: {error}", 2)
    tuning_seeds = {seed for row in methods if isinstance(row, Tuned) for seed in row.seeds}
    if shared := sorted(tuning_seeds.intersection(seeds)):
        return fail(f"--seeds must leave out {shared[0]}, which serves to choose settings", 2)
    folder = Path(folder)
    try:
        with _threads(threads if where.type == "cpu" else None):
            header = Header(
                recipe=recipe,
                about=about,
                settings=_plain(settings),
                tasks=tuple(TaskHeader(task.name, task.measures) for task in tasks),
                rows=tuple(row.label for row in methods),
                references=references,
                seeds=seeds,
                legend=legend,
                reported=_plain(reported or {}),
                environment=run_folder.environment(where.type, torch.get_num_threads()),
                corrected=tuple(corrected),
            )
            with run_folder.opened(folder, header) as writer:
                session = _Session(recipe, tasks, methods, seeds, where, writer)
                session.train()
                if writer.trials:
                    _show(Run(folder, writer.header, writer.trials), seeds)
    except KeyboardInterrupt:
        return fail(f"stopped; {_on_disk(folder)}", 130)
    except FolderError as error:
        return fail(str(error), 2)
    except BrokenPipeError:
        raise  # whoever read the tables has gone
    except OSError as error:
        return fail(f"the results could not be written ({error}); {_on_disk(folder)}", 1)
    for reason, names in session.left_out.items():
        fail(f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} left out. {reason}", 2)
    return 2 if sum(map(len, session.left_out.values())) == len(tasks) else 0


@dataclass
class _Data:
    """What the methods of one task and seed share; the data is made when the first of them needs it."""

    task: Task
    seed: int
    device: torch.device
    scratch: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def prepared(self) -> Any:
        try:
            with seeded(self.seed, self.device):
                return self.task.prepare(self.seed, self.device)
        except (OSError, ImportError, ValueError) as error:
            raise _Unavailable(str(error)) from error
        except Exception as error:
            raise TrialError(_failure(f"{self.task.name}, data of seed {self.seed}", error)) from error


class _Session:
    """Trains what is missing in a folder."""

    def __init__(
        self,
        recipe: str,
        tasks: Sequence[Task],
        methods: Sequence[Method | Tuned],
        seeds: Sequence[int],
        device: torch.device,
        writer: run_folder.Writer,
    ) -> None:
        self.tasks = tasks
        self.rows = methods
        self.seeds = seeds
        self.device = device
        self.writer = writer
        self.left_out: dict[str, list[str]] = {}
        self._trained = {record.identity: record for record in writer.trials}
        self._latest = {(r.role, r.task, r.method, r.seed): r for r in writer.trials}
        self._tried: dict[tuple[str, str], tuple[Method, ...]] = {}
        self.progress = Progress(recipe, sum(map(self._count, tasks)))

    def train(self) -> None:
        with self.progress:
            for task in self.tasks:
                others = self.progress.total - self.progress.done - self._count(task)
                try:
                    self._train_task(task)
                except _Unavailable as error:
                    self.left_out.setdefault(str(error), []).append(task.name)
                    self.progress.adds(others - (self.progress.total - self.progress.done))

    def _count(self, task: Task) -> int:
        return len(self.rows) * len(self.seeds) + sum(map(len, self._tuning(task).values()))

    def _tuning(self, task: Task) -> dict[int, dict[str, Method]]:
        """What is to be trained before the rows: seed, label, candidate."""
        wanted: dict[int, dict[str, Method]] = {}
        for row in self.rows:
            if isinstance(row, Tuned):
                for seed in row.seeds:
                    wanted.setdefault(seed, {}).update((m.label, m) for m in _candidates(row, task))
        return wanted

    def _train_task(self, task: Task) -> None:
        for seed, candidates in self._tuning(task).items():
            data = _Data(task, seed, self.device)
            for method in candidates.values():
                self._trial(data, method, method.label, "tuning")
        for row in self.rows:
            if isinstance(row, Tuned) and row.beside:
                self._try_beside(row, row.beside, task)
        chosen = {row.label: self._chosen(row, task) for row in self.rows}
        for seed in self.seeds:
            data = _Data(task, seed, self.device)
            for label, method in chosen.items():
                self._trial(data, method, label, "report")

    def _try_beside(self, row: Tuned, beside: Callable[[Method], tuple[Method, ...]], task: Task) -> None:
        tried = {method.label: method for method in _candidates(row, task)}
        while True:
            best = self._best(row, task, tried.values())
            new = {method.label: method for method in beside(best) if method.label not in tried}
            if not new:
                break
            self.progress.adds(len(new) * len(row.seeds))
            for seed in row.seeds:
                data = _Data(task, seed, self.device)
                for method in new.values():
                    self._trial(data, method, method.label, "tuning")
            tried.update(new)
        self._tried[task.name, row.label] = tuple(tried.values())

    def _chosen(self, row: Method | Tuned, task: Task) -> Method:
        if isinstance(row, Method):
            return row
        best = self._best(row, task, self._tried.get((task.name, row.label)) or _candidates(row, task))
        return row.then(best) if row.then else best

    def _best(self, row: Tuned, task: Task, candidates: Iterable[Method]) -> Method:
        higher = next(m.higher_is_better for m in task.measures if m.name == row.by)
        sign = -1 if higher else 1

        def badness(method: Method) -> float:
            trials = [self._latest["tuning", task.name, method.label, seed] for seed in row.seeds]
            values = [trial.measures[row.by] for trial in trials]
            return math.inf if None in values else sign * math.fsum(v for v in values if v is not None)

        return min(candidates, key=badness)

    def _trial(self, data: _Data, method: Method, label: str, role: str) -> None:
        """Puts the trial into the folder unless it is there."""
        self.progress.begins(f"{data.task.name}: {label}, seed {data.seed}")
        record = Record(
            role=role,
            task=data.task.name,
            method=label,
            seed=data.seed,
            settings=_plain({"task": data.task.settings, "method": method.settings}),
            measures={},
            seconds=0.0,
            peak_memory=None,
            candidate=None if method.label == label else method.label,
        )
        key = role, record.task, label, record.seed
        latest = self._latest.get(key)
        if latest is None or latest.identity != record.identity:
            same = self._trained.get(record.identity) or self._train(data, method, record)
            finished = replace(
                record,
                measures=same.measures,
                seconds=same.seconds,
                peak_memory=same.peak_memory,
                series=same.series,
                failure=same.failure,
            )
            self.writer.append(finished)
            self._trained[finished.identity] = self._latest[key] = finished
        self.progress.ends()

    def _train(self, data: _Data, method: Method, record: Record) -> Record:
        trial = Trial(
            data.task,
            data.seed,
            self.device,
            data.prepared,
            data.scratch,
            self.progress.share,
            self.writer.path,
        )
        where = f"{record.task}, {method.label}, seed {record.seed}"
        memory.reset_peak(self.device)
        start, failure = self._now(), None
        try:
            with trial.seeded(0):
                numbers = method.train(trial)
        except (Diverged, Failed) as error:
            numbers = dict.fromkeys(measure.name for measure in data.task.measures)
            failure = _line(str(error)) if isinstance(error, Failed) else None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK:
                raise
            raise TrialError(_failure(where, error)) from error
        seconds = self._now() - start
        for measure in data.task.measures:
            if measure.name not in numbers:
                raise TrialError(f"{where}: {measure.name} must be measured, got {', '.join(numbers)}")
        return replace(
            record,
            measures={name: _number(value) for name, value in numbers.items()},
            seconds=seconds,
            peak_memory=memory.peak(self.device),
            series={name: _kept(points) for name, points in trial.series.items()},
            failure=failure,
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _check(
    tasks: Sequence[Task],
    methods: Sequence[Method | Tuned],
    references: Sequence[str],
    corrected: Sequence[str],
) -> None:
    labels = [row.label for row in methods]
    for what, names in (("tasks", [task.name for task in tasks]), ("methods", labels)):
        if len(set(names)) < len(names):
            raise ValueError(f"run: {what} must have different names, got {', '.join(names)}")
    for what, chosen in (("reference", references), ("corrected", corrected)):
        for label in chosen:
            if label not in labels:
                raise ValueError(f"run: {what} must be one of {', '.join(labels)}, got {label}")
    for task in tasks:
        directions = {measure.name: measure.higher_is_better for measure in task.measures}
        settings: dict[str, str] = {}
        for row in methods:
            if isinstance(row, Tuned) and directions.get(row.by) is None:
                raise ValueError(
                    f"run: {row.label}: by must be a compared measure of {task.name}, got {row.by}"
                )
            for method in _candidates(row, task) if isinstance(row, Tuned) else (row,):
                text = canonical(method.settings)
                if settings.setdefault(method.label, text) != text:
                    raise ValueError(
                        f"run: methods called {method.label} must have the same settings, got {text} and "
                        f"{settings[method.label]}"
                    )


def _candidates(row: Tuned, task: Task) -> tuple[Method, ...]:
    return row.candidates(task) if callable(row.candidates) else row.candidates


def _failure(where: str, error: Exception) -> str:
    return f"{where}: {type(error).__name__}: {error}"


def _line(message: str) -> str:
    """In one line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in message).split()) or "without a message"


def _number(value: float | None) -> float | None:
    """JSON has neither infinity nor NaN: what is not finite, or nearly so, has diverged."""
    if value is None or not abs(value) <= LARGEST:
        return None
    return value if isinstance(value, int) else float(value)


def _kept(points: Sequence[Point]) -> list[Point]:
    """At most POINTS of them: all, every second, every fourth, as in trials of other lengths; and the last."""
    if len(points) > POINTS:
        stride = 2
        while len(points[::stride]) >= POINTS:
            stride *= 2
        points = [*points[:-1:stride], points[-1]]
    return [(step, _number(value)) for step, value in points]


def _plain(settings: Mapping[str, Any]) -> Any:
    """As it comes back from a file."""
    return json.loads(canonical(settings))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _on_disk(folder: Path) -> str:
    count = run_folder.finished(folder)
    if not count:
        return "no trial was finished, nothing is kept"
    trials = f"{count} trial{'s are' if count > 1 else ' is'}"
    return f"{trials} in {folder / run_folder.TRIALS}, the same command goes on from there"


def _show(finished: Run, seeds: Sequence[int]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    report.show(finished, console, seeds)
    report.write(finished, seeds)
    console.print(f"Results and figures: {finished.path}", markup=False, soft_wrap=True)
