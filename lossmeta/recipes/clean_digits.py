"""Clean digits, where no loss wins: how a fixed loss, one set by hand and one learned online are used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from lossmeta import experiments
from lossmeta._batches import Batch
from lossmeta.adalfl import OnlineLearner
from lossmeta.experiments import Method, Task, Trial
from lossmeta.experiments.trial import STREAM
from lossmeta.losses import LossNetwork, ParametricCrossEntropy
from lossmeta.ops.class_confusion import class_confusion
from lossmeta.recipes._digits import CLASSES, ERROR, PRECISION, digits, evaluate, network

SETTINGS: dict[str, Any] = {
    "sizes": {"train": 897, "validation": 400, "test": 500},
    "hidden": 64,
    "batch": 50,
    "optimizer": "Adam",
    "learning rate": 3e-3,
    "steps": 720,  # 40 epochs
}
META_RATE = 1e-3
SEED = 0  # the stream of random numbers that weights and losses are drawn from


def split(seed: int, device: torch.device) -> dict[str, Batch]:
    """Train, validation and test rows of a seed."""
    images, labels = digits()
    sizes: dict[str, int] = SETTINGS["sizes"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = zip(sizes, torch.split(order, list(sizes.values())), strict=True)
    return {name: (images[rows].to(device), labels[rows].to(device)) for name, rows in parts}


def new_model(trial: Trial) -> nn.Module:
    with trial.seeded(SEED):
        return network(SETTINGS["hidden"]).to(trial.device)


def batches(trial: Trial, epoch: int, part: str = "train") -> Iterator[Batch]:
    """The training set in an order of the epoch's own; as many batches of another part, drawn from it."""
    inputs, labels = trial.data[part]
    generator = torch.Generator().manual_seed(STREAM * trial.seed + epoch)
    size = SETTINGS["sizes"]["train"]
    if part == "train":
        order = torch.randperm(size, generator=generator)
    else:
        order = torch.randint(len(labels), (size,), generator=generator)
    for rows in torch.split(order.to(labels.device), SETTINGS["batch"]):
        yield inputs[rows], labels[rows]


def train(
    trial: Trial,
    step: Callable[[Batch, Batch], Any],
    each_epoch: Callable[[], None] = lambda: None,
) -> None:
    """A training loop: ``step`` is given a training and a validation batch, ``each_epoch`` may adapt the loss."""
    steps, done = trial.task.settings["steps"], 0
    for epoch in itertools.count():
        for pair in zip(batches(trial, epoch), batches(trial, epoch, "validation"), strict=True):
            if done == steps:
                return
            step(*pair)
            done += 1
            trial.progress(done / steps)
        each_epoch()


def with_fixed(
    trial: Trial,
    loss: Callable[[Tensor, Tensor], Tensor],
    each_epoch: Callable[[nn.Module], None] = lambda model: None,
) -> dict[str, float]:
    model = new_model(trial)
    optimizer = Adam(model.parameters(), lr=SETTINGS["learning rate"])

    def step(train_batch: Batch, _: Batch) -> None:
        inputs, labels = train_batch
        optimizer.zero_grad()
        loss(model(inputs), labels).backward()
        optimizer.step()

    train(trial, step, lambda: each_epoch(model))
    return evaluate(model, trial.data["test"])


def cross_entropy(trial: Trial) -> dict[str, float]:
    return with_fixed(trial, F.cross_entropy)


def identity(trial: Trial) -> dict[str, float]:
    return with_fixed(trial, ParametricCrossEntropy(CLASSES).to(trial.device))


def confusion(trial: Trial) -> dict[str, float]:
    loss = ParametricCrossEntropy(CLASSES).to(trial.device)
    inputs, labels = trial.data["validation"]
    return with_fixed(trial, loss, lambda model: penalise_confusions(loss, model(inputs), labels))


@torch.no_grad()
def penalise_confusions(loss: ParametricCrossEntropy, logits: Tensor, labels: Tensor) -> None:
    r"""Sets :math:`\Phi` from the confusion matrix C of a validation set (ALA, Eq. 7).

    Our reading of the row "confusion matrix" in ALA's Table 1, which the paper does not spell out:
    :math:`\Phi = I - s` with :math:`s_{ij} = \frac12 (e^{-C_{ij}} + e^{-C_{ji}})` off the diagonal, where
    :math:`e^{-C_{ij}}` is the geometric mean of the probability that images of class i give to class j. It is not
    scaled up: where a row of s sums to more than 1, the wrong classes earn more than the right one, and training fails
    (with the largest s scaled to 1 this recipe ends at 50 ± 37 % test error).
    """
    sums, counts = class_confusion(logits, labels)
    probability = (-sums / counts[:, None]).exp().nan_to_num(0)  # 0 for a class that the set lacks
    similarity = ((probability + probability.T) / 2).fill_diagonal_(0)
    loss.phi.copy_(torch.eye(CLASSES, device=similarity.device) - similarity)


def online(trial: Trial) -> dict[str, float]:
    """AdaLFL on top of cross-entropy: after every step the loss moves by what the step did to a validation batch."""
    with trial.seeded(SEED):
        loss = LossNetwork(residual="cross_entropy").to(trial.device)
    model = new_model(trial)
    learner = OnlineLearner(
        model,
        Adam(model.parameters(), lr=SETTINGS["learning rate"]),
        loss,
        F.cross_entropy,
        meta_optimizer=Adam(loss.parameters(), lr=META_RATE),
    )
    train(trial, learner.step)
    return evaluate(model, trial.data["test"])


METHODS = (
    Method("cross-entropy", cross_entropy),
    Method("parametric, fixed Φ = I", identity),
    Method("parametric, Φ from confusions", confusion),
    Method("AdaLFL, online", online, {"meta rate": META_RATE}),
)
LEGEND = """\
parametric: ParametricCrossEntropy. Φ from confusions: set after every epoch, so that classes that the model confuses \
on the validation set are penalised. AdaLFL: a LossNetwork on top of cross-entropy, learned from what each step did to \
a validation batch. On a task this easy no loss wins: the table shows how they are used."""


class CleanDigits:
    """The recipe."""

    name = "clean-digits"
    about = "Digits without wrong labels: fixed, hand-set and learned losses, where none wins"

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        settings = SETTINGS | ({} if steps is None else {"steps": steps})
        return experiments.run(
            self.name,
            [Task("Digits, test set", split, (ERROR, PRECISION), settings)],
            METHODS,
            seeds=seeds,
            device=device,
            folder=output,
            settings={"steps": settings["steps"], "device": device},
            reference="cross-entropy",
            about=self.about,
            legend=LEGEND,
            threads=1,  # the tensors are small: a second thread would cost more than it does
        )


RECIPES = (CleanDigits(),)
