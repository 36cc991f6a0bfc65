"""LearnLoss on what it is for: a convex regulariser of softmax regression, learned from AdaGrad's checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lossmeta.ops import pwl_statistics
from lossmeta.tuneloss import learn_loss

KNOTS, TRAINING, CLASSES = 50, 150, 10


def log_loss(weights: np.ndarray, images: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """And its gradient."""
    logits = images @ weights
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(probabilities[rows, labels]).mean()
    probabilities[rows, labels] -= 1
    return float(loss), images.T @ probabilities / len(labels)


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, np.ndarray]:
    """After every epoch of AdaGrad with single samples: features that are all but dependent."""
    images, labels = load_digits(return_X_y=True)
    images = np.column_stack([images / 16, np.ones(len(images))])
    order = np.random.default_rng(0).permutation(len(labels))
    train, valid = order[:TRAINING], order[TRAINING : 3 * TRAINING]
    weights, squares = (np.zeros((images.shape[1], CLASSES)) for _ in range(2))
    generator = np.random.default_rng(1)
    found: dict[str, list[Any]] = {"errors": [], "features": [], "grams": []}
    knots = torch.zeros(0)
    for epoch in range(50):
        for i in generator.permutation(train):
            _, gradient = log_loss(weights, images[i : i + 1], labels[i : i + 1])
            squares += gradient**2
            weights -= 0.1 * gradient / (np.sqrt(squares) + 1e-10)
        if epoch == 0:
            knots = torch.from_numpy(np.unique(np.quantile(weights, np.linspace(0, 1, KNOTS))))
        (loss, task), (error, valid_gradient) = (
            log_loss(weights, images[part], labels[part]) for part in (train, valid)
        )
        gradients = torch.from_numpy(np.stack([task.ravel(), valid_gradient.ravel()]))
        values, inner, cross = (
            t.numpy() for t in pwl_statistics(torch.from_numpy(weights.ravel()), gradients, knots)
        )
        gram = np.block(
            [
                [np.sum(task**2), cross[:, 0], np.sum(task * valid_gradient)],
                [cross[:, :1], inner, cross[:, 1:]],
                [np.sum(task * valid_gradient), cross[:, 1], np.sum(valid_gradient**2)],
            ]
        )
        found["errors"].append(error)
        found["features"].append(np.append(loss, values))
        found["grams"].append(gram)
    return {name: np.array(v) for name, v in found.items()}


@pytest.mark.parametrize("rounds", [10, 20, 50])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("largest", [1.0, np.inf])
def test_real_problems_are_certified_and_as_cheap_as_by_cvxpy(
    rounds: int, gradients: bool, largest: float, checkpoints: dict[str, np.ndarray]
) -> None:
    given = {name: v[:rounds] for name, v in checkpoints.items() if gradients or name != "grams"}
    k = given["features"].shape[1]
    lower, upper = np.zeros(k), np.full(k, largest)
    lower[0] = upper[0] = 1.0
    found = learn_loss(**given, lower=lower, upper=upper)
    assert found.solver == "daqp"
    assert found.certificate.gap <= 1e-8 * found.certificate.cost and found.certificate.violation <= 1e-10
    assert found.certificate.rank < found.certificate.unknowns
    other = learn_loss(**given, lower=lower, upper=upper, solver="clarabel")
    assert found.cost == pytest.approx(other.cost, rel=1e-7) and found.matched == other.matched
