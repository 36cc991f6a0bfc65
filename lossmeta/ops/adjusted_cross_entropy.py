"""The cross-entropy of shifted logits, made robust and smoothed, of one model or of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossmeta.ops._operator import Operator, looped
from lossmeta.ops._precision import accumulation_dtype


def adjusted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: Tensor | None = None,
    exponent: Tensor | None = None,
    smoothing: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Mean generalised cross-entropy of shifted logits with smoothed labels; of B models at once, each with its own.

    .. math::
        p = \mathrm{softmax}(x + m), \qquad s = -\log p_y, \qquad
        \ell = \frac{1 - e^{-q s}}{q}
             + \varepsilon \Bigl(\frac{1}{C} \sum_c -\log p_c - s\Bigr)

    Without parameters, and at :math:`m = q = \varepsilon = 0`, it is :func:`torch.nn.functional.cross_entropy`. At
    :math:`q = 1` the first term is the absolute error :math:`1 - p_y`; for small q nothing cancels.

    The derivative in the logits,
    :math:`e^{-qs} p_c - (e^{-qs} - \varepsilon) [c = y] - \varepsilon / C` over the number of samples, comes from the
    same pass over them. It is kept for the backward pass.

    Args:
        logits: :math:`x`, ``[N, C]``, or ``[B, N, C]`` of B models on the same samples; float32, float64, bfloat16 or
            float16 (computed and returned in float32).
        labels: :math:`y`, int64, ``[N]``.
        shift: :math:`m`, ``[C]``, or ``[B, C]`` with B models; ``None`` for 0.
        exponent: :math:`q` in [0, 1], ``[]``, or ``[B]`` with B models; ``None`` for 0.
        smoothing: :math:`\varepsilon` in [0, 1], ``[]``, or ``[B]`` with B models; ``None`` for 0.
        ignore_index: label of the samples to leave out.

    Returns:
        The mean over the samples that count, ``[]``, or ``[B]`` with B models; NaN without such a sample. A model's
        results have the same bits alone and among others. Differentiable in ``logits``, ``shift``, ``exponent`` and
        ``smoothing``; second derivatives run the reference formula. Kept for the backward pass: the derivative, in
        the dtype of the logits, for float16 in float32, and two numbers per model. The gradient in ``shift`` is its sum
        over the samples: with bfloat16 it has the roundings of these terms.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, labels outside [0, C), and an exponent or a smoothing
            outside [0, 1]. On CUDA, where looking would wait for the device, these make the loss NaN.
        TypeError: for something that is not a tensor.

    Example:
        >>> logits, labels = torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 3])
        >>> loss = adjusted_cross_entropy(logits, labels, exponent=torch.tensor(1.0))
        >>> loss.item()
        0.75
        >>> loss.backward()
    """
    parameters = _of_each_model(logits, shift, exponent, smoothing)
    return _operator(logits, labels, *parameters, ignore_index, _wants_slope(logits, shift))  # type: ignore[no-any-return]


def with_slope(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: Tensor | None = None,
    exponent: Tensor | None = None,
    smoothing: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """:func:`adjusted_cross_entropy` and its derivative in the logits without autograd, which costs as much again.

    Args:
        logits, labels: and all else as in :func:`adjusted_cross_entropy`.

    Returns:
        The loss as there, and the slope, of the shape and dtype of the logits (float32 for float16); 0 for samples that
        do not count.

    Example:
        >>> loss, slope = with_slope(torch.zeros(8, 2, 4), torch.tensor([0, 3]))
        >>> slope[0, 0].tolist()
        [-0.375, 0.125, 0.125, 0.125]
    """
    parameters = _of_each_model(logits, shift, exponent, smoothing)
    loss, slope, _ = _operator.without_autograd(logits, labels, *parameters, ignore_index, True)
    return loss, slope


def _of_each_model(
    logits: Tensor, shift: Tensor | None, exponent: Tensor | None, smoothing: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What the models share, expanded; what does not fit is left to the operator, which refuses it."""
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        return shift, exponent, smoothing
    return tuple(
        t.expand(len(logits), *t.shape) if isinstance(t, Tensor) and t.dim() == dim else t
        for t, dim in ((shift, 1), (exponent, 0), (smoothing, 0))
    )


def _wants_slope(logits: Tensor, shift: Tensor | None) -> bool:
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (logits, shift))


def _reference(
    logits: Tensor,
    labels: Tensor,
    shift: Tensor | None,
    exponent: Tensor | None,
    smoothing: Tensor | None,
    ignore_index: int,
    with_slope: bool,
) -> Tensor:
    dtype, classes = accumulation_dtype(logits.dtype), logits.shape[-1]
    ignored = labels == ignore_index
    counted = (labels >= 0) & (labels < classes) & ~ignored
    # What an ignored sample holds, NaN perhaps, must not reach the gradients.
    x = logits.to(dtype).where(counted[:, None], 0)
    if shift is not None:
        x = x + shift.to(dtype).unsqueeze(-2)
    log_p = x.log_softmax(-1)
    at = labels.where(counted, 0)[:, None].expand(*x.shape[:-1], 1)
    surprise = -log_p.gather(-1, at).squeeze(-1)
    losses = surprise if exponent is None else _generalised(surprise, _fraction(exponent, dtype))
    if smoothing is not None:
        epsilon, difference = _fraction(smoothing, dtype), -log_p.mean(-1) - surprise
        # Without smoothing a masked class costs nothing.
        losses = losses + epsilon * difference.masked_fill((epsilon == 0) & ~difference.isfinite(), 0)
    losses = losses.where(counted, torch.where(ignored, 0.0, torch.nan))  # labels out of range are seen
    return losses.sum(-1) / counted.sum()


def _fraction(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In front of samples; NaN outside [0, 1]."""
    return values.to(dtype).where((values >= 0) & (values <= 1), torch.nan).unsqueeze(-1)


def _generalised(surprise: Tensor, q: Tensor) -> Tensor:
    """``(1 - exp(-q s)) / q``, with all its derivatives also at q = 0."""
    u = q * surprise.where(q != 0, surprise.nan_to_num(posinf=0))
    small = u < 0.5
    # s (1 - u/2 + u²/6 - ...), each term the one before it times -u / k.
    near, series = u.where(small, 0), torch.ones_like(u)
    for k in range(18, 1, -1):
        series = 1 - series * near / k
    return torch.where(small, surprise * series, -torch.expm1(-u) / q.where(~small, 1))


def _fake(
    logits: Tensor,
    labels: Tensor,
    shift: Tensor | None,
    exponent: Tensor | None,
    smoothing: Tensor | None,
    ignore_index: int,
    with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, batch = accumulation_dtype(logits.dtype), logits.shape[:-2]
    slope_dtype = dtype if logits.dtype == torch.float16 else logits.dtype
    return (
        logits.new_empty(batch, dtype=dtype),
        logits.new_empty(logits.shape if with_slope else (0,), dtype=slope_dtype),
        logits.new_empty((2, *batch), dtype=dtype),
    )


# ---- vmap. A batch of [N, C] problems with the same labels is one call on B models.


def _batched(
    info: Any, in_dims: Sequence[int | None], args: Sequence[Any], at: int = 0
) -> list[Tensor | None]:
    """The tensors with their batch dimension at ``at``, expanded where they have none."""
    return [
        None if a is None else a.unsqueeze(at).expand(*a.shape[:at], info.batch_size, *a.shape[at:])
        if d is None else a.movedim(d, at)
        for a, d in zip(args, in_dims, strict=True)
    ]  # fmt: skip


def _are_models(logits: Tensor, logits_dim: int | None, labels_dim: int | None) -> bool:
    return labels_dim is None and logits.dim() == (2 if logits_dim is None else 3)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    logits, labels, *parameters, ignore_index, with_slope = args
    if not _are_models(logits, in_dims[0], in_dims[1]):
        return looped(_operator.op)(info, in_dims, *args)  # type: ignore[no-any-return]
    x, *p = _batched(info, (in_dims[0], *in_dims[2:5]), (logits, *parameters))
    loss, slope, derivatives = _operator.op(x, labels, *p, ignore_index, with_slope)
    return (loss, slope if with_slope else slope.expand(info.batch_size, 0), derivatives), (0, 0, 1)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    grad, logits, labels, *parameters, ignore_index, with_slope, slope, derivatives = args[:10]
    if not _are_models(logits, in_dims[1], in_dims[2]):
        return looped(_operator.backward_op)(info, in_dims, *args)  # type: ignore[no-any-return]
    needs = args[10:]
    dims = (in_dims[0], in_dims[1], *in_dims[3:6], in_dims[8])
    g, x, *p, s = _batched(info, dims, (grad, logits, *parameters, slope))
    (d,) = _batched(info, in_dims[9:10], (derivatives,), at=1)
    assert x is not None and s is not None
    s = s if s.shape == x.shape else s.reshape(-1)
    grads = _operator.backward_op(g, x, labels, *p, ignore_index, with_slope, s, d, *needs)
    shaped = [r if need else r.expand(info.batch_size, 0) for r, need in zip(grads, needs, strict=True)]
    return tuple(shaped), (0, 0, 0, 0)


_operator = Operator(
    "adjusted_cross_entropy",
    reference=_reference,
    fake=_fake,
    differentiable=(0, 2, 3, 4),
    num_tensors=5,
    vmap=_vmap,
    vmap_backward=_vmap_backward,
)
