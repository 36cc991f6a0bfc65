from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from contract import assert_close, check_compiles, check_half, check_opcheck, check_strides, check_threads
from hypothesis import given
from torch import Tensor

from lossmeta.ops import perturb
from lossmeta.ops.perturb import _operator, _operator_out, _reference

# (B, K, P): single elements; partial and several vectors; several tiles; many directions; empty.
SIZES = [
    (1, 1, 1),
    (3, 2, 5),
    (2, 1, 17),
    (16, 2, 131),
    (5, 3, 1031),
    (4, 2, 20011),
    (2, 70, 300),
    (17, 2, 64),
    (0, 2, 7),
    (3, 0, 7),
    (3, 2, 0),
]


def inputs(
    points: int, count: int, parameters: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    return (
        torch.randn(parameters, dtype=dtype),
        torch.randn(count, parameters, dtype=dtype),
        torch.randn(points, count, dtype=dtype),
    )


def formula(base: Tensor, directions: Tensor, coefficients: Tensor) -> Tensor:
    points = []
    for row in coefficients.double():
        point = base.double()
        for c, direction in zip(row, directions.double(), strict=True):
            point = point + c * direction
        points.append(point)
    return torch.stack(points) if points else torch.empty(0, base.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_formula(size: tuple[int, int, int]) -> None:
    arguments = inputs(*size)
    assert_close(perturb(*arguments), formula(*arguments))
    assert_close(_reference(*arguments), formula(*arguments))
    single = tuple(t.float() for t in arguments)
    assert_close(perturb(*single).double(), formula(*single), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    base, directions, coefficients = inputs(3, 2, 37, dtype)
    for other in (torch.float32, torch.float64, torch.bfloat16):
        result = perturb(base, directions, coefficients.to(other))
        assert result.dtype == dtype
        # Summed exactly enough to be off by one rounding of the result.
        expected = formula(base, directions, coefficients.to(other))
        assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype: torch.dtype) -> None:
    check_half(perturb, lambda b, d, c: torch.addmm(b, c, d), dtype, *inputs(5, 3, 301))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_out(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    points, _, parameters = size
    arguments = inputs(*size, dtype)
    expected = perturb(*arguments)
    out = torch.full((points, parameters), 7.0, dtype=dtype)
    version = out._version
    result = perturb(*arguments, out=out)
    assert result is out
    assert out._version > version
    assert torch.equal(out, expected)
    # Rows of a larger tensor: what lies between them stays.
    wide = torch.full((points + 2, parameters + 3), 7.0, dtype=dtype)
    perturb(*arguments, out=wide[1:-1, 1:-2])
    assert torch.equal(wide[1:-1, 1:-2], expected)
    wide[1:-1, 1:-2] = 7
    assert (wide == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("offset", [0, 1, 15])
def test_large_out_is_streamed(dtype: torch.dtype, offset: int) -> None:
    """Above 16 MiB rows are written past the caches, from their first aligned element on."""
    parameters = (16 << 20) // dtype.itemsize // 3 + 5
    base, directions, coefficients = inputs(3, 2, parameters, dtype)
    buffer = torch.full((offset + 3 * (parameters + 2) + 1,), 7.0, dtype=dtype)
    out = buffer[offset : offset + 3 * (parameters + 2)].view(3, parameters + 2)[:, :parameters]
    perturb(base, directions, coefficients, out=out)
    # A short problem takes ordinary stores: the same bits.
    for start in (0, 1000, parameters - 1003):
        part = slice(start, start + 1003)
        assert torch.equal(out[:, part], perturb(base[part], directions[:, part], coefficients))
    assert_close(out, _reference(base, directions, coefficients))
    assert buffer[-1] == 7
    assert (buffer[offset : offset + 3 * (parameters + 2)].view(3, -1)[:, parameters:] == 7).all()


def test_contract() -> None:
    arguments = inputs(3, 2, 37, torch.float32)
    check_opcheck(_operator, *arguments)
    check_opcheck(_operator_out, *arguments, torch.empty(3, 37))
    check_compiles(perturb, *arguments)
    check_compiles(lambda b, d, c: perturb(b, d, c, out=b.new_empty(3, 37)) + 1, *arguments)
    check_strides(perturb, *arguments)
    check_strides(lambda b, d, c: perturb(b, d, c, out=b.new_empty(3, 37)), *arguments)
    check_threads(perturb, *inputs(4, 2, 200_003, torch.float32))
    check_threads(perturb, *inputs(40, 2, 110_003, torch.float32))  # streamed


def test_no_gradient() -> None:
    base, directions, coefficients = (t.requires_grad_() for t in inputs(3, 2, 37))
    assert not perturb(base, directions, coefficients).requires_grad
    assert not torch.compile(perturb, fullgraph=True)(base, directions, coefficients).requires_grad
    out = torch.empty(3, 37, dtype=torch.float64)
    assert not perturb(base, directions, coefficients, out=out).requires_grad
    with torch.no_grad():
        parameter = torch.nn.Parameter(out.clone())
        assert torch.equal(perturb(base, directions, coefficients, out=parameter.zero_()), out)
    with pytest.raises(ValueError, match=r"^perturb: out must not require grad while gradients are recorded"):
        perturb(base, directions, coefficients, out=parameter)
    # What autograd saved is known to be overwritten.
    leaf = torch.ones(3, 37, dtype=torch.float64, requires_grad=True)
    product = (leaf * out).sum()
    perturb(base, directions, coefficients, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_transforms() -> None:
    base, directions, _ = inputs(3, 2, 11)
    coefficients = torch.randn(4, 3, 2, dtype=torch.float64)
    actual = torch.func.vmap(perturb, in_dims=(None, None, 0))(base, directions, coefficients)
    assert_close(actual, torch.stack([formula(base, directions, c) for c in coefficients]))
    # Forward-mode runs the reference: right, not silently zero.
    tangent = torch.randn(3, 2, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda c: perturb(base, directions, c), (coefficients[0],), (tangent,))
    assert_close(slope, tangent @ directions)


def test_autocast() -> None:
    arguments = inputs(3, 2, 37, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(perturb(*arguments), perturb(*arguments))
        assert_close(perturb(*arguments), formula(*arguments).float(), rtol=1e-5, atol=1e-5)


def test_not_finite() -> None:
    base, directions, coefficients = inputs(3, 2, 37)
    base[0], directions[0, 5], directions[1, 7], coefficients[1, 0] = torch.inf, torch.nan, -torch.inf, 0.0
    assert_close(perturb(base, directions, coefficients), formula(base, directions, coefficients))


def bad(**changes: Any) -> dict[str, Any]:
    good = {"base": torch.zeros(4), "directions": torch.zeros(2, 4), "coefficients": torch.zeros(3, 2)}
    return {**good, **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(base=torch.zeros(1, 4)), "base must be [P], got [1, 4]"),
        (
            bad(base=torch.zeros(4, dtype=torch.int64)),
            "base must be float32, float64, bfloat16 or float16, got int64",
        ),
        (bad(directions=torch.zeros(4)), "directions must be [K, 4], got [4]"),
        (bad(directions=torch.zeros(2, 5)), "directions must be [K, 4], got [2, 5]"),
        (
            bad(directions=torch.zeros(2, 4).double()),
            "directions must have the dtype of base, float32, got float64",
        ),
        (bad(coefficients=torch.zeros(2)), "coefficients must be [B, 2], got [2]"),
        (bad(coefficients=torch.zeros(3, 1)), "coefficients must be [B, 2], got [3, 1]"),
        (
            bad(coefficients=torch.zeros(3, 2, dtype=torch.int32)),
            "coefficients must be float32, float64, bfloat16 or float16, got int32",
        ),
        (bad(out=torch.zeros(3, 4).double()), "out must have the dtype of base, float32, got float64"),
        (bad(out=torch.zeros(3, 5)), "out must be [3, 4], got [3, 5]"),
        (bad(out=torch.zeros(12)), "out must be [3, 4], got [12]"),
        (bad(out=torch.zeros(4, 3).T), "the rows of out must be contiguous and apart, got strides [1, 3]"),
        (
            bad(out=torch.zeros(4).expand(3, 4)),
            "the rows of out must be contiguous and apart, got strides [0, 1]",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^perturb: ") as error:
        perturb(**arguments)
    assert str(error.value).startswith(f"perturb: {message}")


def test_overlap() -> None:
    base, directions, coefficients = inputs(3, 2, 4)
    memory = torch.zeros(100, dtype=torch.float64)
    for name, arguments in (
        ("base", (memory[8:12], directions, coefficients)),
        ("directions", (base, memory[11:19].view(2, 4), coefficients)),
        ("coefficients", (base, directions, memory[0:6].view(3, 2))),
        ("base", (memory[11:18:2], directions, coefficients)),
    ):
        with pytest.raises(ValueError, match=f"^perturb: out must not share memory with {name};"):
            perturb(*arguments, out=memory[:12].view(3, 4))
    assert not memory.any()
    # Between the rows of out there may be anything.
    rows = memory[:18].view(3, 6)
    expected = perturb(memory[4:6].clone(), directions[:, :2], coefficients)
    assert torch.equal(perturb(memory[4:6], directions[:, :2], coefficients, out=rows[:, :2]), expected)


@given(st.integers(0, 20), st.integers(0, 5), st.integers(0, 300), st.integers(0, 2**32))
def test_property(points: int, count: int, parameters: int, seed: int) -> None:
    torch.manual_seed(seed)
    arguments = inputs(points, count, parameters)
    assert_close(perturb(*arguments), _reference(*arguments), rtol=1e-12, atol=1e-13)
