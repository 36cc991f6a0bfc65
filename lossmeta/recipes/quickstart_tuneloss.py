"""The quickstart's second table: four parameters of a loss, by TuneLoss's three runs and by random search."""

from __future__ import annotations

from pathlib import Path

from lossmeta import experiments
from lossmeta.recipes import _tuneloss_methods as methods
from lossmeta.recipes import _tuneloss_tasks as tasks

RUNS, SEARCHED = 3, 40
REFERENCE = f"TuneLoss, {RUNS} runs"
LEGEND = """\
Softmax regression on 200 digits, whose loss has an l1, an l2, uniform labels and dropout beside it. Each row is the run
that is best on 200 other digits, of the first runs of a method; the rest of the digits decides nothing. Random search
is even over the logarithm of l1 and l2. TuneLoss starts in the middle of the box, and goes where the gradients of the
four and of the validation loss say. Differences are to TuneLoss, paired by seed."""


class QuickstartTuneLoss:
    """The recipe."""

    name = "quickstart-tuneloss"
    about = "Four parameters of a loss on 200 digits: TuneLoss's 3 runs, and 40 random ones"

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        """As all recipes; ``steps`` is the number of random runs. Trains on the CPU, whatever the device."""
        searched = min(SEARCHED, steps or SEARCHED)
        rows = [methods.tuneloss("TuneLoss", runs, RUNS) for runs in range(2, RUNS + 1)]
        for runs in (RUNS, 10, 20, SEARCHED):
            if runs <= searched:
                rows.append(methods.random_search(runs, searched))
        return experiments.run(
            self.name,
            [tasks.task("Digits, four parameters", tasks.DIGITS, searched)],
            rows,
            seeds=seeds,
            device="cpu",
            folder=output,
            settings={"steps": steps, "device": "cpu"},
            reference=REFERENCE,
            about=self.about,
            legend=LEGEND,
            threads=1,
        )


RECIPES = (QuickstartTuneLoss(),)
