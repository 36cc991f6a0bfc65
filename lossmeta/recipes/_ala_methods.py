"""Ways to train for a metric: ALA's population, and its rivals."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from lossmeta.ala import Controller, ControllerReport, LearningRate, LossSpace, Population, Schedule
from lossmeta.ala.space import LEARNING_RATE, Coordinates
from lossmeta.experiments import Diverged, Method, Task, Trial, Tuned
from lossmeta.metrics import Metric
from lossmeta.recipes._ala_tasks import BATCH, CLASSES, SEARCH, SELECTION, Drawn, batches, new_model

RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
TUNING_SEEDS = tuple(range(10_000, 10_003))
WINDOW = 20
EVERY = 20  # steps between the stops that are tried
GRID = 24
BIASES = (-2.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0)
ROUNDS = 6  # through all classes' biases


@dataclass
class Fit:
    """A training in progress.

    Attributes:
        trial: of it.
        rate: learning rate.
    """

    trial: Trial
    rate: float
    batch: ClassVar[int] = BATCH

    def __post_init__(self) -> None:
        self.drawn: Drawn = self.trial.data
        self.steps: int = self.trial.task.settings["steps"]
        self.model = new_model(self.trial.seed, self.drawn)
        self.optimizer = SGD(self.model.parameters(), self.rate, momentum=0.9)

    def batches(self, with_validation: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        part = self.drawn.train
        if with_validation:
            part = tuple(torch.cat(both) for both in zip(part, self.drawn.valid, strict=True))  # type: ignore[assignment]
        for i, (x, y) in enumerate(batches(part, self.trial.seed, self.steps, self.batch)):
            self.trial.progress(i / self.steps)
            yield i, x, y

    def space(self) -> LossSpace:
        """What of the loss a population adapts."""
        return self.drawn.space()

    def validation(self) -> Any:
        return self.drawn.valid

    def new_metric(self) -> Metric:
        return self.drawn.problem.new_metric()

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    @torch.no_grad()
    def of(self, part: tuple[Tensor, Tensor], biases: Tensor | float = 0.0) -> float:
        """Of the metric.

        Raises:
            Diverged: where a prediction is not finite.
        """
        scores = self.model(part[0])
        if not scores.isfinite().all():
            raise Diverged
        return self.new_metric().each(scores[None] + biases, part[1]).item()

    def selection(self, biases: Tensor | float = 0.0) -> float:
        """The higher the better."""
        sign = 1 if self.drawn.problem.measure.higher_is_better else -1
        return sign * self.of(self.drawn.valid, biases)

    def measures(self, biases: Tensor | float = 0.0) -> dict[str, float]:
        return {
            self.drawn.problem.measure.name: self.of(self.drawn.test, biases),
            SELECTION.name: self.selection(biases),
        }


def plain(label: str, rate: float, *, with_validation: bool = False, biases: bool = False) -> Method:
    """Cross-entropy; with biases of the logits that the validation part chooses afterwards, or trained on it too."""

    def train(trial: Trial) -> dict[str, float]:
        fit = Fit(trial, rate)
        for _, x, y in fit.batches(with_validation):
            fit.step(F.cross_entropy(fit.model(x), y))
        return fit.measures(_best_biases(fit) if biases else 0.0)

    return Method(label, train, {"rate": rate, "with validation": with_validation, "biases": biases})


def _best_biases(fit: Fit) -> Tensor:
    """By coordinate search on the metric."""
    found = torch.zeros(CLASSES, device=fit.drawn.train[0].device)
    best = fit.selection(found)
    for _ in range(ROUNDS):
        for c in range(CLASSES):
            for change in BIASES:
                tried = found.clone()
                tried[c] += change
                if (value := fit.selection(tried)) > best:
                    best, found = value, tried
    return found


def stopped(label: str) -> Method:
    """Cross-entropy at the rate and the step that are best on this trial's validation part."""

    def train(trial: Trial) -> dict[str, float]:
        best: tuple[float, dict[str, float]] | None = None
        for rate in RATES:
            fit = Fit(trial, rate)
            with suppress(Diverged):
                for i, x, y in fit.batches():
                    fit.step(F.cross_entropy(fit.model(x), y))
                    if (i + 1) % EVERY == 0 or i + 1 == fit.steps:
                        found = fit.measures()
                        if best is None or found[SELECTION.name] > best[0]:
                            best = (found[SELECTION.name], {**found, "rate": rate, "stop": i + 1})
        if best is None:
            raise Diverged
        return best[1]

    return Method(label, train, {"rates": RATES, "every": EVERY})


def fixed_grid(label: str, rate: float, *, rates: bool = False, refitted: bool = False) -> Method:
    """The best on this trial's validation part of 24 losses of the space's tau and q that stay as they are.

    With ``rates``, each at a learning rate of its own, from a tenth of ``rate`` to ten times that. With ``refitted``
    the best is trained once more, on the validation part too.
    """

    def train(trial: Trial) -> dict[str, float]:
        drawn: Drawn = trial.data
        space = drawn.space()
        coordinates = Coordinates(space)
        generator = torch.Generator().manual_seed(trial.random_seed(SEARCH))
        draws = {name: torch.rand(GRID, generator=generator) for name in ("tau", "q", "rate")}

        def fixed(own: float, given: dict[str, Tensor], with_validation: bool = False) -> dict[str, float]:
            return under(Fit(trial, own), space, coordinates, lambda _: given, with_validation)

        def search() -> tuple[dict[str, float], tuple[float, dict[str, Tensor]]]:
            tried = []
            for i in range(GRID):
                given = {"tau": 3 * draws["tau"][i], "q": draws["q"][i]}
                given = {name: v for name, v in given.items() if name in coordinates.places}
                own = rate * 100 ** (float(draws["rate"][i]) - 0.5) if rates else rate
                with suppress(Diverged):
                    tried.append((fixed(own, given), (own, given)))
            if not tried:
                raise Diverged
            return max(tried, key=lambda one: one[0][SELECTION.name])

        key = fixed_grid, rate, rates
        if key not in trial.scratch:
            trial.scratch[key] = search()
        best, (own, given) = trial.scratch[key]
        found = fixed(own, given, with_validation=True) if refitted else {}
        return {**best, "rate": own, **{name: float(v) for name, v in given.items()}, **found}

    settings = {
        "rate": rate,
        "losses": GRID,
        **({"rates": "a tenth to ten times"} if rates else {}),
        **({"refitted": True} if refitted else {}),
    }
    return Method(label, train, settings)


def under(
    fit: Fit,
    space: LossSpace,
    coordinates: Coordinates,
    given: Callable[[int], dict[str, Tensor]],
    with_validation: bool = False,
) -> dict[str, float]:
    """Training under the values of each window, the others at their defaults."""
    values: dict[str, Tensor] = {}
    u = torch.zeros(coordinates.size, dtype=torch.float64)
    for i, x, y in fit.batches(with_validation):
        if i % WINDOW == 0:
            u = coordinates.moved(u, given(i))
            values = {k: v.to(x.device, torch.float32) for k, v in coordinates.values(u).items()}
        for group in fit.optimizer.param_groups:
            group["lr"] = fit.rate * math.exp(
                values[LEARNING_RATE].item() if LEARNING_RATE in values else 0.0
            )
        fit.step(space(fit.model(x), y, values))
    return fit.measures()


def random_actions(
    label: str, rate: float, *, new_fit: Callable[[Trial, float], Fit] | None = None
) -> Method:
    """Every parameter goes half a scale up, down or nowhere after each window, by chance."""

    def train(trial: Trial) -> dict[str, float]:
        fit = (new_fit or Fit)(trial, rate)
        space = fit.space() * LearningRate()
        coordinates = Coordinates(space)
        generator = torch.Generator().manual_seed(trial.random_seed(SEARCH))
        u = torch.zeros(coordinates.size, dtype=torch.float64)

        def given(step: int) -> dict[str, Tensor]:
            nonlocal u
            if step:
                u = coordinates.clip(u + 0.5 * torch.randint(-1, 2, u.shape, generator=generator))
            return coordinates.values(u)

        return under(fit, space, coordinates, given)

    return Method(label, train, {"rate": rate, "window": WINDOW})


def record_window(trial: Trial, step: int, report: ControllerReport | None) -> None:
    """How undecided the paper's policy is, at the end of a window; nothing elsewhere."""
    if report is not None:
        trial.record("policy entropy (nats)", step, report.entropy)


def record_values(trial: Trial, schedule: Schedule) -> None:
    """The loss's parameters over the training: numbers as they are, of vectors how far they are from their defaults."""
    start = schedule.coordinates.values(0 * schedule.path[0])
    for step, u in zip(schedule.steps, schedule.path, strict=True):
        for name, value in schedule.coordinates.values(u).items():
            if name == LEARNING_RATE:
                trial.record("learning rate, times the start's", step, math.exp(value.item()))
            elif value.dim():
                trial.record(f"{name}: mean |change|", step, (value - start[name]).abs().mean().item())
            else:
                trial.record(name, step, value.item())


class Shuffled(Metric):
    """Another metric's values, dealt out to the models by chance."""

    def __init__(self, metric: Metric, seed: int) -> None:
        self.metric, self.higher_is_better = metric, metric.higher_is_better
        self.generator = torch.Generator().manual_seed(seed)

    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        values = self.metric.each(scores, labels)
        return values[torch.randperm(len(values), generator=self.generator).to(values.device)]


def _population(fit: Fit, **options: object) -> Population:
    """Trained on the training part."""
    metric = fit.new_metric()
    if options.pop("shuffled", False):
        metric = Shuffled(metric, fit.trial.random_seed(SEARCH) + 1)
    found = Population(
        fit.model,
        fit.optimizer,
        fit.space(),
        metric,
        fit.validation(),
        steps=max(fit.steps, WINDOW),
        window=WINDOW,
        seed=fit.trial.random_seed(SEARCH),
        **options,  # type: ignore[arg-type]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Population: all children had the same fitness")
        for _, x, y in fit.batches():
            found.step((x, y))
    return found


def population(
    label: str,
    rate: float,
    *,
    shuffled: bool = False,
    learning_rate: bool = True,
    fallback: bool = True,
    children: int = 8,
    new_fit: Callable[[Trial, float], Fit] | None = None,
) -> Method:
    """ALA's population with its defaults; ``new_fit`` where it trains something else."""

    def train(trial: Trial) -> dict[str, float]:
        fit = (new_fit or Fit)(trial, rate)
        options = {"children": children, "learning_rate": learning_rate, "fallback": fallback}
        controller = _population(fit, shuffled=shuffled, **options)
        if controller.windows and (shuffled, *options.values()) == (False, 8, True, True):
            trial.scratch[new_fit, rate] = controller.schedule()
        if controller.windows:
            record_values(trial, controller.schedule())
        found = {name: v.item() for name, v in controller.values.items() if not v.dim()}
        return {**fit.measures(), **found, "fell back": float(bool(controller.fell_back))}

    settings = {
        "rate": rate,
        "shuffled": shuffled,
        "learning rate": learning_rate,
        "fallback": fallback,
        "children": children,
    }
    return Method(label, train, {**settings, "window": WINDOW})


def refitted(label: str, rate: float, *, new_fit: Callable[[Trial, float], Fit] | None = None) -> Method:
    """A network trained from its start on training and validation rows, under the schedule that a population found."""

    def train(trial: Trial) -> dict[str, float]:
        key = new_fit, rate
        if key not in trial.scratch:
            trial.scratch[key] = _population((new_fit or Fit)(trial, rate)).schedule()
        schedule = copy.deepcopy(trial.scratch[key])
        fit = (new_fit or Fit)(trial, rate)
        for _, x, y in fit.batches(with_validation=True):
            fit.optimizer.zero_grad()
            schedule(fit.model(x), y).backward()  # type: ignore[no-untyped-call]
            schedule.step(fit.optimizer)
        return fit.measures()

    return Method(label, train, {"rate": rate, "window": WINDOW})


def controller(
    label: str,
    rate: float,
    *,
    new_fit: Callable[[Trial, float], Fit] | None = None,
    finally_: Callable[[Trial, Controller], None] = lambda trial, controller: None,
) -> Method:
    """The paper's controller of the same loss, with windows as long as the population's.

    ``finally_`` is called when training ends.
    """

    def train(trial: Trial) -> dict[str, float]:
        fit = (new_fit or Fit)(trial, rate)
        found = Controller(
            fit.space(),
            fit.new_metric(),
            fit.validation(),
            steps=fit.steps,
            window=WINDOW,
            seed=trial.random_seed(SEARCH),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Controller: the metric has not changed")
            for i, x, y in fit.batches():
                fit.step(found(fit.model(x), y))
                record_window(trial, i + 1, found.step(fit.model))
        if found.windows:
            record_values(trial, found.schedule())
        finally_(trial, found)
        return {**fit.measures(), **{name: v.item() for name, v in found.values.items() if not v.dim()}}

    return Method(label, train, {"rate": rate, "window": WINDOW})


def at_the_tuned_rate(make: Callable[[float], Method]) -> Tuned:
    """The method at the rate that suits cross-entropy on other seeds, by the validation part."""

    def candidates(task: Task) -> tuple[Method, ...]:
        return tuple(plain(f"cross-entropy, rate {rate:g}", rate) for rate in RATES)

    return Tuned(
        make(RATES[0]).label,
        candidates,
        SELECTION.name,
        TUNING_SEEDS,
        lambda best: make(best.settings["rate"]),
    )
