"""Snapshots of the learned loss, and what is drawn of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_problems import batches, mlp
from torch import Tensor, nn
from torch.optim import SGD

from lossmeta.adalfl import OnlineLearner, Snapshot, plot_loss
from lossmeta.losses import LossNetwork, ParametricCrossEntropy, TaylorLoss
from lossmeta.losses._plot import curves

F64 = torch.float64


def learner(**options: Any) -> OnlineLearner:
    model = mlp()
    loss = LossNetwork(8, dtype=F64)
    return OnlineLearner(model, SGD(model.parameters(), 0.1), loss, F.cross_entropy, **options)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_snapshots(tmp_path: Path) -> None:
    one = learner(snapshot_every=2, log_slope=True, meta_every=2)
    expected = [state(one.loss)]
    ratios = [None]
    pairs = list(zip(batches(5), batches(5), strict=True))
    for step, pair in enumerate(pairs[:4], 1):
        report = one.step(*pair)
        if step % 2 == 0:
            expected.append(state(one.loss))
            ratios.append(report.slope_ratio.item())  # type: ignore[union-attr]
    assert [s.step for s in one.history] == [0, 2, 4]
    assert [s.slope_ratio for s in one.history] == ratios
    for snapshot, values in zip(one.history, expected, strict=True):
        torch.testing.assert_close(snapshot.state, values, rtol=0, atol=0)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two = learner(snapshot_every=2)
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    two.step(*pairs[4])
    assert [s.step for s in two.history] == [0, 2, 4]
    torch.testing.assert_close(two.history[1].state, expected[1], rtol=0, atol=0)
    three = learner()
    before = [
        Snapshot(0, {n: v for n, v in s.state.items() if n != "_extra_state"}, None) for s in one.history
    ]
    assert len(plot_loss(before, three.loss).axes) == 3, "snapshots of before name no options"  # type: ignore[arg-type]
    assert learner().history == []
    with pytest.raises(ValueError, match=r"^OnlineLearner: snapshot_every must be at least 1, got 0$"):
        learner(snapshot_every=0)


def test_curve_is_the_loss_of_one_output() -> None:
    """Of C = 4 outputs with 0.7, 0.1, 0.1, 0.1 the first adds l(1, 0.7) / C, the others l(0, 0.1) / C."""
    probabilities, label = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=F64), torch.tensor([0])
    for loss in (LossNetwork(8, dtype=F64), TaylorLoss(dtype=F64)):
        f, values = curves("plot", loss, None, None)
        assert (f[0], f[-1], values.shape) == (0, 1, (2, len(f)))
        one, zero = values[0, 140], values[1, 20]
        torch.testing.assert_close((one + 3 * zero) / 4, loss(probabilities.log(), label))
    loss = LossNetwork(8, residual="cross_entropy", dtype=F64)
    with torch.no_grad():
        loss.output_weight.normal_()
    _, values = curves("plot", loss, None, 4)
    one, zero = values[0, 140], values[1, 20]
    torch.testing.assert_close(one + 3 * zero, loss(probabilities.log(), label))


def test_curve_of_a_regression() -> None:
    loss = LossNetwork(8, link="identity", residual="squared_error", reduction="none", dtype=F64)
    with torch.no_grad():
        loss.output_weight.normal_()
    f, values = curves("plot", loss, (-2.0, 3.0), None)
    assert (f[0], f[-1]) == (-2, 3)
    torch.testing.assert_close(values[0], loss(f, torch.ones_like(f)))
    torch.testing.assert_close(values[1], loss(f, torch.zeros_like(f)))


def test_draws_one_line_per_snapshot_from_dark_to_bright(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = learner(snapshot_every=1)
    for pair in zip(batches(3), batches(3), strict=True):
        one.step(*pair)
    one.loss.load_state_dict(one.history[1].state)
    before = state(one.loss)
    figure = plot_loss(one.history, one.loss)  # type: ignore[arg-type]
    torch.testing.assert_close(state(one.loss), before, rtol=0, atol=0)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["target 1", "target 0"]
    drawn = LossNetwork(8, dtype=F64)
    for row, axis in enumerate(panels):
        lines = axis.get_lines()
        assert len(lines) == 4
        brightness = [sum(line.get_color()[:3]) for line in lines]
        assert brightness == sorted(brightness)
        for snapshot, line in zip(one.history, lines, strict=True):
            drawn.load_state_dict(snapshot.state)
            assert line.get_ydata().tolist() == curves("plot", drawn, None, None)[1][row].tolist()
    figure.savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_draws_a_loss_as_it_is() -> None:
    pytest.importorskip("matplotlib")
    before = "matplotlib.pyplot" in sys.modules
    for loss in (TaylorLoss(), LossNetwork()):
        assert [len(axis.get_lines()) for axis in loss.plot().axes] == [1, 1]
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = r': matplotlib must be installed to draw, got none; pip install "lossmeta\[plot\]"$'
    with pytest.raises(ImportError, match="^LossNetwork" + message):
        LossNetwork().plot()
    with pytest.raises(ImportError, match="^plot_loss" + message):
        plot_loss([Snapshot(0, LossNetwork().state_dict(), None)], LossNetwork())


def test_bad_input() -> None:
    with pytest.raises(
        TypeError, match=r"loss must be a LossNetwork or TaylorLoss, got ParametricCrossEntropy$"
    ):
        plot_loss([Snapshot(0, {}, None)], ParametricCrossEntropy(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^plot_loss: history must hold at least one snapshot, got none"):
        plot_loss([], LossNetwork())
    with pytest.raises(
        ValueError, match=r"^plot_loss: history must hold snapshots of the loss, got others at step 7"
    ):
        plot_loss([Snapshot(7, TaylorLoss().state_dict(), None)], LossNetwork())
    regression = LossNetwork(link="identity")
    with pytest.raises(
        ValueError, match=r"^LossNetwork: predictions must be \(lowest, highest\) .*, got None$"
    ):
        regression.plot()
    with pytest.raises(ValueError, match=r"^LossNetwork: predictions must be .*, got \(1, 0\)$"):
        regression.plot((1, 0))
    with pytest.raises(ValueError, match=r"^LossNetwork: predictions are for link='identity', got \(0, 1\)$"):
        LossNetwork().plot((0, 1))
    with pytest.raises(
        ValueError, match=r"^LossNetwork: num_classes must be given with residual='cross_entropy'"
    ):
        LossNetwork(residual="cross_entropy").plot()
