"""A regulariser learned in one run, and forty runs that search four parameters of a loss, on the same splits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from lossmeta import experiments
from lossmeta.experiments import Method
from lossmeta.recipes._tuneloss_methods import random_search
from lossmeta.recipes._tuneloss_tasks import Source
from lossmeta.recipes._tuneloss_training import Setting, by_runs
from lossmeta.recipes.tuneloss_regularizer import REFERENCE, SMALL, row, softmax_regression
from lossmeta.tuneloss import ConvexRegularizer

RUNS = (1, 10, 20, 40)
LEGEND = """\
TuneLoss: one training, under a convex regulariser that is learned after every epoch from the first one on whose
validation loss is worse than that of the one before; the model at its end. Stopped: the epoch that is best on the
validation part. Random search: the same softmax regression, trained to the exact minimum of a loss with an l1, an l2,
uniform labels and dropout beside the log loss; even over the logarithm of l1 and l2; of the first runs, the one that is
best on the validation part. The test part decides nothing."""
_FLOWERS = SMALL["flowers, softmax regression"]
# Scaled, and in a box, as where the four parameters of digits are tuned.
_DIGITS = Source("digits", 500, 500, (0.01, 10.0), scale=4 / 255)
SETTINGS = {
    "digits, softmax regression": replace(
        _FLOWERS, source=_DIGITS, network=partial(softmax_regression, 64, 10)
    ),
    "flowers, softmax regression": _FLOWERS,
}


def rows(settings: dict[str, Setting]) -> tuple[Method, ...]:
    """For tasks by name, whose models are softmax regressions."""
    return (
        row(settings, "plain, stopped", None, stopped=True),
        row(settings, REFERENCE, ConvexRegularizer, stopped=False),
        row(settings, f"{REFERENCE}, stopped", ConvexRegularizer, stopped=True),
        *(random_search(runs, max(RUNS)) for runs in RUNS),
    )


class Search:
    """The recipe."""

    name = "tuneloss-against-search"
    about = "A regulariser learned in one run, and 40 random runs of a loss with four parameters"

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        """As all recipes; ``steps`` is the number of epochs. Trains on the CPU, whatever the device."""
        return experiments.run(
            self.name,
            [by_runs(name, setting, steps) for name, setting in SETTINGS.items()],
            rows(SETTINGS),
            seeds=seeds,
            device="cpu",
            folder=output,
            settings={"steps": steps, "device": "cpu"},
            reference=REFERENCE,
            about=self.about,
            legend=LEGEND,
            threads=1,
        )


RECIPES = (Search(),)
