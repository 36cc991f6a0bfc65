"""TuneLoss, Figure 2 and Table 1: how good a loss is after each training run, by TuneLoss and its rivals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lossmeta import experiments, plot
from lossmeta.experiments import Method, run_folder
from lossmeta.recipes import _tuneloss_methods as methods
from lossmeta.recipes import _tuneloss_tasks as tasks
from lossmeta.recipes._tuneloss_figure2 import against_runs
from lossmeta.recipes._tuneloss_tasks import Source
from lossmeta.tuneloss import TPE, GaussianProcess

REFERENCE = "TuneLoss, 3 runs"
STOPS = (1, 2, 3, 5, 10)
SEARCHES = (1, 2, 3, 5, 10, 20, 40, 100)
LEGEND = """\
Each row is the run that is best on the validation part, of the first runs of a method; the test part decides nothing.
TuneLoss: the log loss has the coefficient 1 on both sides, gradients are matched at the best model in the metric of the
inverse Hessian, inside a trust region that starts in the middle of the box. The paper's: Eq. 6 with Appendix B.2's eps.
TuneReg: the same program without gradients. Random search is even over the logarithm of l1 and l2. All train the same
softmax regression on the same samples from the same start. Differences are to TuneLoss after 3 runs, paired by seed."""


def rows(metric: str, most: int, optuna: bool = True) -> tuple[Method, ...]:
    """Of the methods, each at its numbers of runs.

    Args:
        metric: of TuneLoss.
        most: runs of random search.
        optuna: whether GP-EI and TPE are among them.
    """
    last = STOPS[-1]
    found = [methods.tuneloss("TuneLoss", runs, last, metric) for runs in STOPS]
    for runs in STOPS[2:]:
        found.append(methods.tuneloss("the paper's", runs, last, "gram", method="paper"))
    for runs in STOPS[2:]:
        found.append(methods.tunereg(runs, last))
    if optuna:
        for name, kind in (("GP-EI", GaussianProcess), ("TPE", TPE)):
            for runs in (10, 20):
                found.append(methods.optuna(name, runs, 20, kind))
    for runs in SEARCHES:
        if runs <= most:
            found.append(methods.random_search(runs, most))
    return tuple(found)


@dataclass(frozen=True)
class Hyperparameters:
    """The recipe for some sources.

    Attributes:
        name: of the recipe.
        about: it.
        sources: by the names of their tasks.
        metric: of TuneLoss.
        searched: runs of random search.
        optuna: whether GP-EI and TPE are among the rivals.
    """

    name: str
    about: str
    sources: dict[str, Source]
    metric: str = "full"
    searched: int = 100
    optuna: bool = True

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        """As all recipes; ``steps`` is the number of random runs. Trains on the CPU, whatever the device."""
        searched = min(self.searched, steps or self.searched)
        status = experiments.run(
            self.name,
            [tasks.task(name, source, searched) for name, source in self.sources.items()],
            rows(self.metric, searched, self.optuna and steps is None),
            seeds=seeds,
            device="cpu",
            folder=output,
            settings={"steps": steps, "device": "cpu"},
            reference=REFERENCE,
            about=self.about,
            legend=LEGEND,
            threads=1,
        )
        if status == 0 and plot.installed():
            finished = run_folder.read(output)
            for name in {trial.task for trial in finished.trials}:
                plot.save(against_runs(finished, name), output / f"by-runs-{plot.file_name(name)}.png")
        return status


RECIPES = (
    Hyperparameters(
        "tuneloss-hyperparameters",
        "TuneLoss, Figure 2 and Table 1: four parameters of a loss, by training runs",
        {"digits": tasks.DIGITS, "flowers": tasks.FLOWERS, "cars, 20 classes": tasks.CARS},
    ),
    Hyperparameters(
        "tuneloss-other-data",
        "The same on data that took no part in choosing TuneLoss's settings",
        {"MNIST": tasks.MNIST, "CIFAR-10": tasks.CIFAR10},
    ),
    Hyperparameters(
        "tuneloss-adagrad",
        "The same with the paper's trainer, AdaGrad on single samples",
        {"flowers": tasks.FLOWERS_ADAGRAD},
        metric="diagonal",
        searched=40,
        optuna=False,
    ),
    Hyperparameters(
        "tuneloss-many",
        "TuneLoss: an l2 for every feature, half of which are junk; 131 parameters",
        {"digits with junk, 131 parameters": tasks.JUNK},
        metric="hyper",
        searched=40,
        optuna=False,
    ),
    Hyperparameters(
        "tuneloss-shared",
        "The same data with one l2 for all features",
        {"digits with junk, 4 parameters": tasks.JUNK_SHARED},
        searched=40,
        optuna=False,
    ),
)
