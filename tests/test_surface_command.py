"""`lossmeta surface` says what is in the file, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lossmeta.cli import app
from lossmeta.landscape import LossSurface


@pytest.fixture
def file(tmp_path: Path) -> Path:
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    evaluated = torch.ones(5, 5, dtype=torch.bool)
    evaluated[1, 1] = False
    losses = x[:, None] ** 2 + x[None] ** 2
    losses[0, 0] = torch.nan
    LossSurface(losses, x, x, evaluated, 7, 0.001).save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_says_what_it_is(file: Path) -> None:
    result = CliRunner().invoke(app, ["surface", str(file)])
    assert result.exit_code == 0, result.output
    assert "5 x 5 points, the mean over 7 samples each" in result.output
    assert "loss: 0 to 2" in result.output
    assert "not finite: 1 points" in result.output
    assert "interpolated: 1 points, off by 0.001 or so at most" in result.output
    expected = LossSurface.load(file)
    assert f"mean Gaussian curvature: {expected.nonconvexity():.6g}" in result.output
    assert "share of saddle points: 0.0%" in result.output


@pytest.mark.parametrize("kind", ["contour", "3d", "curvature"])
def test_draws(file: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    picture = file.with_suffix(f".{kind}.png")
    result = CliRunner().invoke(app, ["surface", str(file), "--kind", kind, "--output", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 5000


def test_a_line(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    LossSurface(x**2, x, None, torch.ones(5, dtype=torch.bool), 7).save(tmp_path / "a.safetensors")
    result = CliRunner().invoke(app, ["surface", str(tmp_path / "a.safetensors")])
    assert result.exit_code == 0 and "5 points" in result.output and "curvature" not in result.output


def test_what_cannot_be_read_or_written(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "b").write_text("no surface")
    for name in ("b", "nowhere"):
        result = CliRunner().invoke(app, ["surface", str(tmp_path / name)])
        assert result.exit_code == 2 and "Traceback" not in result.output
    (tmp_path / "folder.png").mkdir()
    for output in ("folder.png", "a.pie"):
        result = CliRunner().invoke(app, ["surface", str(file), "--output", str(tmp_path / output)])
        assert result.exit_code == 1 and "could not be written" in result.output
