"""Compares methods on the tasks of the AdaLFL paper, with seeds paired: the same data, initial weights and batches."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import lossmeta
from lossmeta import data
from lossmeta.adalfl import plot_loss
from lossmeta.recipes._methods import Method, Trials
from lossmeta.recipes._paper import reported
from lossmeta.recipes._problems import Problem, problems, split
from lossmeta.recipes._results import replace_file, write_json

PLAIN = Method("plain, base rate", "baseline")
TUNED = Method("plain, tuned rate", tuned=True)
WITH_VALIDATION = Method(
    "plain, tuned rate, training + validation data", tuned=True, parts=("train", "validation")
)


def standard(offline: str = "offline", online: str = "adalfl") -> tuple[Method, ...]:
    """The rows of every comparison; the paper's columns for its own two may be another table's."""
    return (
        PLAIN,
        TUNED,
        WITH_VALIDATION,
        Method("offline loss (ML³)", offline, loss="network", inner_steps=1),
        Method("offline loss, slope of the task loss", loss="network", inner_steps=1, normalize=True),
        Method("AdaLFL, 1e-5", online, loss="network", inner_steps=1, online=1e-5),
        Method("AdaLFL, 1e-4", loss="network", inner_steps=1, online=1e-4),
        Method("AdaLFL, 1e-3", loss="network", inner_steps=1, online=1e-3),
    )


# The rate of TUNED is chosen by the selection error of these seeds, which no comparison reports.
# Where a data set has no test set of its own, they test on other rows, so that the tuned rate has seen some of the
# others' test rows: to the advantage of plain training.
TUNING_SEEDS = range(10_000, 10_003)
OFFLINE_STEPS = 2500
LEGEND = """\
Test error: mean squared error, or share of wrong classes; mean ± sd over seeds. Base rate: the paper's learning
rate; in small regressions ten times that, for a tenth of the width. Difference, better, p: to "{reference}", paired
by seed, negative is better, paired t-test; with validation: the same to plain training on training and validation
data, as a loss that learns from validation batches has seen those too. Slope: how many times steeper the loss is
than the task loss when training ends, that is how much of a difference is only a learning rate. Small sizes train
smaller models for fewer steps than the paper: compare within a table."""
SECONDS_LEGEND = "Seconds: all that training needed, learning the loss beforehand included."

Trial = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A table of the paper.

    Attributes:
        name: for ``lossmeta run``.
        about: one line for ``lossmeta list``.
        groups: of tasks, see ``_problems``.
        methods: the rows.
        tasks: names of the tasks if not all of the groups' that there are at a size.
        seconds: whether the table is about time rather than error.
    """

    name: str
    about: str
    groups: tuple[str, ...]
    methods: tuple[Method, ...]
    tasks: tuple[str, ...] | None = None
    seconds: bool = False

    def problems(self, size: str) -> list[Problem]:
        found = problems(size, *self.groups)
        return [p for p in found if p.name in (self.tasks or ())] or found

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        """Trains every method with every seed, shows and keeps the results; returns the exit status.

        Every finished trial is written at once; a run into the same folder goes on from there.
        """
        try:
            where = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            return self._fail(f"--device {device} cannot be used: {error}", 2)
        threads = torch.get_num_threads()
        if size == "small" and where.type == "cpu":
            torch.set_num_threads(1)  # the models are small: a second thread would cost more than it does
        try:
            results = Results(output / "results.json", self._settings(size, where, steps))
            return self._compare(self.problems(size), size, seeds, where, results, steps)
        except KeyboardInterrupt:
            return self._fail(
                f"stopped; finished trials are in {output / 'results.json'}, run again to go on", 130
            )
        except SettingsError as error:
            return self._fail(str(error), 2)
        except OSError as error:
            return self._fail(f"the results could not be written: {error}", 1)
        finally:
            torch.set_num_threads(threads)

    def _settings(self, size: str, device: torch.device, steps: int | None) -> dict[str, Any]:
        return {"recipe": self.name, "size": size, "device": device.type, "steps": steps}

    def _compare(
        self,
        tasks: list[Problem],
        size: str,
        seeds: int,
        device: torch.device,
        results: Results,
        steps: int | None,
    ) -> int:
        console = Console()
        if not console.is_terminal:
            console.width = 160  # a file has no width to keep to
        missing: dict[str, str] = {}
        with Progress(console=console, transient=True) as bar:
            shown = bar.add_task("", total=len(tasks) * len(self.methods) * seeds)
            for problem in tasks:
                if steps is not None:
                    problem = replace(problem, steps=steps)
                offline_steps = OFFLINE_STEPS if steps is None else steps
                try:
                    dataset = data.load(problem.data)
                except (data.MissingDataError, ValueError) as error:  # absent, or not what it should be
                    missing[problem.name] = str(error)
                    continue
                cell = Cell(problem, dataset, device, offline_steps, results)
                bar.update(shown, description=f"{problem.name}: tuning the rate")
                rate = cell.tuned_rate() if any(m.tuned for m in self.methods) else problem.rate
                for seed in range(seeds):
                    for method in self.methods:
                        bar.update(shown, description=f"{problem.name}: {method.label}, seed {seed}")
                        cell.trial(method, seed, rate if method.tuned else problem.rate)
                        bar.advance(shown)
        done = [problem for problem in tasks if problem.name not in missing]
        for problem in done:
            rows = {m.label: results.of(problem.name, m.label, range(seeds)) for m in self.methods}
            console.print(self._table(problem.name, rows, seeds))
        if done:
            legend = SECONDS_LEGEND if self.seconds else LEGEND.format(reference=self._reference.label)
            console.print(legend, highlight=False)
            console.print(f"Results and figures: {results.path.parent}", soft_wrap=True)
        for name, why in missing.items():
            self._fail(f"{name} was left out. {why}", 2)
        return 0 if done else 2

    @property
    def _reference(self) -> Method:
        """What the others are compared with: plain training at its tuned rate, or the first row."""
        return TUNED if TUNED in self.methods else self.methods[0]

    def _table(self, task: str, rows: dict[str, list[Trial]], seeds: int) -> Table:
        table = Table(title=f"{task}, {seeds} seed{'s' if seeds > 1 else ''}")
        for heading, justify in (("method", "left"), ("seconds" if self.seconds else "test error", "right")):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        table.add_column("paper, hours" if self.seconds else "paper", justify="right")
        reference = rows[self._reference.label]
        wider = rows.get(WITH_VALIDATION.label)
        headings = ["difference", "better", "p", *(["with validation"] if wider else []), "slope", "rate"]
        for heading in ["times the first"] if self.seconds else headings:
            table.add_column(heading, justify="right")
        for method in self.methods:
            trials = rows[method.label]
            paper = reported(method.column, task)
            if self.seconds:
                spent = [[t["seconds"] + t["offline_seconds"] for t in ts] for ts in (trials, reference)]
                ratio = statistics.fmean(spent[0]) / statistics.fmean(spent[1])
                table.add_row(method.label, spread(spent[0], ".2f"), paper, f"{ratio:.2f}")
                continue
            cells = ["", "", ""] if trials is reference else list(compared(trials, reference))
            if wider:
                difference, _, p = ("", "", "") if trials is wider else compared(trials, wider)
                cells.append(f"{difference.partition(' ')[0]} (p {p})" if p else difference)
            slopes = [t["slope_ratio"] for t in trials if t["slope_ratio"] is not None]
            table.add_row(
                method.label,
                spread([t["test"] for t in trials]),
                paper,
                *cells,
                f"{statistics.median(slopes):.2f}" if slopes else "",
                f"{statistics.median(t['final_rate'] for t in trials):.3g}",
            )
        return table

    def _fail(self, message: str, status: int) -> int:
        print(f"lossmeta run {self.name}: {message}", file=sys.stderr)
        return status


@dataclass
class Cell:
    """The trials of one task."""

    problem: Problem
    dataset: data.Dataset
    device: torch.device
    offline_steps: int
    results: Results
    _trials: Trials | None = None

    def trial(self, method: Method, seed: int, rate: float, label: str | None = None) -> Trial:
        key = {"task": self.problem.name, "method": label or method.label, "seed": seed}
        settings = {
            **{name: value for name, value in asdict(method).items() if name not in ("label", "column")},
            "at": rate,
            "batch": self.problem.batch,
            "steps": self.problem.steps,
            "offline_steps": self.offline_steps,
            "versions": [lossmeta.__version__, torch.__version__],
        }

        def compute() -> Trial:
            if self._trials is None or self._trials.seed != seed:
                splits = split(self.dataset, seed, self.device, self.problem.augment)
                self._trials = Trials(self.problem, splits, seed, self.device, self.offline_steps)
            trial = self._trials.run(method, rate)
            if seed == 0:
                self._plot(method)
            return trial

        return self.results.get(key, settings, compute)

    def _plot(self, method: Method) -> None:
        """Draws how the loss changed (Figures 8 to 17), where matplotlib is installed."""
        assert self._trials is not None
        if method.loss is None or not self._trials.history or find_spec("matplotlib") is None:
            return
        classes = self.dataset.classes
        figure = plot_loss(
            self._trials.history,
            self._trials.loss(method),  # type: ignore[arg-type]
            num_classes=classes if method.loss == "residual" else None,
            predictions=(0.0, 1.0) if classes is None else None,
        )
        name = "-".join(re.findall(r"[\w.]+", f"{self.problem.name} {method.label}".lower()))
        replace_file(self.results.path.parent / f"{name}.png", lambda path: figure.savefig(path, dpi=150))

    def tuned_rate(self) -> float:
        """The rate of plain training with the lowest mean selection error over the tuning seeds."""

        def error(rate: float) -> float:
            trials = [self.trial(PLAIN, seed, rate, f"tuning, rate {rate:g}") for seed in TUNING_SEEDS]
            return statistics.fmean(math.inf if t["selection"] is None else t["selection"] for t in trials)

        return min(self.problem.rates, key=error)


class SettingsError(ValueError):
    """The folder holds results of another kind."""


class Results:
    """Trials on disk; each is written as soon as it is finished, and never trained twice."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.report: dict[str, Any] = {"settings": settings, "versions": lossmeta.info(), "results": []}
        if path.exists():
            try:
                earlier = json.loads(path.read_text(encoding="utf-8"))
                kept, results = earlier["settings"], list(earlier["results"])
            except (ValueError, KeyError, TypeError) as error:
                raise SettingsError(
                    f"{path} must hold results of a recipe, got {type(error).__name__}: {error}; "
                    "choose another --output or remove it"
                ) from error
            if kept != settings:
                raise SettingsError(
                    f"{path} holds results of {kept}, expected {settings}; choose another --output or remove it"
                )
            self.report["results"] = results

    def get(self, key: dict[str, Any], settings: dict[str, Any], compute: Callable[[], Trial]) -> Trial:
        """The trial of these settings; one of others is trained anew and replaced."""
        settings = json.loads(json.dumps(settings))
        results = self.report["results"]
        matching = [i for i, t in enumerate(results) if all(t.get(name) == v for name, v in key.items())]
        if matching and results[matching[0]].get("settings") == settings:
            return results[matching[0]]
        trial = {**key, **compute(), "settings": settings}
        if matching:
            results[matching[0]] = trial
        else:
            results.append(trial)
        write_json(self.path, self.report)
        return trial

    def of(self, task: str, method: str, seeds: Iterable[int]) -> list[Trial]:
        """The trials of a method, in the order of the seeds."""
        found = {t["seed"]: t for t in self.report["results"] if (t["task"], t["method"]) == (task, method)}
        return [found[seed] for seed in seeds]


def spread(values: list[float | None], digits: str = ".4f") -> str:
    """Mean ± sd of what is finite, and how much is not."""
    finite = [v for v in values if v is not None]
    text = "diverged"
    if finite:
        text = f"{statistics.fmean(finite):{digits}}"
        if len(finite) > 1:
            text += f" ± {statistics.stdev(finite):{digits}}"
        if len(finite) < len(values):
            text += f", {len(values) - len(finite)} diverged"
    return text


def compared(trials: list[Trial], reference: list[Trial]) -> tuple[str, str, str]:
    """Difference, in how many seeds it is an improvement, and p of the paired t-test."""
    errors = [[math.inf if t["test"] is None else t["test"] for t in ts] for ts in (trials, reference)]
    wins = f"{sum(a < b for a, b in zip(*errors, strict=True))}/{len(trials)}"
    differences = [a - b for a, b in zip(*errors, strict=True)]
    if not all(map(math.isfinite, differences)):
        return "", wins, ""
    p = ""
    if len(differences) > 1 and statistics.stdev(differences):
        from scipy.stats import ttest_1samp

        p = f"{ttest_1samp(differences, 0).pvalue:.2g}"
    sign = "+" if statistics.fmean(differences) > 0 else ""
    return sign + spread(differences), wins, p  # type: ignore[arg-type]
