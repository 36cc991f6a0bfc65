"""What the losses with Φ draw of themselves."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.losses import DistanceMixtureLoss, FocalWeightedLoss, ParametricCrossEntropy

F64 = torch.float64


@pytest.fixture(autouse=True)
def _with_matplotlib() -> None:
    pytest.importorskip("matplotlib")


def lines(axis: Any) -> tuple[Tensor, Tensor]:
    (line,) = axis.get_lines()
    return torch.tensor(line.get_xdata(), dtype=F64), torch.tensor(line.get_ydata(), dtype=F64)


@pytest.mark.parametrize("learnable", [False, True])
def test_class_correlations_are_a_picture(learnable: bool, tmp_path: Path) -> None:
    loss = ParametricCrossEntropy(3, learnable=learnable)
    with torch.no_grad():
        loss.phi[0, 2] = -0.5
    figure = loss.plot()
    panel, bar = figure.axes
    (picture,) = panel.get_images()
    assert picture.get_array().tolist() == loss.phi.tolist()
    assert picture.get_clim() == (-1, 1), "0 in the middle"
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("class", "true class")
    assert bar.get_ylabel() == "Φ"
    assert all(tick == int(tick) for tick in (*panel.get_xticks(), *panel.get_yticks()))
    figure.savefig(tmp_path / "phi.png")


@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
def test_the_identity_is_drawn_as_a_loss_and_its_slope(activation: str) -> None:
    figure = ParametricCrossEntropy(5, activation=activation, weight=torch.rand(5)).plot()
    value, slope = figure.axes
    p, y = lines(value)
    expected = {"sigmoid": -p / (1 + p), "identity": -p.log()}[activation]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lines(slope)[0], p)
    by_logit = {"sigmoid": -p / (1 + p) ** 2 * (1 - p), "identity": p - 1}[activation]
    torch.testing.assert_close(lines(slope)[1], by_logit, rtol=1e-6, atol=1e-6)
    assert value.get_xlabel() == slope.get_xlabel() == "probability of the true class"
    assert [axis.get_title() for axis in figure.axes] == ["loss", "slope in the logit of the true class"]


def test_several_models_are_not_drawn() -> None:
    loss = ParametricCrossEntropy(3)
    loss.phi = torch.ones(4, 3, 3)
    with pytest.raises(
        ValueError,
        match=r"^ParametricCrossEntropy: phi must be \[C, C\] to be drawn, got \[4, 3, 3\]; draw one at a time$",
    ):
        loss.plot()


def test_mixture_over_the_distance() -> None:
    loss = DistanceMixtureLoss(learnable=True, min_distance=0.2, reduction="sum", dtype=F64)
    with torch.no_grad():
        loss.phi.copy_(torch.rand(10))
    phi = loss.phi.detach()
    near, far = loss.plot().axes
    d, y = lines(near)
    assert (d[0], d[-1]) == (0.1, 2)
    terms = [d**2, d**2.5, d**1.5, 0.5 * (0.6 * d**2).exp() - 0.5, 0.5 * (0.6 * d).exp() - 0.5]
    torch.testing.assert_close(y, phi[:5] @ torch.stack(terms))
    d, y = lines(far)
    c = d.clamp(min=0.2)
    torch.testing.assert_close(
        y, phi[5:] @ torch.stack([0.5 / c, 0.2 / c, 0.1 / c**2, -c.log(), -2 * c.log()])
    )
    assert [axis.get_title() for axis in (near, far)] == ["positive", "negative"]
    assert near.get_xlabel() == far.get_xlabel() == "distance"
    d, _ = lines(loss.plot((0.5, 3.0)).axes[1])
    assert (d[0], d[-1]) == (0.5, 3)


def test_focal_weighting_over_the_distance() -> None:
    loss = FocalWeightedLoss(offset=0.7, reduction="none", dtype=F64)
    loss.phi.copy_(torch.tensor([3.0, 0.5]))
    near, far = loss.plot((0.0, 1.5)).axes
    d, y = lines(near)
    assert (d[0], d[-1]) == (0, 1.5)
    torch.testing.assert_close(y, (1 + (3 * (d - 0.7)).exp()).log() / 3)
    torch.testing.assert_close(lines(far)[1], (1 + (-0.5 * (d - 0.7)).exp()).log() / 0.5)
    assert [axis.get_title() for axis in (near, far)] == ["positive", "negative"]


@pytest.mark.parametrize(
    "loss", [DistanceMixtureLoss(), FocalWeightedLoss()], ids=lambda loss: type(loss).__name__
)
def test_refuses_distances_that_are_none(loss: Any) -> None:
    name = type(loss).__name__
    for bad in ((1.0, 1.0), (-1.0, 1.0), (0.0, torch.inf)):
        message = f"{name}: distances must be (lowest, highest), finite and from 0 on, got {bad}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            loss.plot(bad)


@pytest.mark.parametrize(
    "loss",
    [ParametricCrossEntropy(3), DistanceMixtureLoss(), FocalWeightedLoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_without_matplotlib(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    name = type(loss).__name__
    message = rf'^{name}: matplotlib must be installed to draw, got none; pip install "lossmeta\[plot\]"$'
    with pytest.raises(ImportError, match=message):
        loss.plot()
    if isinstance(loss, ParametricCrossEntropy):
        loss.phi[0, 1] = 1
        with pytest.raises(ImportError, match=message):
            loss.plot()
