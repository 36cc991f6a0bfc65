"""What the tests of the CUDA kernels share: inputs on the device, a judge, poisoned memory, side streams, graphs.

With ``LOSSMETA_CUDA_DRY=1`` the tests marked ``cuda`` run on CPU tensors, smaller ones where a CPU would take long:
a rehearsal that finds what is wrong with the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from contract import assert_close, with_gradients
from torch import Tensor

from lossmeta.ops._operator import Operator

DRY = os.environ.get("LOSSMETA_CUDA_DRY") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rows(count: int) -> int:
    """``count`` rows of a large case, a few in a rehearsal."""
    return min(count, 6) if DRY else count


def placed(tensors: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """The tensors on the device, floating-point ones as ``dtype``; what is no tensor stays."""
    return [
        t.detach()
        .to(DEVICE, dtype if dtype and t.is_floating_point() else t.dtype)
        .requires_grad_(t.requires_grad)
        if isinstance(t, Tensor)
        else t
        for t in tensors
    ]


def poison(like: Sequence[Tensor] = ()) -> None:
    """Fills memory that the allocator is about to hand out again, so that what is not written shows as NaN."""
    blocks = [torch.full_like(t, float("nan") if t.is_floating_point() else -1) for t in like]
    blocks += [torch.full((2**k,), 255, dtype=torch.uint8, device=DEVICE) for k in range(9, 26)]
    del blocks


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Bit for bit, NaN included."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a.isnan(), e.isnan()), f"{what}: NaN of result {i}"
        assert torch.equal(a.nan_to_num(), e.nan_to_num()), f"{what}: result {i} has other bits"


def judge(
    actual: Sequence[Tensor],
    theirs: Sequence[Tensor],
    expected: Sequence[Tensor],
    dtype: torch.dtype,
    bound: float = 0.0,
) -> None:
    """Against float64, at most twice the error of PyTorch's own composition in the same dtype.

    Where that happens to be exact, as float64 is here, some roundings of the largest element are allowed; ``bound`` is
    the stated relative error of an approximation.
    """
    roundings = {2: 1, 4: 16, 8: 10_000}[dtype.itemsize]
    for i, (a, t, e) in enumerate(zip(actual, theirs, expected, strict=True)):
        if not e.numel():
            assert a.shape == e.shape
            continue
        assert torch.equal(a.isnan(), e.isnan()), f"NaN of result {i}"
        error, allowed = ((x.double() - e).nan_to_num().abs().max().item() for x in (a, t))
        largest = e.nan_to_num().abs().max().item()
        allowed = max(allowed, roundings * torch.finfo(dtype).eps * largest)
        assert error <= 2 * allowed + bound * largest, (
            f"{dtype}, result {i}: error {error:.3g}, PyTorch's {allowed:.3g}, largest element {largest:.3g}"
        )


def check(
    function: Callable[..., Any],
    composition: Callable[..., Any],
    *tensors: Tensor,
    dtypes: Sequence[torch.dtype] = DTYPES,
    bounds: Callable[[torch.dtype], float] = lambda dtype: 0.0,
    capture: bool = True,
) -> None:
    """``function`` on the device, for float64 ``tensors``: values and gradients are right in every dtype; the same bits
    come again, in poisoned memory, on a side stream, and from a captured graph whose inputs have changed."""
    for dtype in dtypes:
        moved = placed(tensors, dtype)
        exact = [
            t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in moved
        ]
        first = with_gradients(function, *moved)
        expected, theirs = with_gradients(composition, *exact), with_gradients(composition, *moved)
        judge(first, theirs, expected, dtype, bounds(dtype))
        del expected, theirs, exact
        kept = [r.clone() for r in first]
        del first
        poison(kept)
        assert_same(with_gradients(function, *moved), kept, f"{dtype}, second run")
        if DRY:
            continue
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = with_gradients(function, *moved)
        torch.cuda.synchronize()
        assert_same(aside, kept, f"{dtype}, side stream")
        if capture:
            check_capture(function, *moved)


def check_capture(function: Callable[..., Any], *static: Tensor) -> None:
    """Forward and backward are captured in a CUDA graph, and replayed on other values give what a call gives."""
    fresh = [(t.detach().flip(0) if t.is_floating_point() else t.detach()).clone() for t in static]
    replay = captured(lambda: with_gradients(function, *static))
    with torch.no_grad():
        for s, f in zip(static, fresh, strict=True):
            s.copy_(f)
    actual = replay()
    assert_same(actual, with_gradients(function, *static), "replay")


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as a CUDA graph: each call of what is returned replays it, waits, and returns its results. In a
    rehearsal ``call`` itself."""
    if DRY:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Any:
        graph.replay()
        torch.cuda.synchronize()
        return results

    return replay


def check_operator(operator: Operator, *args: Any, **options: Any) -> None:
    """:func:`check` of an operator against its reference in plain PyTorch; tensors among ``args`` are float64."""
    where = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

    def with_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            filled = list(args)
            for i, t in zip(where, tensors, strict=True):
                filled[i] = t
            return function(*filled)

        return call

    check(with_arguments(operator), with_arguments(operator.reference), *(args[i] for i in where), **options)


__all__ = ["DEVICE", "DRY", "DTYPES", "assert_close", "captured", "check", "check_operator", "placed", "rows"]
