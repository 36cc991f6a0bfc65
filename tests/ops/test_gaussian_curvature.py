from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from contract import assert_close, check_compiles, check_half, check_opcheck, check_strides, check_threads
from hypothesis import given
from torch import Tensor

from lossmeta.ops import gaussian_curvature
from lossmeta.ops.gaussian_curvature import _operator, _reference

# One point, one row, one column; partial, full and overlapping vectors; a remainder of the row blocks.
SHAPES = [(3, 3), (3, 40), (40, 3), (4, 10), (5, 17), (6, 18), (7, 19), (11, 34), (23, 67)]


def formula(surface: Tensor, dx: float, dy: float) -> Tensor:
    """The definition, point by point in Python floats."""
    f = surface.double().tolist()
    rows, columns = surface.shape
    result = torch.empty(rows - 2, columns - 2, dtype=torch.float64)
    for i in range(1, rows - 1):
        for j in range(1, columns - 1):
            fx, fy = (f[i + 1][j] - f[i - 1][j]) / (2 * dx), (f[i][j + 1] - f[i][j - 1]) / (2 * dy)
            fxx = (f[i + 1][j] - 2 * f[i][j] + f[i - 1][j]) / dx**2
            fyy = (f[i][j + 1] - 2 * f[i][j] + f[i][j - 1]) / dy**2
            fxy = (f[i + 1][j + 1] - f[i + 1][j - 1] - f[i - 1][j + 1] + f[i - 1][j - 1]) / (4 * dx * dy)
            result[i - 1, j - 1] = (fxx * fyy - fxy**2) / (1 + fx**2 + fy**2) ** 2
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape: tuple[int, int]) -> None:
    surface = torch.randn(shape, dtype=torch.float64)
    for dx, dy in ((0.7, 0.7), (0.5, 2.0)):
        assert_close(gaussian_curvature(surface, dx, dy), formula(surface, dx, dy))
        assert_close(_reference(surface, dx, dy), formula(surface, dx, dy))
        single = surface.float()
        assert_close(
            gaussian_curvature(single, dx, dy).double(), formula(single, dx, dy), rtol=1e-4, atol=1e-4
        )


def test_known_surfaces() -> None:
    x = torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]
    y = torch.linspace(-0.5, 0.5, 51, dtype=torch.float64)
    sphere = gaussian_curvature((9 - x**2 - y**2).sqrt(), 0.01, 0.02)
    assert_close(sphere, torch.full_like(sphere, 1 / 9), rtol=1e-4, atol=0)
    saddle = (-1 / (1 + x**2 + y**2) ** 2)[1:-1, 1:-1]
    assert_close(gaussian_curvature(x * y, 0.01, 0.02), saddle, rtol=1e-9, atol=1e-12)
    cylinder = gaussian_curvature((x**2).expand(-1, 51), 0.01, 0.02)
    assert_close(cylinder, torch.zeros_like(cylinder), rtol=0, atol=1e-9)


def test_rows_are_x() -> None:
    i = torch.arange(5.0, dtype=torch.float64)
    surface = torch.exp(0.3 * i)[:, None] * (1 + 0.1 * i[:4]) ** 2
    result = gaussian_curvature(surface, 1.0, 3.0)
    assert_close(gaussian_curvature(surface.T, 3.0, 1.0), result.T)
    assert not torch.allclose(gaussian_curvature(surface, 3.0, 1.0), result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    surface = torch.randn(9, 37).to(dtype)
    result = gaussian_curvature(surface, 1.0, 1.0)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(result.double(), formula(surface, 1.0, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype: torch.dtype) -> None:
    def eager(f: Tensor) -> Tensor:
        fx, fy = (f[2:, 1:-1] - f[:-2, 1:-1]) / 2, (f[1:-1, 2:] - f[1:-1, :-2]) / 2
        fxx = f[2:, 1:-1] - 2 * f[1:-1, 1:-1] + f[:-2, 1:-1]
        fyy = f[1:-1, 2:] - 2 * f[1:-1, 1:-1] + f[1:-1, :-2]
        fxy = (f[2:, 2:] - f[2:, :-2] - f[:-2, 2:] + f[:-2, :-2]) / 4
        return (fxx * fyy - fxy**2) / (1 + fx**2 + fy**2) ** 2

    check_half(
        lambda f: gaussian_curvature(f, 1.0, 1.0), eager, dtype, torch.randn(8, 40, dtype=torch.float64)
    )


def test_offset_loses_nothing() -> None:
    """A large mean loss does not drown its curvature: neighbouring samples are subtracted first."""
    surface = torch.randn(6, 21).mul(1024).round() / 1024
    assert_close(
        gaussian_curvature(surface + 1024, 1.0, 1.0), gaussian_curvature(surface, 1.0, 1.0), rtol=0, atol=0
    )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_not_finite(bad: float) -> None:
    surface = torch.randn(9, 40, dtype=torch.float64)
    surface[4, 20] = bad
    result, expected = gaussian_curvature(surface, 1.0, 1.0), formula(surface, 1.0, 1.0)
    assert_close(result.isfinite(), expected.isfinite())
    assert_close(result, expected)


def test_contract() -> None:
    surface = torch.randn(13, 45)
    check_opcheck(_operator, surface, 0.5, 2.0)
    check_opcheck(_operator, surface.double().T, 0.5, 2.0)
    check_compiles(lambda f: gaussian_curvature(f, 0.5, 2.0), surface)
    check_strides(lambda f: gaussian_curvature(f, 0.5, 2.0), surface)
    check_threads(lambda f: gaussian_curvature(f, 0.5, 2.0), torch.randn(513, 300))


def test_no_gradient() -> None:
    surface = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert not gaussian_curvature(surface, 1.0, 1.0).requires_grad
    assert not torch.compile(gaussian_curvature, fullgraph=True)(surface, 1.0, 1.0).requires_grad
    assert not torch.func.grad(lambda f: gaussian_curvature(f, 1.0, 1.0).sum())(surface.detach()).any()


def test_transforms() -> None:
    batch = torch.randn(3, 5, 6, dtype=torch.float64)
    actual = torch.func.vmap(lambda f: gaussian_curvature(f, 0.5, 2.0))(batch)
    assert_close(actual, torch.stack([formula(f, 0.5, 2.0) for f in batch]))
    # Forward-mode runs the reference: right, not silently zero.
    surface, tangent = batch[0], batch[1]
    _, slope = torch.func.jvp(lambda f: gaussian_curvature(f, 0.5, 2.0), (surface,), (tangent,))
    step = 1e-6
    difference = formula(surface + step * tangent, 0.5, 2.0) - formula(surface - step * tangent, 0.5, 2.0)
    assert_close(slope, difference / (2 * step), rtol=1e-6, atol=1e-7)


def test_autocast() -> None:
    surface = torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(
            gaussian_curvature(surface, 1.0, 1.0), gaussian_curvature(surface, 1.0, 1.0), rtol=0, atol=0
        )
        assert gaussian_curvature(surface, 1.0, 1.0).dtype == torch.float32


@pytest.mark.parametrize("spacing", [0.0, -1.0, math.inf, math.nan])
def test_bad_spacing(spacing: float) -> None:
    surface = torch.zeros(3, 3)
    for name, arguments in (("dx", (spacing, 1.0)), ("dy", (1.0, spacing))):
        with pytest.raises(
            ValueError, match=f"^gaussian_curvature: {name} must be positive and finite, got {spacing}$"
        ):
            gaussian_curvature(surface, *arguments)
        with pytest.raises(RuntimeError, match=f"gaussian_curvature: {name} must be positive and finite"):
            torch.ops.lossmeta.gaussian_curvature(surface, *arguments)


@pytest.mark.parametrize("shape", [(), (9,), (2, 3), (3, 2), (0, 5), (1, 3, 3)], ids=str)
def test_bad_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^gaussian_curvature: ") as error:
        gaussian_curvature(torch.zeros(shape), 1.0, 1.0)
    assert str(error.value).startswith(
        f"gaussian_curvature: surface must be [G, H] with G, H >= 3, got {list(shape)}"
    )


def test_bad_dtype() -> None:
    with pytest.raises(ValueError, match="surface must be float32, float64, bfloat16 or float16, got int64"):
        gaussian_curvature(torch.zeros(3, 3, dtype=torch.int64), 1.0, 1.0)


@given(
    st.integers(3, 40),
    st.integers(3, 40),
    st.floats(0.01, 100),
    st.floats(0.01, 100),
    st.integers(0, 2**32),
)
def test_property(rows: int, columns: int, dx: float, dy: float, seed: int) -> None:
    surface = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = _reference(surface, dx, dy)
    scale = expected.abs().max().item()
    assert_close(gaussian_curvature(surface, dx, dy), expected, rtol=1e-10, atol=1e-12 * scale)
