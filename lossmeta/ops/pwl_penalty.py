"""Piecewise-linear regularisers (TuneLoss, Eq. 4): the value of one over all weights, and its slope, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmeta._checks import check_tensors
from lossmeta.ops._operator import Operator
from lossmeta.ops._precision import accumulation_dtype


def pwl_penalty(theta: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
    r"""Sum of a piecewise-linear function r over the weights: the regulariser of TuneLoss (Eq. 4).

    .. math:: \sum_{p=1}^{P} r(\theta_p), \qquad r(0) = 0, \qquad r'(\theta) = s_i
              \;\text{ for }\; a_{i-1} < \theta < a_i, \qquad a_{-1} = -\infty,\; a_X = \infty

    r is continuous. It is convex where the slopes do not decrease, which is not required. At a knot the slope is
    the mean of both sides. One knot at 0 and the slopes :math:`(-\lambda, \lambda)` make the L1 penalty.

    Value and slope come from the same pass over the weights; where no gradient is recorded, the value alone. The
    slope is kept for the backward pass. :func:`with_slope` adds it to a gradient at once, which is cheaper.

    Args:
        theta: the weights, ``[P]``; float32, float64, bfloat16 or float16 (read in float32).
        knots: :math:`a`, ``[X]``, finite and sorted, X from 0 on; any floating-point dtype. They are rounded to the
            precision in which ``theta`` is read: float64 for float64, else float32. Between equal knots lies nothing,
            and the slope there does not count.
        slopes: :math:`s`, ``[X + 1]``, finite; any floating-point dtype, rounded as the knots.

    Returns:
        The value, ``[]``, float64 for float64, else float32; it is summed in float64, in an order that depends on P
        alone. Differentiable in ``theta`` only; second derivatives are 0. A NaN makes the value and its own slope NaN.
        An infinite weight costs what r tends to, and has the outermost slope. The slope is kept in the dtype of
        ``theta``, for float16 in float32.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, for knots or slopes that require grad while gradients
            are recorded, and on the CPU for knots that are not sorted or not finite and slopes that are not finite. On
            a GPU the values are not looked at; the result is then meaningless.
        TypeError: for something that is not a tensor.

    Source:
        Streeter, *Learning Effective Loss Functions Efficiently*, 2019, section 1.2.

    Example:
        >>> theta = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
        >>> value = pwl_penalty(theta, torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0]))
        >>> value.item()
        3.0
        >>> value.backward()
        >>> theta.grad
        tensor([-1.,  0.,  1.])
    """
    _check(theta, knots, slopes)
    value: Tensor = _operator(theta, knots, slopes, _wants_slope(theta))
    return value


def with_slope(
    theta: Tensor, knots: Tensor, slopes: Tensor, *, add_to: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`pwl_penalty` and its slope without autograd, in one pass: what a training step needs.

    Args:
        theta, knots, slopes: as there. A coefficient of the penalty is a factor of the slopes.
        add_to: ``[P]``, of the dtype and device of ``theta``, such as its gradient: the slope is added to it in place,
            in float32 where that is half precision. It must not share memory with the inputs.

    Returns:
        The value, ``[]``, and ``add_to``, or without it the slope, ``[P]``, of the dtype of ``theta`` (float32 for
        float16). Neither requires grad.

    Raises:
        ValueError: as :func:`pwl_penalty`; and for an ``add_to`` that does not fit, requires grad while gradients are
            recorded, or overlaps an input; before anything is added.
        TypeError: for something that is not a tensor.

    Example:
        >>> weight, knots = torch.tensor([[0.5, -3.0]], requires_grad=True), torch.tensor([0.0])
        >>> (weight**2).sum().backward()
        >>> value, gradient = with_slope(
        ...     weight.flatten(), knots, torch.tensor([-1.0, 1.0]), add_to=weight.grad.view(-1)
        ... )
        >>> weight.grad
        tensor([[ 2., -7.]])
    """
    _check(theta, knots, slopes)
    if add_to is None:
        value, slope = _operator.without_autograd(theta, knots, slopes, True)
        return value, slope
    check_tensors("pwl_penalty", add_to=add_to)
    if add_to.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "pwl_penalty: add_to must not require grad while gradients are recorded, got one that does"
        )
    value = _operator_(add_to, theta, knots, slopes)
    torch.autograd.graph.increment_version(add_to)
    return value, add_to


def _check(theta: Tensor, knots: Tensor, slopes: Tensor) -> None:
    check_tensors("pwl_penalty", theta=theta, knots=knots, slopes=slopes)
    for name, tensor in (("knots", knots), ("slopes", slopes)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"pwl_penalty: {name} must not require grad while gradients are recorded, got some that do; the "
                f"penalty is differentiable in theta only: pass {name}.detach()"
            )


def _wants_slope(theta: Tensor) -> bool:
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and theta.requires_grad


def _reference(theta: Tensor, knots: Tensor, slopes: Tensor, with_slope: bool) -> Tensor:
    dtype = accumulation_dtype(theta.dtype)
    x, a, s = theta.to(dtype), knots.to(dtype).contiguous(), slopes.to(dtype)
    # Each interval hangs on its point that is nearest to 0, where r is summed from 0 outwards.
    zero, infinite = a.new_zeros(1), a.new_full((1,), torch.inf)
    low, high = torch.cat([-infinite, a]), torch.cat([a, infinite])
    anchors = torch.maximum(low, high.clamp(max=0))
    right = a >= 0
    rise = torch.where(right, s[:-1], s[1:]).double() * (
        a.double() - torch.where(right, low[:-1].clamp(min=0), high[1:].clamp(max=0)).double()
    )
    at_knots = torch.where(
        right, rise.where(right, 0).cumsum(0), rise.where(~right, 0).flip(0).cumsum(0).flip(0)
    ).to(dtype)
    values = torch.where(low > 0, torch.cat([zero, at_knots]), torch.cat([at_knots, zero]).where(high < 0, 0))

    def piece(interval: Tensor) -> Tensor:
        slope, distance = s[interval].where(~x.isnan(), torch.nan), x - anchors[interval]
        # A flat end is flat up to infinity.
        return values[interval] + slope * distance.where((slope != 0) | ~distance.isinf(), 0)

    below, at = (torch.searchsorted(a, x.detach().contiguous(), right=r) for r in (False, True))
    return (0.5 * piece(below) + 0.5 * piece(at)).sum(dtype=torch.float64).to(dtype)


def _fake(theta: Tensor, knots: Tensor, slopes: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(theta.dtype)
    return (
        theta.new_empty((), dtype=dtype),
        theta.new_empty(
            theta.shape if with_slope else (0,), dtype=dtype if theta.dtype == torch.float16 else theta.dtype
        ),
    )


def _reference_(add_to: Tensor, theta: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
    slope, value = torch.func.grad_and_value(lambda t: _reference(t, knots, slopes, True))(
        theta.detach().to(accumulation_dtype(theta.dtype))
    )
    with torch.no_grad():
        add_to.copy_(add_to + slope)
    result: Tensor = value
    return result


def _fake_(add_to: Tensor, theta: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
    return theta.new_empty((), dtype=accumulation_dtype(theta.dtype))


_operator = Operator("pwl_penalty", reference=_reference, fake=_fake, differentiable=(0,), num_tensors=3)
_operator_ = Operator("pwl_penalty_", reference=_reference_, fake=_fake_)
