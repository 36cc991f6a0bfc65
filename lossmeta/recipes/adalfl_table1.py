"""Table 1 of the AdaLFL paper: fixed, offline and online learned losses on every task.

Beside the paper's three columns stands what they leave open: plain training at a tuned learning rate and with the
validation data that a learned loss has seen too; the offline loss with its slope scaled to the task loss's (its shape
without its scale); larger meta learning rates; and at the tuned rate the shape alone, learned online: from Algorithm 1
on, and from the task loss on, there with other batches of the training data as meta-objective.
"""

from __future__ import annotations

from lossmeta.recipes._adalfl_tables import ALL, PaperTable, Row, row, standard
from lossmeta.recipes._adalfl_training import Offline, Online, Untrained


def _residual(rate: str, parts: tuple[str, ...], remark: str = "") -> Row:
    """The shape alone, from the task loss on, by other batches of the same data."""
    label = f"residual loss, {rate}, slope of the task loss, tuned rate{remark}"
    online = Online(float(rate), parts=parts, objective=parts)
    return row(label, Untrained("residual", normalize=True), online, tuned=True)


ROWS = (
    *standard(),
    row(
        "AdaLFL, 1e-5, slope of the task loss, tuned rate", Offline(normalize=True), Online(1e-5), tuned=True
    ),
    _residual("1e-3", ("train",)),
    _residual("1e-2", ("train",)),
    _residual("1e-2", ALL, ", training + validation data"),
)

RECIPES = tuple(
    PaperTable(f"adalfl-{group}", f"AdaLFL, Table 1: {about}", (group,), ROWS)
    for group, about in {
        "regression": "Communities and Crime, Diabetes, California Housing",
        "mnist": "MNIST with logistic regression, an MLP and LeNet-5",
        "cifar10": "CIFAR-10 with VGG-16, AllCNN-C, ResNet-18, SqueezeNet",
        "cifar100": "CIFAR-100 with WRN 28-10",
        "svhn": "SVHN with WRN 16-8",
    }.items()
)
