"""The loss of a space as a module: what it is, moving it, states, copies and modes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lossmeta.ala import (
    ClassCorrelation,
    ContrastiveShape,
    DistanceMixture,
    FocalWeighting,
    LogitAdjustment,
    LossSpace,
    Robust,
    Smoothing,
    SpaceLoss,
)

CLASSES = 3
SPACES: dict[str, Any] = {
    "correlation": lambda: ClassCorrelation(CLASSES),
    "robust": Robust,
    "product": lambda: LogitAdjustment(torch.tensor([5, 3, 1])) * Robust() * Smoothing(),
    "mixture": DistanceMixture,
    "focal": FocalWeighting,
    "contrastive": ContrastiveShape,
}


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, CLASSES, generator=generator, dtype=dtype), torch.arange(9) % CLASSES


def somewhere(space: LossSpace, seed: int = 0) -> dict[str, Any]:
    """Values between the bounds."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    for p in space.parameters:
        v = p.low + (p.high - p.low) * torch.rand(p.count, generator=generator, dtype=torch.float64)
        found[p.name] = v if p.size is not None else float(v)
    return found


def close(a: SpaceLoss, b: SpaceLoss) -> bool:
    return all(torch.allclose(v, b.values[name], rtol=1e-12, atol=1e-12) for name, v in a.values.items())


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_is_the_spaces(kind: str, dtype: torch.dtype) -> None:
    space = SPACES[kind]()
    found = somewhere(space)
    loss = SpaceLoss(space, **found)
    prediction, target = batch(dtype)
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    values = {name: torch.as_tensor(v).to(accurate) for name, v in found.items()}
    for _ in range(2):  # the second time from what is kept
        x, y = (prediction.clone().requires_grad_() for _ in range(2))
        ours, theirs = loss(x, target), space(y, target, values)
        torch.testing.assert_close(ours, theirs)
        ours.backward()
        theirs.backward()
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kind", SPACES)
def test_at_first_the_defaults_hold(kind: str) -> None:
    loss = SpaceLoss(SPACES[kind]())
    for p in loss.space.parameters:
        assert loss.values[p.name].reshape(-1).tolist() == pytest.approx(list(p.defaults))
        assert loss.values[p.name].dtype == torch.float64
    assert not list(loss.parameters()) and not list(loss.buffers())
    assert loss.space.parameters[0].name in repr(loss)


def test_a_move_holds_from_the_next_call_on() -> None:
    loss = SpaceLoss(Robust())
    prediction, target = batch()
    before = loss(prediction, target)
    loss.move_to(q=1.0)
    p = torch.softmax(prediction, 1).gather(1, target[:, None])
    torch.testing.assert_close(loss(prediction, target), (1 - p).mean())
    loss.move_to(q=0)
    assert loss(prediction, target) == before
    loss = SpaceLoss(ClassCorrelation(CLASSES))
    loss.move_to(diagonal=0.5)
    loss.move_to(pairs=[0.1, 0.2, -0.3])
    assert loss.values["diagonal"].tolist() == [0.5] * 3
    assert loss.values["pairs"].tolist() == pytest.approx([0.1, 0.2, -0.3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"q": 1.5}, r"q must lie in \[0.0, 1.0\], got 1.5"),
        ({"q": float("nan")}, "q must lie in"),
        ({"margin": [0.0, 9.0, 0.0]}, "margin must lie in"),
        ({"margin": [0.0, 0.0]}, r"margin must be \[3\], got \[2\]"),
        ({"smoothing": 0.1}, "must have a parameter 'smoothing'"),
    ],
)
def test_moves_that_are_refused_move_nothing(values: dict[str, Any], message: str) -> None:
    space = Robust() * LogitAdjustment(torch.ones(3))
    loss = SpaceLoss(space, q=0.25)
    with pytest.raises(ValueError, match=f"SpaceLoss: .*{message}"):
        loss.move_to(tau=1.0, **values)
    assert loss.values["q"].item() == pytest.approx(0.25) and loss.values["tau"] == 0
    with pytest.raises(ValueError, match=message):
        SpaceLoss(space, **values)
    with pytest.raises(ValueError, match=message):
        loss.load_state_dict({"_extra_state": {"tau": torch.tensor(1.0), **values}})
    assert loss.values["tau"] == 0


def test_refuses() -> None:
    with pytest.raises(TypeError, match="SpaceLoss: space must be a LossSpace, got CrossEntropyLoss"):
        SpaceLoss(nn.CrossEntropyLoss())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="space must have at least one parameter"):
        SpaceLoss(LossSpace())
    with pytest.raises(TypeError):
        SpaceLoss(Robust(), q="much")


@given(st.sampled_from(sorted(SPACES)), st.integers(0, 10**6))
def test_states(kind: str, seed: int) -> None:
    loss = SpaceLoss(SPACES[kind]())
    start = copy.deepcopy(loss.state_dict())
    loss.move_to(**somewhere(loss.space, seed))
    file = io.BytesIO()
    model = nn.ModuleDict({"loss": loss})
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = nn.ModuleDict({"loss": SpaceLoss(SPACES[kind]())})
    other["loss"](*batch())  # what is kept of the values that held before is let go
    other.load_state_dict(torch.load(file, weights_only=True))
    assert close(loss, other["loss"])  # type: ignore[arg-type]
    torch.testing.assert_close(loss(*batch()), other["loss"](*batch()))
    loss.load_state_dict(start)
    assert close(loss, SpaceLoss(SPACES[kind]()))


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_apart(kind: str, how: str) -> None:
    loss = SpaceLoss(SPACES[kind](), **somewhere(SPACES[kind]()))
    before = loss(*batch())
    if how == "deepcopy":
        other = copy.deepcopy(loss)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(loss))
    else:
        file = io.BytesIO()
        torch.save(loss, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other(*batch()) == before
    other.move_to(**somewhere(loss.space, 5))
    assert loss(*batch()) == before and not close(loss, other)


@pytest.mark.parametrize("kind", SPACES)
def test_moving_the_module_does_no_harm(kind: str) -> None:
    loss = SpaceLoss(SPACES[kind](), **somewhere(SPACES[kind]()))
    before, values = loss(*batch()), loss.values
    for moved in (
        loss.to("meta"),
        loss.half(),
        loss.double(),
        loss.to(torch.bfloat16),
        loss.cpu(),
        loss.eval(),
    ):
        assert moved is loss and moved(*batch()) == before
    assert all(torch.equal(v, values[name]) for name, v in loss.values.items())


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_first_call_without_gradients(kind: str, mode: Any) -> None:
    """As of a validation loss before the training: gradients and statistics are as ever."""
    space = SPACES[kind]()
    loss, (prediction, target) = SpaceLoss(space), batch()
    with mode():
        found = loss(prediction, target)
    x = prediction.clone().requires_grad_()
    trained = loss(x, target)
    trained.backward()
    assert trained == found and x.grad is not None and x.grad.abs().sum() > 0
    space.statistics(prediction, target, loss.placed(prediction))
    if kind in ("product", "robust"):
        values = {name: v[None] for name, v in loss.placed(prediction).items()}
        torch.func.grad(lambda p: space.loss(p, target, loss.placed(prediction)))(prediction)
        assert space.of_children(prediction[None], target, values)[0].isfinite().all()


@pytest.mark.parametrize("kind", SPACES)
def test_compiled_with_the_model(kind: str) -> None:
    torch._dynamo.reset()
    model, loss = nn.Linear(4, CLASSES), SpaceLoss(SPACES[kind]())
    x, target = torch.randn(9, 4), batch()[1]

    def both(x: Tensor, target: Tensor) -> Tensor:
        return loss(model(x), target)

    compiled = torch.compile(both, backend="eager")
    for seed in range(4):
        loss.move_to(**somewhere(loss.space, seed))
        found, expected = compiled(x, target), both(x, target)
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            torch.autograd.grad(found, list(model.parameters())),
            torch.autograd.grad(expected, list(model.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_other_defaults_of_pytorch() -> None:
    prediction, target = batch()
    expected = {
        kind: SpaceLoss(make())(prediction, target) for kind, make in SPACES.items() if kind != "product"
    }
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        found = {kind: SpaceLoss(SPACES[kind]())(prediction, target) for kind in expected}
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for kind, loss in found.items():
        assert loss.device.type == "cpu" and loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[kind])
