"""What keeps the parameters of a loss from harm: from being minimised, and from leaving their range."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lossmeta.adalfl import OnlineLearner, initialize, meta_gradient
from lossmeta.losses import (
    DistanceMixtureLoss,
    FocalWeightedLoss,
    LossNetwork,
    ParametricCrossEntropy,
    TaylorLoss,
    check_not_minimized,
)

KINDS = pytest.mark.parametrize("kind", [LossNetwork, TaylorLoss], ids=lambda kind: kind.__name__)
Batch = tuple[Tensor, Tensor]


def batch() -> Batch:
    return torch.randn(8, 4), torch.randint(3, (8,))


def call(loss: nn.Module) -> Tensor:
    return loss(torch.randn(8, 3, requires_grad=True), torch.randint(3, (8,)))


def warned(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if "as they were drawn" in str(w.message)]


# ---- Never minimised by mistake.


def test_an_unlearned_loss_says_so_once() -> None:
    loss = LossNetwork()
    with pytest.warns(UserWarning, match=r"^LossNetwork: ") as caught:
        call(loss)
    assert str(caught[0].message) == (
        "LossNetwork: a loss must be learned before it is minimised, got parameters as they were drawn; use "
        "residual=..., lossmeta.adalfl.initialize(loss, ...) or OnlineLearner, or load one"
    )
    assert caught[0].filename == __file__, "the line that called it"
    assert warned(lambda: call(loss)) == []
    with pytest.warns(UserWarning, match=r"^TaylorLoss: ") as caught:
        call(TaylorLoss(2))
    assert str(caught[0].message) == (
        "TaylorLoss: a loss must be learned before it is minimised, got parameters as they were drawn; use "
        "lossmeta.adalfl.initialize(loss, ...) or OnlineLearner, or load one"
    )
    assert caught[0].filename == __file__


@KINDS
def test_copies_are_objects_of_their_own(kind: Any) -> None:
    loss = kind()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss):
        assert len(warned(lambda other=other: call(other))) == 1
    loss.reset_parameters()
    assert len(warned(lambda: call(loss))) == 1, "drawn anew"


def learn(loss: nn.Module) -> None:
    model = nn.Linear(4, 3)
    OnlineLearner(model, SGD(model.parameters(), 0.1), loss, F.cross_entropy).step(batch())


def learn_nested(loss: nn.Module) -> None:
    model = nn.Linear(4, 3)
    both = nn.Sequential()
    both.network = loss
    both.forward = lambda pred, target: both.network(pred, target)  # type: ignore[method-assign]
    OnlineLearner(model, SGD(model.parameters(), 0.1), both, F.cross_entropy).step(batch())


def learn_offline(loss: nn.Module) -> None:
    initialize(loss, lambda: nn.Linear(4, 3), [batch()], [batch()], steps=1)


def learn_in_a_loop(loss: nn.Module) -> None:
    model = nn.Linear(4, 3)
    meta_gradient(model, SGD(model.parameters(), 0.1), loss, F.cross_entropy, batch(), batch())


def load_a_state(loss: nn.Module) -> None:
    loss.load_state_dict(type(loss)().state_dict())


def evaluate(loss: nn.Module) -> None:
    with torch.no_grad():
        call(loss)
    loss(torch.randn(8, 3), torch.randint(3, (8,)))
    loss.eval()
    call(loss)


@KINDS
@pytest.mark.parametrize("use", [learn, learn_nested, learn_offline, learn_in_a_loop, load_a_state])
def test_a_loss_that_is_learned_says_nothing(kind: Any, use: Callable[[nn.Module], None]) -> None:
    loss = kind()
    assert warned(lambda: use(loss)) == []
    assert warned(lambda: call(loss)) == []


@KINDS
def test_a_loss_that_is_only_looked_at_says_nothing(kind: Any, tmp_path: Path) -> None:
    loss = kind()
    assert warned(lambda: evaluate(loss)) == []
    assert len(warned(lambda: call(loss.train()))) == 1
    loss.save(tmp_path / "loss")
    assert warned(lambda: call(kind.load(tmp_path / "loss"))) == []


@KINDS
def test_a_state_of_something_else_loads_nothing(kind: Any) -> None:
    both = nn.ModuleDict({"model": nn.Linear(4, 3), "loss": kind()})
    both.load_state_dict(nn.ModuleDict({"model": nn.Linear(4, 3)}).state_dict(), strict=False)
    assert len(warned(lambda: call(both["loss"]))) == 1


def test_a_residual_is_a_start() -> None:
    assert warned(lambda: call(LossNetwork(residual="cross_entropy"))) == []


@KINDS
def test_what_is_unlearned_is_still_compiled(kind: Any) -> None:
    loss = kind()
    arguments = torch.randn(8, 3, requires_grad=True), torch.randint(3, (8,))
    compiled = torch.compile(copy.deepcopy(loss), backend="eager", fullgraph=True)
    value = compiled(*arguments)
    parameters = dict(loss.named_parameters())
    with pytest.warns(UserWarning, match="as they were drawn"):
        expected = torch.func.functional_call(loss, parameters, arguments)
    torch.testing.assert_close(value, expected)
    torch.func.grad(lambda pred: loss(pred, arguments[1]))(arguments[0].detach())


def test_a_module_of_before_the_warning_is_called_as_it_was() -> None:
    loss = LossNetwork(4)
    del loss.__dict__["_unlearned"]
    data = io.BytesIO()
    torch.save(loss, data)
    data.seek(0)
    assert warned(lambda: call(torch.load(data, weights_only=False))) == []


def test_finds_a_loss_in_a_training_optimizer() -> None:
    model, loss = nn.Linear(4, 3), LossNetwork(4)
    both = nn.ModuleDict({"model": model, "loss": loss})
    check_not_minimized(loss, SGD(model.parameters(), 0.1))
    check_not_minimized(ParametricCrossEntropy(3), Adam(both.parameters()))  # a buffer is no parameter
    groups = [{"params": model.parameters()}, {"params": [loss.hidden_weight]}]
    for optimizer, names in (
        (Adam(both.parameters()), "['input_weight', 'hidden_weight', 'output_weight']"),
        (Adam(groups), "['hidden_weight']"),
    ):
        with pytest.raises(ValueError, match=r"^check_not_minimized: ") as caught:
            check_not_minimized(loss, optimizer)
        assert str(caught.value) == (
            f"check_not_minimized: optimizer must not hold parameters of the loss, got {names}; make it of the model's "
            "alone, or freeze the loss: loss.requires_grad_(False)"
        )
    check_not_minimized(loss.requires_grad_(False), Adam(both.parameters()))


# ---- Φ stays in its range.


@pytest.mark.parametrize("learnable", [False, True])
def test_projects_onto_the_range(learnable: bool) -> None:
    for loss, low, high in (
        (DistanceMixtureLoss(learnable=learnable), 0.0, 1.0),
        (FocalWeightedLoss(learnable=learnable), 0.1, 10.0),
    ):
        with torch.no_grad():
            loss.phi[0], loss.phi[1] = -3.0, 30.0
        inside = loss.phi[2:].tolist()
        loss.project_()
        assert loss.phi.tolist() == [pytest.approx(low), high, *inside]
        assert loss.phi.requires_grad == learnable


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixture = DistanceMixtureLoss(learnable=True)
        self.focal = FocalWeightedLoss(learnable=True)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.mixture(pred, target) + self.focal(pred, target)


def ranges(loss: Both) -> list[float]:
    return [f(phi).item() for phi in (loss.mixture.phi, loss.focal.phi) for f in (torch.min, torch.max)]


def is_within(loss: Both) -> bool:
    low, high, cold, hot = ranges(loss)
    return low >= 0 and high <= 1 and cold >= torch.tensor(0.1) and hot <= 10


@pytest.mark.parametrize("device_step", [False, True], ids=["step", "step on the device"])
def test_a_learner_keeps_to_the_range(device_step: bool) -> None:
    model, loss = nn.Linear(4, 3), Both()
    learner = OnlineLearner(
        model,
        SGD(model.parameters(), 0.01),
        loss,
        FocalWeightedLoss(),
        meta_optimizer=SGD(loss.parameters(), 1e5),
    )
    for _ in range(3):
        before = ranges(loss)
        if device_step:
            learner._step_on_device(batch(), batch())
        else:
            assert learner.step(batch(), batch()).skipped is None
        assert ranges(loss) != before
        assert is_within(loss), ranges(loss)


def test_initialize_keeps_to_the_range() -> None:
    loss = Both()
    optimizer = SGD(loss.parameters(), 1e5)
    steps = []

    def progress(step: int, value: float) -> None:
        steps.append(is_within(loss))

    initialize(
        loss,
        lambda: nn.Linear(4, 3),
        [batch()],
        [batch()],
        FocalWeightedLoss(),
        steps=3,
        meta_optimizer=optimizer,
        progress=progress,
    )
    assert steps == [True] * 3
    assert loss.mixture.phi.tolist() != DistanceMixtureLoss().phi.tolist()
