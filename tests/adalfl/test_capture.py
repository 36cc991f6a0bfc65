"""A step that reads nothing back, as it is captured in a CUDA graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_problems import batches, cnn, equal, learner, values
from torch import nn
from torch.optim import SGD, Adam, RMSprop

from lossmeta.adalfl.capture import CapturedStep, check_capturable
from lossmeta.losses import LossNetwork


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_a_step_without_host_reads_is_the_same_step(optimizer: Any) -> None:
    first = learner(
        LossNetwork(8, dtype=torch.float64), cnn()[:3].append(nn.Flatten()).append(nn.Linear(144, 3).double())
    )  # type: ignore[index]
    second = copy.deepcopy(first)
    for one in (first, second):
        one.meta_optimizer = optimizer(one.loss.parameters(), lr=1e-2)
    train, valid = batches()
    nowhere = torch.full_like(valid[0], float("nan")), valid[1]
    for pair, finite in (
        ((train, nowhere), False),
        ((train, valid), True),
        ((train, nowhere), False),
        ((valid, train), True),
    ):
        report = first.step(*pair)
        loss, task_loss, taken = second._step_on_device(*pair)
        assert bool(taken) == finite == (report.skipped is None)
        assert torch.equal(loss, report.loss)
        assert torch.equal(task_loss.nan_to_num(), report.task_loss.nan_to_num())  # type: ignore[union-attr]
    assert equal(values(first._step.model.plain), values(second._step.model.plain))
    assert equal(values(first.loss), values(second.loss))


def test_what_cannot_be_captured_is_refused() -> None:
    with pytest.raises(ValueError, match="capture=True needs the model on a CUDA device, got cpu; move it"):
        learner(capture=True)
    p = [nn.Parameter(torch.zeros(1))]
    check_capturable("optimizer", SGD(p, 0.1, momentum=0.9))
    check_capturable("optimizer", Adam(p, capturable=True))
    with pytest.raises(
        ValueError, match="optimizer must be SGD, or Adam or AdamW with capturable=True, got Adam"
    ):
        check_capturable("optimizer", Adam(p))
    with pytest.raises(ValueError, match=r"meta_optimizer must be SGD, .*, got RMSprop"):
        check_capturable("meta_optimizer", RMSprop(p))
    check_capturable("optimizer", SGD(p, 0.1, dampening=0.1))  # of no momentum
    with pytest.raises(ValueError, match="meta_optimizer must have no dampening, got some"):
        check_capturable("meta_optimizer", SGD(p, 0.1, momentum=0.9, dampening=0.1))
    with pytest.raises(ValueError, match="optimizer must have a number as lr, got a tensor"):
        check_capturable("optimizer", SGD(p, torch.tensor(0.1)))


@pytest.mark.parametrize("draws", [False, True])
def test_random_numbers_of_either_device_are_refused(draws: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: only the CPU draws."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
    step = CapturedStep(
        lambda train, valid: [torch.rand(1) if draws else torch.ones(1)], [torch.zeros(1)], []
    )
    if draws:
        with pytest.raises(ValueError, match="the model must draw no random numbers"):
            step._warm_up(None, None)
    else:
        assert torch.equal(*step._warm_up(None, None), torch.ones(1))
