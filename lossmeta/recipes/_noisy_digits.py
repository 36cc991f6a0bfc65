"""Digits with wrong labels and a few clean ones: the data, and how a model is trained on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from lossmeta._batches import Batch
from lossmeta.adalfl import AveragedWeights, CleanLearner
from lossmeta.ala import Population, Robust
from lossmeta.experiments import Method, Trial
from lossmeta.experiments.trial import STREAM, seeded
from lossmeta.losses import LossNetwork
from lossmeta.metrics import ErrorRate
from lossmeta.recipes._ala_methods import record_values
from lossmeta.recipes._digits import CLASSES, digits, evaluate, network

Loss = Callable[[Tensor, Tensor], Tensor]

SETTINGS: dict[str, Any] = {
    "sizes": {"test": 500, "clean": 100, "selection": 250, "train": 900},
    "share of labels redrawn": 0.4,
    "hidden": 64,
    "batch": 64,
    "optimizer": "SGD, momentum 0.9",
}
WINDOW = 20  # steps, of the population
# Streams of random numbers of a seed. Stream 0 draws the data.
WEIGHTS, NOISY_ORDER, CLEAN_ORDER, LOSS = range(1, 5)


# ---- Data.


@dataclass(frozen=True)
class NoisyDigits:
    """One seed's data.

    Attributes:
        train: images, and labels of which a share is redrawn.
        true_labels: those of ``train``. No method may see them.
        clean: images with right labels, as many of each class.
        selection: right labels too; settings are chosen by it, with the tuning seeds, and nothing else looks at it.
        test: the same in every seed, in those of tuning too.
    """

    train: Batch
    true_labels: Tensor
    clean: Batch
    selection: Batch
    test: Batch


def draw(seed: int, device: torch.device) -> NoisyDigits:
    """A seed's noise, and its draw of everything but the test part."""
    images, labels = digits()
    sizes: dict[str, int] = SETTINGS["sizes"]
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, pool = shuffled[: sizes["test"]], shuffled[sizes["test"] :]
    generator = torch.Generator().manual_seed(seed)
    pool = pool[torch.randperm(len(pool), generator=generator)]
    clean = torch.cat([pool[labels[pool] == c][: sizes["clean"] // CLASSES] for c in range(CLASSES)])
    rest = pool[~torch.isin(pool, clean)]
    selection, train = rest[: sizes["selection"]], rest[sizes["selection"] :][: sizes["train"]]
    redrawn = torch.rand(len(train), generator=generator) < SETTINGS["share of labels redrawn"]
    noisy = torch.where(redrawn, torch.randint(CLASSES, train.shape, generator=generator), labels[train])

    def part(rows: Tensor) -> Batch:
        return images[rows].to(device), labels[rows].to(device)

    inputs, true_labels = part(train)
    return NoisyDigits((inputs, noisy.to(device)), true_labels, part(clean), part(selection), part(test))


def new_model(seed: int, device: torch.device) -> nn.Module:
    with seeded(seed + STREAM * WEIGHTS, device):
        return network(SETTINGS["hidden"]).to(device)


def batch_rows(drawn: NoisyDigits, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of every step's batch, and of its batch of clean data."""

    def whole_batches(count: int, stream: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed + STREAM * stream)
        size = SETTINGS["batch"]
        while True:
            yield from torch.randperm(count, generator=generator)[: count - count % size].split(size)

    noisy = whole_batches(len(drawn.train[1]), NOISY_ORDER)
    clean = whole_batches(len(drawn.clean[1]), CLEAN_ORDER)
    for _ in range(steps):
        yield next(noisy), next(clean)


# ---- What the rows of the comparison are made of.


class WithClean(nn.Module):
    """A loss of the noisy rows of a batch, plus the weighted cross-entropy of the clean rows behind them.

    The target is a pair: the noisy labels and the clean ones.
    """

    def __init__(self, loss: Loss, weight: float) -> None:
        super().__init__()
        self.loss = loss
        self.weight = weight

    def forward(self, prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        noisy, clean = target
        on_noisy, on_clean = prediction.split([len(noisy), len(clean)])
        return self.loss(on_noisy, noisy) + self.weight * F.cross_entropy(on_clean, clean)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


# ---- Methods.


def fixed(
    label: str,
    loss: Loss,
    *,
    rate: float,
    steps: int,
    clean_weight: float = 0.0,
    averaged: bool = False,
    **parameter: float,
) -> Method:
    """Training with a loss that stays as it is.

    Args:
        label: of the row.
        loss: of the noisy batch.
        rate: learning rate.
        steps: of training.
        clean_weight: of the clean batch's cross-entropy; with 0 there is no clean batch.
        averaged: whether the averaged weights are tested.
        parameter: of the loss, to be kept with the results.
    """

    def train(trial: Trial) -> dict[str, float]:
        drawn: NoisyDigits = trial.data
        model = new_model(trial.seed, trial.device)
        optimizer = SGD(model.parameters(), rate, momentum=0.9)
        average = AveragedWeights(model)
        with_clean = WithClean(loss, clean_weight)
        for inputs, target in batches(trial, steps):
            optimizer.zero_grad()
            if clean_weight:
                value = with_clean(model(inputs), target)
            else:
                value = loss(model(inputs[: len(target[0])]), target[0])
            value.backward()
            optimizer.step()
            if averaged:
                average.update()
        return evaluate(average.model if averaged else model, drawn.test)

    settings = {"rate": rate, "steps": steps, "clean weight": clean_weight, "averaged": averaged, **parameter}
    return Method(label, train, settings)


def learned(
    label: str,
    *,
    rate: float,
    steps: int,
    meta_rate: float | None = None,
    finally_: Callable[[Trial, nn.Module, LossNetwork], None] = lambda trial, model, loss: None,
) -> Method:
    """AdaLFL with its defaults for wrong labels: a loss that is learned from the clean digits, which train too.

    Args:
        label: of the row.
        rate: learning rate.
        steps: of training.
        meta_rate: of the loss; the default's where it is left out.
        finally_: called when training ends, with the averaged model and the loss.
    """

    def train(trial: Trial) -> dict[str, float]:
        drawn: NoisyDigits = trial.data
        model = new_model(trial.seed, trial.device)
        learner = CleanLearner(
            model,
            SGD(model.parameters(), rate, momentum=0.9),
            drawn.clean,
            meta_rate=meta_rate,
            batch_size=SETTINGS["batch"],
            seed=trial.random_seed(LOSS),
        )
        for inputs, target in batches(trial, steps):
            noisy, _ = target
            learner.step((inputs[: len(noisy)], noisy))
        finally_(trial, learner.averaged, learner.loss)  # type: ignore[arg-type]
        return evaluate(learner.averaged, drawn.test)

    return Method(
        label, train, {"rate": rate, "meta rate": meta_rate, "steps": steps, "learner": "CleanLearner"}
    )


def adapted(label: str, *, rate: float, steps: int) -> Method:
    """ALA: the exponent of generalised cross-entropy adapts to the error on the clean data, which trains nothing.

    Args:
        label: of the row.
        rate: learning rate.
        steps: of training.
    """

    def train(trial: Trial) -> dict[str, float]:
        drawn: NoisyDigits = trial.data
        model = new_model(trial.seed, trial.device)
        count = min(steps, trial.task.settings["steps"] or steps)
        optimizer = SGD(model.parameters(), rate, momentum=0.9)
        population = Population(
            model,
            optimizer,
            Robust(),
            ErrorRate(),
            drawn.clean,
            steps=max(count, WINDOW),
            window=WINDOW,
            seed=trial.random_seed(LOSS),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Population: all children had the same fitness")
            for inputs, target in batches(trial, steps):
                noisy, _ = target
                population.step((inputs[: len(noisy)], noisy))
        if population.windows:
            record_values(trial, population.schedule())
        return {**evaluate(model, drawn.test), "q": population.values["q"].item()}

    settings = {"rate": rate, "steps": steps, "window": WINDOW, "adapted": "q"}
    return Method(label, train, settings)


def batches(trial: Trial, steps: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Per step the noisy images with the clean ones behind them, and the labels of both; as many as were asked for."""
    drawn: NoisyDigits = trial.data
    steps = min(steps, trial.task.settings["steps"] or steps)
    for step, (noisy, clean) in enumerate(batch_rows(drawn, trial.seed, steps)):
        noisy, clean = noisy.to(trial.device), clean.to(trial.device)
        trial.progress(step / steps)
        yield (
            torch.cat([drawn.train[0][noisy], drawn.clean[0][clean]]),
            (drawn.train[1][noisy], drawn.clean[1][clean]),
        )
