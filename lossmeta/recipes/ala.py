"""ALA's population against its rivals: rare classes, wrong labels, both, and neither."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lossmeta import experiments
from lossmeta.recipes import _ala_methods as methods
from lossmeta.recipes import _ala_tasks as tasks
from lossmeta.recipes._ala_tasks import Problem

POPULATION = "population, 8 children"
ROWS = (
    methods.at_the_tuned_rate(lambda rate: methods.plain("cross-entropy", rate)),
    methods.stopped("cross-entropy, rate and stop tuned per seed"),
    methods.at_the_tuned_rate(
        lambda rate: methods.plain("the first, biases chosen afterwards", rate, biases=True)
    ),
    methods.at_the_tuned_rate(
        lambda rate: methods.plain(
            "the first, trained on the validation rows too", rate, with_validation=True
        )
    ),
    methods.at_the_tuned_rate(lambda rate: methods.random_actions("random actions", rate)),
    methods.at_the_tuned_rate(
        lambda rate: methods.population("population, shuffled metric", rate, shuffled=True, fallback=False)
    ),
    methods.at_the_tuned_rate(lambda rate: methods.fixed_grid("the best of 24 fixed losses", rate)),
    methods.at_the_tuned_rate(
        lambda rate: methods.fixed_grid("the best of 24 fixed losses and rates", rate, rates=True)
    ),
    methods.at_the_tuned_rate(
        lambda rate: methods.fixed_grid(
            "that one, trained on the validation rows too", rate, rates=True, refitted=True
        )
    ),
    methods.at_the_tuned_rate(lambda rate: methods.controller("controller, the paper's policy", rate)),
    methods.at_the_tuned_rate(lambda rate: methods.population("population, 4 children", rate, children=4)),
    methods.at_the_tuned_rate(
        lambda rate: methods.population("population, learning rate fixed", rate, learning_rate=False)
    ),
    methods.at_the_tuned_rate(
        lambda rate: methods.population("population, no fallback", rate, fallback=False)
    ),
    methods.at_the_tuned_rate(lambda rate: methods.population(POPULATION, rate)),
    methods.at_the_tuned_rate(
        lambda rate: methods.refitted("its schedule, on the validation rows too", rate)
    ),
)
LEGEND = """\
All rows train the same network on the same batches, at the learning rate that suits cross-entropy best on other seeds,
but for the second, which has the best rate and stop of its own seed. Validation rows have right labels and are
balanced; they choose rates, stops, biases and the best fixed loss, and are what the population adapts to. The test
part decides nothing. Fixed losses: tau (rare classes) and q (wrong labels) drawn evenly from their ranges; with rates,
each at one from a tenth of the first row's to ten times that. Shuffled metric: the population with its children's
fitness dealt out by chance, and no fallback to the plain loss. Controller: the paper's policy of the same loss, with
windows of 20 steps. Its schedule: the values that the population of 8 found, by training step, in a second training,
from the same weights, on training and validation rows. Differences are to the population of 8, paired by seed."""


@dataclass(frozen=True)
class Against:
    """The recipe for one difficulty.

    Attributes:
        name: of the recipe.
        problems: what is hard, once for each metric by which it is judged.
    """

    name: str
    problems: tuple[Problem, ...]

    @property
    def about(self) -> str:
        metrics = " or ".join(f"the {problem.metric}" for problem in self.problems)
        return f"ALA: {self.problems[0].name}; a loss that adapts to {metrics}, and its rivals"

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        return experiments.run(
            self.name,
            [
                tasks.task(source, problem, steps)
                for problem in self.problems
                for source in (tasks.DIGITS, tasks.MNIST, tasks.CIFAR10)
            ],
            ROWS,
            seeds=seeds,
            device=device,
            folder=output,
            settings={"steps": steps, "device": device},
            reference=POPULATION,
            about=self.about,
            legend=LEGEND,
            threads=1,  # the tensors are small: a second thread would cost more than it does
        )


RECIPES = (
    Against(
        "ala-imbalance",
        (tasks.IMBALANCE, tasks.IMBALANCE_BY_BALANCED_ERROR, tasks.IMBALANCE_BY_AVERAGE_PRECISION),
    ),
    Against("ala-noise", (tasks.NOISE,)),
    Against("ala-both", (tasks.BOTH,)),
    Against("ala-clean", (tasks.CLEAN,)),
)
