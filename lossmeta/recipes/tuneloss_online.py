"""The parameters of a loss, tuned while one model trains: a round of TuneLoss is an epoch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from lossmeta import experiments
from lossmeta.experiments import Method, Trial
from lossmeta.recipes import _tuneloss_methods as methods
from lossmeta.recipes._softmax_regression_loss import MU
from lossmeta.recipes._tuneloss_tasks import DIGITS, JUNK_SHARED
from lossmeta.recipes._tuneloss_training import ORDER, WEIGHTS, Course, Setting, batches, by_runs, fit, parts
from lossmeta.recipes.tuneloss_regularizer import adagrad, softmax_regression
from lossmeta.tuneloss import L1, DropoutLoss, SquaredL2, TunedLoss, TuneLoss, UniformLabelLoss, measure
from lossmeta.tuneloss.features import Feature

DROPOUT = 5  # a stream of random numbers of a seed
RUNS = (1, 10, 40)
REFERENCE = "TuneLoss, online"
LEGEND = """\
Softmax regression on 200 digits. Online: one training with AdaGrad, whose loss has an l1, an l2, uniform labels and
dropout beside the log loss; after every epoch their coefficients move to where TuneLoss says. Middle of the box: the
same training with the coefficients where TuneLoss starts. Plain: without them. All start from the same weights and see
the same batches. Stopped: at the epoch that is best on the validation part. Random search and TuneLoss, 3 runs: trained
to the exact minimum; the run that is best on the validation part. The test part decides nothing."""
SETTINGS = {
    "digits": Setting(DIGITS, partial(softmax_regression, 64, 10), adagrad, 32, 60),
    "digits with junk": Setting(JUNK_SHARED, partial(softmax_regression, 128, 10), adagrad, 32, 60),
}


def tuned(trial: Trial, setting: Setting, *, online: bool) -> Course:
    """A training under a loss with four coefficients, which move after every epoch, or never."""
    train, valid, test = parts(trial.data, trial.device)
    with trial.seeded(WEIGHTS):
        model = setting.network().to(trial.device)
    optimizer = setting.optimizer(list(model.parameters()), 0.0)
    scale = 1 / len(train[1])
    features: dict[str, Feature] = {
        "l1": L1(scale, smoothing=MU),
        "l2": SquaredL2(scale),
        "uniform": UniformLabelLoss(),
        "dropout": DropoutLoss(),
    }
    loss = TunedLoss(F.cross_entropy, features)
    # The model is another one after each round, so that only the last says where to go from here.
    tuner = TuneLoss(setting.source.box, window=1)
    orders, drops = (torch.Generator().manual_seed(trial.random_seed(stream)) for stream in (ORDER, DROPOUT))
    course, epochs = Course(), int(trial.task.settings["epochs"])
    for epoch in range(epochs):
        values = tuner.ask()
        loss.set(values)
        for inputs, labels in batches(train, setting.batch, orders):
            optimizer.zero_grad()
            loss.sampled(model, inputs, labels, generator=drops).backward()
            optimizer.step()
        if online:
            tuner.tell(values, measure(model, loss, values, train, valid))
        course.look(model, train, valid, test)
        trial.progress((epoch + 1) / epochs)
    return course


def rows(settings: dict[str, Setting]) -> tuple[Method, ...]:
    """For tasks by name."""

    def row(label: str, *, online: bool | None) -> Method:
        """``online``: ``None`` is a plain training."""
        shared = label.removesuffix(", stopped")

        def train(trial: Trial) -> dict[str, float]:
            setting = settings[trial.task.name]
            if shared not in trial.scratch:
                plain = online is None
                trial.scratch[shared] = (
                    fit(trial, setting) if plain else tuned(trial, setting, online=bool(online))
                )
            course: Course = trial.scratch[shared]
            course.record(trial)
            return course.end() if shared == label else course.stopped()

        return Method(label, train)

    return (
        row("plain", online=None),
        row("plain, stopped", online=None),
        row("middle of the box", online=False),
        row(REFERENCE, online=True),
        row(f"{REFERENCE}, stopped", online=True),
        methods.tuneloss("TuneLoss", 3, 3),
        *(methods.random_search(runs, max(RUNS)) for runs in RUNS),
    )


class Online:
    """The recipe."""

    name = "tuneloss-online"
    about = "TuneLoss online: four parameters of a loss on 200 digits, tuned while one model trains"

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


RECIPES = (Online(),)
