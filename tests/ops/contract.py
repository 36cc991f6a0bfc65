"""What every operator promises, as checks that its tests call on their own inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lossmeta.ops._operator import Operator


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _weights(o: Tensor) -> Tensor:
    return torch.linspace(-1, 2, o.numel(), dtype=o.dtype, device=o.device).reshape(o.shape)


def with_gradients(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The outputs of ``function`` and its gradients for a fixed incoming gradient, at copies of ``tensors``."""
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad) for t in tensors
    ]
    outputs = as_tuple(function(*leaves))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not wanted:
        return outputs
    differentiable = [o for o in outputs if o.requires_grad]
    weights = [_weights(o) for o in differentiable]
    return (*(o.detach() for o in outputs), *torch.autograd.grad(differentiable, wanted, weights))


def assert_close(actual: Any, expected: Any, **tolerances: float) -> None:
    for a, e in zip(as_tuple(actual), as_tuple(expected), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, check_dtype=False, **tolerances)


def check_opcheck(operator: Operator, *args: Any) -> None:
    """All four tests of ``torch.library.opcheck``, for the operator and its backward operator."""
    torch.library.opcheck(operator.op, args)
    if not operator.differentiable:
        return
    results = as_tuple(operator.op(*(a.detach() if isinstance(a, Tensor) else a for a in args)))
    grads = [torch.ones_like(r).requires_grad_() for r in results[: operator.num_outputs]]
    saved = results[operator.num_outputs :]
    needs = [args[i] is not None and args[i].requires_grad for i in operator.differentiable]
    assert any(needs), "the arguments of opcheck must require a gradient"
    torch.library.opcheck(operator.backward_op, (*grads, *args, *saved, *needs))


def check_compiles(function: Callable[..., Any], *tensors: Tensor, **tolerances: float) -> None:
    """``torch.compile(fullgraph=True)`` gives the same results and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    assert_close(with_gradients(compiled, *tensors), with_gradients(function, *tensors), **tolerances)


def strided(t: Tensor) -> Tensor:
    """The same values with other strides: every second element of a larger, transposed tensor."""
    if t.dim() == 0:
        return t
    big = torch.zeros([2 * s for s in reversed(t.shape)], dtype=t.dtype, device=t.device).permute(
        *reversed(range(t.dim()))
    )
    view = big[tuple(slice(None, None, 2) for _ in range(t.dim()))]
    view.copy_(t.detach())
    assert view.numel() < 2 or not view.is_contiguous()
    return view.requires_grad_(t.requires_grad)


def check_strides(function: Callable[..., Any], *tensors: Tensor, **tolerances: float) -> None:
    """Arguments and incoming gradients of any strides, expanded ones included."""
    expected = with_gradients(function, *tensors)

    def grads(*leaves: Tensor) -> tuple[Tensor, ...]:
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        outputs = as_tuple(function(*leaves))
        if not wanted:
            return outputs
        differentiable = [o for o in outputs if o.requires_grad]
        weights = [_weights(o) for o in differentiable]
        return (
            *(o.detach() for o in outputs),
            *torch.autograd.grad(differentiable, wanted, [strided(w) for w in weights]),
        )

    assert_close(grads(*(strided(t) for t in tensors)), expected, **tolerances)
    # sum().backward() hands over an expanded gradient.
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    outputs = [o for o in as_tuple(function(*leaves)) if o.requires_grad]
    if wanted and outputs:
        dense = torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs], retain_graph=True)
        total = sum((o.sum() for o in outputs[1:]), outputs[0].sum())
        assert_close(torch.autograd.grad(total, wanted), dense, **tolerances)


def check_threads(function: Callable[..., Any], *tensors: Tensor) -> None:
    """The same bits for any number of threads and in every run."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = with_gradients(function, *tensors)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for a, e in zip(with_gradients(function, *tensors), expected, strict=True):
                assert torch.equal(a.nan_to_num(nan=1e30), e.nan_to_num(nan=1e30)), (
                    f"differs with {threads} threads"
                )
    finally:
        torch.set_num_threads(before)


def check_half(
    function: Callable[..., Any],
    composition: Callable[..., Any],
    dtype: torch.dtype,
    *tensors: Tensor,
    factor: float = 2.0,
) -> None:
    """Half precision: the error against float64 is at most ``factor`` times that of PyTorch's own composition.

    ``tensors`` are float64; those with a floating-point dtype are rounded to ``dtype`` first.
    """
    rounded = [
        t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors
    ]
    exact = [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in rounded
    ]
    expected = with_gradients(composition, *exact)
    ours, theirs = with_gradients(function, *rounded), with_gradients(composition, *rounded)
    for ours_i, theirs_i, expected_i in zip(ours, theirs, expected, strict=True):
        error = (ours_i.double() - expected_i).abs().max().item()
        allowed = (theirs_i.double() - expected_i).abs().max().item()
        # Where the composition happens to be exact, one rounding of the result is allowed.
        allowed = max(allowed, torch.finfo(dtype).eps * expected_i.abs().max().item())
        assert error <= factor * allowed, f"error {error:.3g}, PyTorch's {allowed:.3g}"


def check_transforms(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], x: Tensor, *, hessian: bool = True
) -> None:
    """``torch.func`` on a scalar function of ``x`` [N, ...] that treats the rows of ``x`` alike; float64."""
    x = x.detach()
    func = torch.func
    assert_close(func.grad(function)(x), func.grad(reference)(x))
    assert_close(func.jacrev(function)(x), func.jacrev(reference)(x))
    batch = torch.stack([x, 2 * x, -x])
    assert_close(func.vmap(function)(batch), func.vmap(reference)(batch))
    assert_close(func.vmap(func.grad(function))(batch), func.vmap(func.grad(reference))(batch))
    tangent = torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x)
    assert_close(func.jvp(function, (x,), (tangent,)), func.jvp(reference, (x,), (tangent,)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        actual = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
        expected = torch.autograd.forward_ad.unpack_dual(reference(dual)).tangent
        assert actual is not None
        assert_close(actual, expected)
    if hessian:
        assert_close(func.hessian(function)(x), func.hessian(reference)(x))


def check_gradients(function: Callable[..., Any], *tensors: Tensor, second: bool = True) -> None:
    """First (and second) derivatives against finite differences, float64."""
    inputs: Sequence[Tensor] = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    assert torch.autograd.gradcheck(function, inputs)
    if second:
        assert torch.autograd.gradgradcheck(function, inputs)
