"""Digits with wrong labels and 100 right ones, on which a loss is learned, for the tests that compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lossmeta.adalfl import OnlineLearner

RATE, STEPS, BATCH = 0.03, 500, 64


class Errors(NamedTuple):
    """On digits that no training saw."""

    cross_entropy: float
    learned: float


def errors(loss: nn.Module, meta_rate: float, wrong: Callable[[Tensor, torch.Generator], Tensor]) -> Errors:
    """Trains a small network on 700 digits by cross-entropy, and by the loss, which learns from the right labels.

    ``wrong`` makes of right labels those that 40 % of the digits bear.
    """
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = (torch.tensor(part) for part in sklearn.load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    x, y = images[order].float() / 16, labels[order]
    clean = torch.cat([(y[:600] == c).nonzero().flatten()[:10] for c in range(10)])
    train_x, train_y = x[600:1300], y[600:1300]
    train_y = train_y.where(torch.rand(700, generator=generator) > 0.4, wrong(train_y, generator))
    start = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    found = []
    for learn in (False, True):
        model, draw = copy.deepcopy(start), torch.Generator().manual_seed(1)
        optimizer = SGD(model.parameters(), RATE, momentum=0.9)
        meta_optimizer = Adam(loss.parameters(), meta_rate)
        learner = OnlineLearner(model, optimizer, loss, F.cross_entropy, meta_optimizer=meta_optimizer)
        for _ in range(STEPS):
            i = torch.randint(700, (BATCH,), generator=draw)
            j = clean[torch.randint(100, (BATCH,), generator=draw)]
            if learn:
                learner.step((train_x[i], train_y[i]), (x[j], y[j]))
            else:
                optimizer.zero_grad()
                F.cross_entropy(model(train_x[i]), train_y[i]).backward()
                optimizer.step()
        found.append((model(x[1300:]).argmax(1) != y[1300:]).float().mean().item())
    return Errors(*found)
