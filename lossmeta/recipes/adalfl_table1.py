"""Table 1 of the AdaLFL paper: fixed, offline and online learned losses on every task.

Beside the paper's three columns stands what they leave open: plain training at a tuned learning rate and with the
validation data that a learned loss has seen too; the offline loss with its slope scaled to the task loss's (its shape
without its scale); larger meta learning rates; and at the tuned rate the shape alone, learned online: from Algorithm 1
on, and from the task loss on, there with other batches of the training data as meta-objective.
"""

from __future__ import annotations

from lossmeta.recipes._comparison import Recipe, standard
from lossmeta.recipes._methods import Method

ALL = ("train", "validation")


def _residual(rate: str, parts: tuple[str, ...], remark: str = "") -> Method:
    """The shape alone, from the task loss on, by other batches of the same data."""
    label = f"residual loss, {rate}, slope of the task loss, tuned rate{remark}"
    return Method(label, None, True, parts, "residual", online=float(rate), normalize=True, objective=parts)


METHODS = (
    *standard(),
    Method(
        "AdaLFL, 1e-5, slope of the task loss, tuned rate",
        tuned=True,
        loss="network",
        inner_steps=1,
        online=1e-5,
        normalize=True,
    ),
    _residual("1e-3", ("train",)),
    _residual("1e-2", ("train",)),
    _residual("1e-2", ALL, ", training + validation data"),
)

RECIPES = tuple(
    Recipe(f"adalfl-{group}", f"AdaLFL, Table 1: {about}", (group,), METHODS)
    for group, about in {
        "regression": "Communities and Crime, Diabetes, California Housing",
        "mnist": "MNIST with logistic regression, an MLP and LeNet-5",
        "cifar10": "CIFAR-10 with VGG-16, AllCNN-C, ResNet-18, SqueezeNet",
        "cifar100": "CIFAR-100 with WRN 28-10",
        "svhn": "SVHN with WRN 16-8",
    }.items()
)
