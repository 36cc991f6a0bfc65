"""ALA's Table 3 and its verification task: embeddings of classes that training has not seen, and rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lossmeta import experiments
from lossmeta.ala import ContrastiveShape, DistanceMixture, FocalWeighting, LossSpace
from lossmeta.ala.space import Coordinates
from lossmeta.experiments import Measure, Method, Task, Trial, Tuned
from lossmeta.recipes import _ala_methods as methods
from lossmeta.recipes import _ala_retrieval_tasks as tasks
from lossmeta.recipes import _ala_triplets as triplets
from lossmeta.recipes._ala_methods import GRID, TUNING_SEEDS
from lossmeta.recipes._ala_phi import draw_mixture
from lossmeta.recipes._ala_retrieval_tasks import EmbeddingFit
from lossmeta.recipes._ala_tasks import SEARCH, SELECTION

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
POPULATION = "population, contrastive shape"
BatchLoss = Callable[[Tensor, Tensor], Tensor]


def fixed(label: str, rate: float, space: LossSpace, *, with_validation: bool = False) -> Method:
    """A space's loss at its defaults."""

    def train(trial: Trial) -> dict[str, float]:
        coordinates = Coordinates(space)
        return methods.under(
            EmbeddingFit(trial, rate, space), space, coordinates, lambda _: {}, with_validation
        )

    settings = {"loss": type(space).__name__, "rate": rate, "with validation": with_validation}
    return Method(label, train, settings)


def of_batches(label: str, rate: float, make: Callable[[Trial], BatchLoss]) -> Method:
    """Another loss of embeddings and labels."""

    def train(trial: Trial) -> dict[str, float]:
        fit, loss = EmbeddingFit(trial, rate), make(trial)
        for _, x, y in fit.batches():
            fit.step(loss(fit.model(x), y))
        return fit.measures()

    return Method(label, train, {"rate": rate, "loss": label})


def margin(trial: Trial) -> BatchLoss:
    return partial(triplets.margin, generator=torch.Generator().manual_seed(trial.random_seed(SEARCH)))


def random_search(label: str, rate: float) -> Method:
    """The best on this trial's validation part of 24 contrastive losses drawn evenly between their bounds."""

    def train(trial: Trial) -> dict[str, float]:
        space = ContrastiveShape()
        coordinates = Coordinates(space)
        generator = torch.Generator().manual_seed(trial.random_seed(SEARCH))
        best: dict[str, float] | None = None
        for _ in range(GRID):
            share = torch.rand(coordinates.size, generator=generator, dtype=torch.float64)
            given = coordinates.values(coordinates.low + share * (coordinates.high - coordinates.low))
            found = methods.under(
                EmbeddingFit(trial, rate),
                space,
                coordinates,
                lambda _, given=given: given,  # type: ignore[misc]
            )
            if best is None or found[SELECTION.name] > best[SELECTION.name]:
                best = {**found, **{name: float(v) for name, v in given.items()}}
        assert best is not None
        return best

    return Method(label, train, {"rate": rate, "losses": GRID})


def at_its_rate(label: str, candidate: Callable[[float], Method], make: Callable[[float], Method]) -> Tuned:
    """The method at the rate that suits a candidate best on other seeds, by the validation part."""

    def candidates(task: Task) -> tuple[Method, ...]:
        return tuple(candidate(rate) for rate in RATES)

    return Tuned(label, candidates, SELECTION.name, TUNING_SEEDS, lambda best: make(best.settings["rate"]))


def _adapted(label: str, space: LossSpace, make: Callable[..., Method], **options: bool) -> Tuned:
    """At the rate that suits the space's default loss."""
    name = type(space).__name__
    return at_its_rate(
        label,
        lambda rate: fixed(f"{name} at its start, rate {rate:g}", rate, space),
        lambda rate: make(label, rate, new_fit=partial(EmbeddingFit, losses=space), **options),
    )


def _fixed(label: str, space: LossSpace, *, with_validation: bool = False) -> Tuned:
    name = type(space).__name__
    return at_its_rate(
        label,
        lambda rate: fixed(f"{name} at its start, rate {rate:g}", rate, space),
        lambda rate: fixed(label, rate, space, with_validation=with_validation),
    )


def _other(label: str, make: Callable[[Trial], BatchLoss]) -> Tuned:
    return at_its_rate(
        label,
        lambda rate: of_batches(f"{label}, rate {rate:g}", rate, make),
        lambda rate: of_batches(label, rate, make),
    )


CONTRASTIVE = ContrastiveShape()
ROWS = (
    _other("triplet", lambda trial: triplets.triplet),
    _other("margin, distance-weighted sampling", margin),
    _fixed("distance mixture at its start", DistanceMixture()),
    _adapted(
        "controller, distance mixture", DistanceMixture(), partial(methods.controller, finally_=draw_mixture)
    ),
    _adapted("population, distance mixture", DistanceMixture(), methods.population),
    _fixed("focal weighting at its start", FocalWeighting()),
    _adapted("controller, focal weighting", FocalWeighting(), methods.controller),
    _fixed("contrastive", CONTRASTIVE),
    _fixed("contrastive, trained on the validation classes too", CONTRASTIVE, with_validation=True),
    at_its_rate(
        "the best of 24 contrastive losses",
        lambda rate: fixed(f"ContrastiveShape at its start, rate {rate:g}", rate, CONTRASTIVE),
        lambda rate: random_search("the best of 24 contrastive losses", rate),
    ),
    _adapted("random actions, contrastive shape", CONTRASTIVE, methods.random_actions),
    _adapted(
        "population, contrastive shape, shuffled metric",
        CONTRASTIVE,
        methods.population,
        shuffled=True,
        fallback=False,
    ),
    _adapted(POPULATION, CONTRASTIVE, methods.population),
    _adapted("its schedule, on the validation classes too", CONTRASTIVE, methods.refitted),
)
LEGEND = """\
All rows train the same network on the same batches of 16 classes by 4 samples. Classes for training, validation and
test are different ones. The learning rate of a row is the best of five on other seeds, by the validation part, for its
loss at its start. Adapted rows have windows of 20 steps. The best of 24: drawn evenly between the bounds of the
contrastive shape, chosen by the validation part. Its schedule: the values that the population found, by training step,
in a second training, from the same weights, on training and validation classes. Differences are to the population,
paired by seed. The paper's figures are of other data and networks (Stanford Online Products; LFW after
CASIA-WebFace)."""
REPORTED = {
    tasks.RECALL: {
        "triplet": "66.7",
        "margin, distance-weighted sampling": "72.7",
        "controller, distance mixture": "75.7 with triplets, 78.9 with margin",
        "controller, focal weighting": "77.9 with margin",
    },
    tasks.VERIFICATION: {
        "triplet": "98.70",
        "controller, distance mixture": "99.57",
        "controller, focal weighting": "99.49",
    },
}


@dataclass(frozen=True)
class Unseen:
    """The recipe for one metric.

    Attributes:
        name: of the recipe.
        measure: the metric.
        where: in the paper.
    """

    name: str
    measure: Measure
    where: str

    @property
    def about(self) -> str:
        return f"ALA, {self.where}: {self.measure.name} of classes that training has not seen, and rivals"

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        tables = [tasks.task(source, self.measure, steps) for source in (tasks.OMNIGLOT, tasks.CARS)]
        return experiments.run(
            self.name,
            tables,
            ROWS,
            seeds=seeds,
            device=device,
            folder=output,
            settings={"steps": steps, "device": device},
            reference=POPULATION,
            about=self.about,
            legend=LEGEND,
            reported={"paper": {table.name: REPORTED[self.measure] for table in tables}},
            threads=1,  # the tensors are small: a second thread would cost more than it does
        )


RECIPES = (
    Unseen("ala-retrieval", tasks.RECALL, "Table 3"),
    Unseen("ala-verification", tasks.VERIFICATION, "Table S2"),
)
