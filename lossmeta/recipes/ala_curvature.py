"""Figure 4 of the ALA paper: how curved the loss is around a model in training, under a fixed and a learned loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch.nn.functional as F
from torch import Tensor

from lossmeta import experiments, plot
from lossmeta.adalfl import OnlineLearner
from lossmeta.ala import ClassCorrelation, Controller, Population
from lossmeta.experiments import Measure, Method, Task, Trial, report, run_folder
from lossmeta.landscape import CurvatureTracker, plot_index
from lossmeta.losses import LossNetwork
from lossmeta.recipes import _ala_tasks as tasks
from lossmeta.recipes._ala_methods import WINDOW, Fit, record_window
from lossmeta.recipes._ala_tasks import CLASSES, CLEAN, NOISE, SEARCH, SELECTION

RATE = 0.03
RECORDS = 8
POINTS, SPAN = 11, 0.5
STEP_SIZE = 0.01
"""Of the controller, in units of 0.1: what suited it best in docs/results/ala-paper.md."""
INDEX = Measure("mean curvature", higher_is_better=False, digits=4)
ABSOLUTE = Measure("mean |curvature|", higher_is_better=False, digits=4, shown=False)
AFTER = "mean curvature after "
PLAIN = "cross-entropy"
SOURCES = (tasks.DIGITS, tasks.MNIST, tasks.CIFAR10)
LEGEND = f"""\
Curvature is the mean Gaussian curvature of the cross-entropy of the validation rows on a grid of {POINTS} by
{POINTS} points around the model, in two random directions with filter normalisation, as far as {SPAN} times the
weights; the same random numbers for all rows and records of a seed. It is recorded {RECORDS} times in a training,
and the table has the last. All rows train the same network on the same batches at a learning rate of {RATE}. ALA's
controller adapts the class correlations of its Eq. 6 to the validation error, every {WINDOW} steps, by 0.001: the
paper's 0.1 ruins it here; its population adapts label smoothing and the generalised cross-entropy's q. AdaLFL
learns the shape of its loss from the validation rows. Paper: Figure 4 compares cross-entropy with ALA on CIFAR-10,
and finds a lower curvature under ALA."""

Step = Callable[[Tensor, Tensor], None]
MakeStep = Callable[[Trial, Fit], Step]


def watched(label: str, make: MakeStep, **settings: float) -> Method:
    """A training whose surfaces are recorded; ``settings`` are what else decides it."""

    def train(trial: Trial) -> dict[str, float]:
        fit = Fit(trial, RATE)
        step = make(trial, fit)
        tracker = CurvatureTracker(
            F.cross_entropy, fit.drawn.valid, points=POINTS, span=SPAN, seed=trial.random_seed(SEARCH + 1)
        )
        due = {max(1, round(fit.steps * (i + 1) / RECORDS)) for i in range(RECORDS)}
        for i, x, y in fit.batches():
            step(x, y)
            if i + 1 in due:
                tracker.record(fit.model, i + 1)
        curves = dict(zip(tracker.epochs, tracker.nonconvexity, strict=True))
        return {
            **fit.measures(),
            INDEX.name: tracker.nonconvexity[-1],
            ABSOLUTE.name: tracker.mean_absolute_curvature[-1],
            "saddle points": tracker.surfaces[-1].saddle_share(),
            **{f"{AFTER}{done}": value for done, value in curves.items()},
        }

    recorded = {"rate": RATE, "records": RECORDS, "points": POINTS, "span": SPAN, "loss": label}
    return Method(label, train, {**recorded, **settings})


def cross_entropy(trial: Trial, fit: Fit) -> Step:
    return lambda x, y: fit.step(F.cross_entropy(fit.model(x), y))


def controller(trial: Trial, fit: Fit) -> Step:
    found = Controller(
        ClassCorrelation(CLASSES),
        fit.new_metric(),
        fit.validation(),
        steps=fit.steps,
        window=WINDOW,
        seed=trial.random_seed(SEARCH),
        step_size=STEP_SIZE,
    )

    def step(x: Tensor, y: Tensor) -> None:
        fit.step(found(fit.model(x), y))
        record_window(trial, found.steps_done + 1, found.step(fit.model))

    return step


def population(trial: Trial, fit: Fit) -> Step:
    found = Population(
        fit.model,
        fit.optimizer,
        fit.space(),
        fit.new_metric(),
        fit.validation(),
        steps=max(fit.steps, WINDOW),
        window=WINDOW,
        seed=trial.random_seed(SEARCH),
    )

    def step(x: Tensor, y: Tensor) -> None:
        found.step((x, y))

    return step


def learned(trial: Trial, fit: Fit) -> Step:
    with trial.seeded(SEARCH):
        loss = LossNetwork(residual="cross_entropy", normalize_slope=True)
    learner = OnlineLearner(fit.model, fit.optimizer, loss.to(trial.device), F.cross_entropy, guard=True)

    def step(x: Tensor, y: Tensor) -> None:
        learner.step((x, y), fit.validation())

    return step


ROWS = (
    watched(PLAIN, cross_entropy),
    watched("ALA's controller", controller, step_size=STEP_SIZE),
    watched("ALA's population", population),
    watched("AdaLFL", learned),
)


@dataclass(frozen=True)
class Curvature:
    """The recipe."""

    name: str = "ala-curvature"
    about: str = (
        "ALA: curvature of the loss around a model in training, under fixed and learned losses (Figure 4)"
    )

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        all_tasks = [_task(source, problem, steps) for source in SOURCES for problem in (CLEAN, NOISE)]
        status = experiments.run(
            self.name,
            all_tasks,
            ROWS,
            seeds=seeds,
            device=device,
            folder=output,
            settings={"steps": steps, "device": device},
            reference=PLAIN,
            about=self.about,
            legend=LEGEND,
            threads=1,  # the tensors are small: a second thread would cost more than it does
        )
        if status == 0 and plot.installed():
            draw(output)
        return status


def _task(source: tasks.Source, problem: tasks.Problem, steps: int | None) -> Task:
    found = tasks.task(source, problem, steps)
    return Task(found.name, found.prepare, (INDEX, ABSOLUTE, problem.measure, SELECTION), found.settings)


def draw(folder: Path) -> None:
    """The index over the steps of each task, the mean of the seeds."""
    finished = run_folder.read(folder)
    for task in finished.header.tasks:
        histories = {}
        for label, trials in report.trials_of(finished, task, finished.header.seeds).items():
            by_step: dict[int, list[float]] = {}
            for trial in trials.values():
                for name, value in trial.measures.items():
                    if name.startswith(AFTER) and value is not None:
                        by_step.setdefault(int(name.removeprefix(AFTER)), []).append(value)
            histories[label] = sorted(by_step), [mean(by_step[step]) for step in sorted(by_step)]
        drawing = plot_index(histories, label="mean Gaussian curvature", unit="step")
        drawing.axes[0].set_title(task.name)
        plot.save(drawing, folder / f"{plot.file_name('curvature', task.name)}.png")


RECIPES = (Curvature(),)
"""The loss around a model while it trains."""
