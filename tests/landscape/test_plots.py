"""Pictures: what is on them is what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lossmeta import plot
from lossmeta.landscape import LossSurface, plot_index, plot_surface

pytest.importorskip("matplotlib")


def surface(points: int = 9) -> LossSurface:
    x = torch.linspace(-1, 1, points, dtype=torch.float64)
    losses = x[:, None] ** 2 + 3 * x[None] ** 3
    return LossSurface(losses, x, x, torch.ones_like(losses, dtype=torch.bool), 10)


@pytest.mark.parametrize("kind", ["contour", "3d", "curvature"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_kind_is_drawn(kind: str, suffix: str, tmp_path: Path) -> None:
    drawing = surface().plot(kind=kind, title="digits")
    assert drawing.axes[0].get_title() == "digits"
    plot.save(drawing, tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").stat().st_size > 5000


def test_rows_are_the_first_direction() -> None:
    """On the map x runs to the right, as it runs down the rows of the losses."""
    (mesh,) = surface().plot(kind="curvature").axes[0].collections
    expected = surface().curvature().numpy().T
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(expected.shape), expected)
    assert surface().plot().axes[0].get_xlabel() == "along the first direction"


def test_a_line() -> None:
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    one = LossSurface(x**2, x, None, torch.ones(5, dtype=torch.bool), 1)
    (curve,) = one.plot().axes[0].lines
    np.testing.assert_array_equal(curve.get_ydata(), (x**2).numpy())


@pytest.mark.parametrize("kind", ["contour", "3d", "curvature"])
def test_holes_are_counted(kind: str) -> None:
    one = surface()
    one.losses[0, 0], one.losses[4, 4] = torch.nan, torch.inf
    assert one.plot(kind=kind).axes[0].get_title() == "2 of 81 points are not finite"
    one.losses[:] = torch.nan
    assert "81 of 81" in one.plot(kind=kind).axes[0].get_title()


def test_a_flat_surface_is_drawn() -> None:
    one = surface()
    one.losses[:] = 1.0
    for kind in ("contour", "3d", "curvature"):
        assert one.plot(kind=kind).axes[0].get_title() == ""
    assert one.plot().axes[0].get_xlim() == (-1, 1)
    with pytest.raises(ValueError, match=r"a curvature picture needs 3 × 3 points or more, got \[2, 2\]"):
        surface(2).plot(kind="curvature")


def test_a_path_over_a_contour() -> None:
    path = torch.tensor([[0.1, 0.2], [0.3, -0.4]])
    lines = plot_surface(surface(), path=path).axes[0].lines
    assert any(np.allclose(line.get_xydata(), path.numpy()) for line in lines if len(line.get_xdata()) == 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"path must have shape \[T, 2\], got \[3\]"):
        plot_surface(surface(), path=torch.zeros(3))
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'pie'"):
        plot_surface(surface(), kind="pie")


def test_an_index_by_epoch() -> None:
    histories = {f"training {i}": ([0, 1, 2], [0.1 * i, 0.2, 0.3]) for i in range(8)}
    drawing = plot_index(histories, label="mean curvature")
    (axes,), (legend,) = drawing.axes, drawing.legends
    assert [text.get_text() for text in legend.get_texts()] == list(histories)
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 8
    values: Tensor = torch.tensor(axes.lines[3].get_ydata())
    assert values.tolist() == pytest.approx([0.3, 0.2, 0.3])
