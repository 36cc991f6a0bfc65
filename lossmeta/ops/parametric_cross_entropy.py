"""Parametric cross-entropy (ALA, Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossmeta._build import _core
from lossmeta._checks import REDUCTIONS, check_fraction, check_tensors, choice
from lossmeta.ops._operator import Operator, looped
from lossmeta.ops._precision import accumulation_dtype, in_full_precision

ACTIVATIONS = {"sigmoid": True, "identity": False}

KEPT = _core.PARAMETRIC_CROSS_ENTROPY_STATISTICS_PER_SAMPLE


def parametric_cross_entropy(
    logits: Tensor,
    target: Tensor,
    phi: Tensor,
    *,
    activation: str = "sigmoid",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy whose class correlations :math:`\Phi` are parameters (ALA, Eq. 6).

    .. math:: z = y^\top \Phi \log \mathrm{softmax}(x), \qquad \ell = -a\,\sigma(z)

    With ``activation="identity"``, :math:`\ell = -a\,z`: for :math:`\Phi = I` that is
    :func:`torch.nn.functional.cross_entropy`, whose arguments and shapes this function takes. Targets are smoothed and
    weighted as there, :math:`y_k \to w_k ((1-\epsilon) y_k + \epsilon / C)`; the mean weight :math:`a` of a target is
    taken out of the activation, so that a class of weight 2 counts twice whatever the activation.

    Args:
        logits: ``[C]``, ``[N, C]`` or ``[N, C, d...]``; float32, float64, bfloat16 or float16 (accumulated and returned
            in float32). Or ``[B, N, C]`` with ``phi`` ``[B, C, C]``: B models, reduced one by one.
        target: class indices (int64, shape of ``logits`` without ``C``) or probabilities (shape of ``logits``).
        phi: class correlations :math:`\Phi`, ``[C, C]`` or ``[B, C, C]``.
        activation: ``"sigmoid"`` (the paper's) or ``"identity"``.
        weight: weight per class, ``[C]``.
        ignore_index: label that contributes neither loss nor gradient.
        label_smoothing: :math:`\epsilon` in [0, 1].
        reduction: ``"none"``, ``"mean"`` (weighted, as in ``cross_entropy``) or ``"sum"``.

    Returns:
        The loss, ``[]``, or without reduction the shape of the class indices. Differentiable in ``logits`` and ``phi``
        (and in probabilities); second derivatives run the reference formula. Besides the result, the forward keeps four
        numbers per sample; probabilities also cost one tensor of the size of ``logits``.

    Raises:
        ValueError: for an unknown activation or reduction, a label_smoothing outside [0, 1], shapes, dtypes or devices
            that do not fit, and labels outside [0, C).
        TypeError: for something that is not a tensor, and options of another type.

    Example:
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> loss = parametric_cross_entropy(logits, torch.randint(3, (8,)), torch.eye(3))
        >>> loss.backward()
    """
    check_tensors("parametric_cross_entropy", logits=logits, target=target, phi=phi)
    sigmoid = choice("parametric_cross_entropy", "activation", activation, ACTIVATIONS)
    how = choice("parametric_cross_entropy", "reduction", reduction, REDUCTIONS)
    if label_smoothing == 0.0 and not target.dtype.is_floating_point and logits.dim() > 1:
        return _operator(logits, target, phi, weight, ignore_index, sigmoid, how)
    return _general(logits, target, phi, sigmoid, weight, ignore_index, label_smoothing, how)


@in_full_precision
def _general(
    logits: Tensor,
    target: Tensor,
    phi: Tensor,
    sigmoid: bool,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> Tensor:
    """Smoothed, soft and unbatched targets, reduced to the operator by C x C (soft: N x C) products in PyTorch."""
    check_fraction("parametric_cross_entropy", "label_smoothing", label_smoothing)
    if logits.dim() == 1:
        loss = _general(
            logits[None], target[None], phi, sigmoid, weight, ignore_index, label_smoothing, reduction
        )
        return loss[0] if reduction == REDUCTIONS["none"] else loss
    indices = not target.dtype.is_floating_point
    if indices and label_smoothing == 0.0:
        return _operator(logits, target, phi, weight, ignore_index, sigmoid, reduction)
    _check(logits, target, phi, weight)
    models, classes = phi.dim() == 3, phi.shape[-1]
    dtype = accumulation_dtype(logits.dtype)
    phi = phi.to(dtype)
    weights = torch.ones(classes, dtype=dtype, device=phi.device) if weight is None else weight.to(dtype)
    if indices:
        # Row k of the effective matrix: the smoothed and weighted mixture of rows for label k, over its mean weight.
        shared = label_smoothing / classes
        mean_weight = (1 - label_smoothing) * weights + shared * weights.sum()
        mixed = (1 - label_smoothing) * weights[:, None] * phi + shared * (weights @ phi).unsqueeze(-2)
        mixed = mixed / mean_weight.where(mean_weight != 0, 1)[:, None]
        if weight is None:
            return _operator(logits, target, mixed, None, ignore_index, sigmoid, reduction)
        loss = _operator(logits, target, mixed, mean_weight, ignore_index, sigmoid, REDUCTIONS["none"])
        counted = torch.where(target == ignore_index, 0, weights[target.clamp(0, classes - 1)])
        return _reduced(loss, counted, reduction, models)
    soft = (1 - label_smoothing) * target.to(dtype) + label_smoothing / classes
    soft = (soft if models else soft.movedim(1, -1)) * weights
    rows = soft @ phi
    if models:
        x, rows = logits.flatten(0, 1), rows.flatten(0, 1)
    else:
        x, rows = logits, rows.movedim(-1, 1)
    if weight is None and not models:
        return _operator(x, None, rows, None, ignore_index, sigmoid, reduction)
    total = (1 - label_smoothing) * target.to(dtype).sum(-1 if models else 1) + label_smoothing
    mean_weight = soft.sum(-1) / total.where(total != 0, 1)
    divisor = mean_weight.where(mean_weight != 0, 1)
    rows = rows / (divisor.flatten()[:, None] if models else divisor.unsqueeze(1))
    loss = _operator(x, None, rows, None, ignore_index, sigmoid, REDUCTIONS["none"])
    loss = mean_weight * loss.view(mean_weight.shape)
    return _reduced(loss, torch.ones_like(loss), reduction, models)


def _reduced(loss: Tensor, weights: Tensor, reduction: int, models: bool) -> Tensor:
    """The loss per sample, or its sum or mean over the samples (of each model)."""
    if reduction == REDUCTIONS["none"]:
        return loss
    dims = [1] if models else list(range(loss.dim()))
    return loss.sum(dims) if reduction == REDUCTIONS["sum"] else loss.sum(dims) / weights.sum(dims)


def _check(logits: Tensor, target: Tensor, phi: Tensor, weight: Tensor | None) -> None:
    """What the operator checks by itself where it gets these arguments unchanged."""
    name = "parametric_cross_entropy"
    for argument, tensor in (("logits", logits), ("phi", phi), ("weight", weight)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{name}: {argument} must be of a floating-point dtype, got {tensor.dtype}")
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(
                f"{name}: {argument} and logits must be on the same device, "
                f"got {tensor.device} and {logits.device}; move one with .to()"
            )
    models = phi.dim() == 3
    if logits.dim() < 2 or (models and logits.dim() != 3):
        raise ValueError(
            f"{name}: logits must be [N, C] or [N, C, d...], and [B, N, C] with phi [B, C, C], "
            f"got {list(logits.shape)}"
        )
    classes = logits.shape[-1 if models else 1]
    expected = ([logits.shape[0]] if models else []) + [classes, classes]
    if list(phi.shape) != expected:
        raise ValueError(
            f"{name}: phi must be [{'B, ' * models}C, C] with C = {classes}, got {list(phi.shape)}"
        )
    if weight is not None and list(weight.shape) != [classes]:
        raise ValueError(f"{name}: weight must be [{classes}], got {list(weight.shape)}")
    if target.dtype.is_floating_point and target.shape != logits.shape:
        hint = "; class indices are int64: target.long()" if target.dim() < logits.dim() else ""
        raise ValueError(
            f"{name}: probabilities must have the shape of logits, {list(logits.shape)}, "
            f"got {list(target.shape)}{hint}"
        )


def _reference(
    logits: Tensor,
    labels: Tensor | None,
    phi: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    sigmoid: bool,
    reduction: int,
) -> Tensor:
    dtype = accumulation_dtype(logits.dtype)
    batch = labels is not None and phi.dim() == 3
    log_probability = torch.log_softmax(logits.to(dtype), 2 if batch else 1)
    phi = phi.to(dtype)
    if labels is None:
        rows, valid = phi, None
    else:
        ignored = labels == ignore_index
        valid = (labels >= 0) & (labels < phi.shape[-1]) & ~ignored
        safe = labels.where(valid, 0)
        columns = phi.shape[-1]
        rows = phi.gather(1, safe[..., None].expand(-1, -1, columns)) if batch else phi[safe].movedim(-1, 1)
    # A masked class counts nowhere; the others keep their derivative in phi, which is not 0 where phi is.
    finite = log_probability.masked_fill((rows == 0) & ~log_probability.isfinite(), 0)
    z = (rows * finite).sum(2 if batch else 1)
    scale = torch.ones_like(z) if weight is None or labels is None else weight.to(dtype)[safe]
    # Of the sigmoid's two forms the one whose derivative, s (1 - s), keeps its digits.
    activated = torch.where(z > 0, 1 - (-z).sigmoid(), z.sigmoid()) if sigmoid else z
    loss = -scale * activated
    if valid is not None:
        loss = loss.where(valid, torch.where(ignored, 0.0, torch.nan))  # labels out of range are seen
        scale = scale.where(valid, 0)
    return _reduced(loss, scale, reduction, batch)


def _fake(
    logits: Tensor,
    labels: Tensor | None,
    phi: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    sigmoid: bool,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    batch = labels is not None and phi.dim() == 3
    shape: Sequence[Any] = logits.shape[:1] if batch else ()
    models = logits.shape[0] if batch else 1
    if reduction == REDUCTIONS["none"]:
        shape = (*logits.shape[:1], *logits.shape[2:]) if labels is None else labels.shape
    samples = logits.numel() // logits.shape[2 if batch else 1]
    dtype = accumulation_dtype(logits.dtype)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(KEPT * samples + models, dtype=dtype)


# ---- vmap. A batch of [N, C] problems is one call on B models; the statistics of B models are [KEPT, B, N] and [B].


def _gather_statistics(per_problem: Tensor, models: int) -> Tensor:
    batch = per_problem.shape[0]
    samples = (per_problem.shape[1] - 1) // KEPT
    body = per_problem[:, :-1].reshape(batch, KEPT, samples).transpose(0, 1).reshape(-1)
    return torch.cat([body, per_problem[:models, -1]])


def _scatter_statistics(flat: Tensor, batch: int) -> Tensor:
    samples = (flat.numel() - 1) // (KEPT * batch)
    body = flat[: KEPT * batch * samples].view(KEPT, batch, samples).transpose(0, 1).reshape(batch, -1)
    return torch.cat([body, flat[KEPT * batch * samples :].expand(batch)[:, None]], 1)


def _batched(info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> list[Tensor | None]:
    """The tensors with their batch dimension in front, expanded where they have none."""
    return [
        None if a is None else a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
        for a, d in zip(args, in_dims, strict=True)
    ]


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    logits, labels, phi, weight, ignore_index, sigmoid, reduction = args
    x, y, p = _batched(info, in_dims[:3], args[:3])
    assert x is not None and p is not None
    if x.dim() != 3 or p.dim() != 3 or in_dims[3] is not None:
        return looped(_operator.op)(info, in_dims, *args)  # type: ignore[no-any-return]
    batch = info.batch_size
    if y is not None:
        loss, statistics = _operator.op(x, y, p, weight, ignore_index, sigmoid, reduction)
        samples = x.shape[1]
        body = statistics[:-batch].view(KEPT, batch, samples).transpose(0, 1).reshape(batch, -1)
        return (loss, torch.cat([body, statistics[-batch:, None]], 1)), (0, 0)
    loss, statistics = _operator.op(
        x.flatten(0, 1), None, p.flatten(0, 1), None, ignore_index, sigmoid, REDUCTIONS["none"]
    )
    loss = loss.view(batch, -1)
    if reduction != REDUCTIONS["none"]:
        loss = loss.mean(1) if reduction == REDUCTIONS["mean"] else loss.sum(1)
    return (loss, _scatter_statistics(statistics, batch)), (0, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    weight, ignore_index, sigmoid, reduction = args[4:8]
    need_logits, need_phi = args[9:]
    g, x, y, p = _batched(info, in_dims[:4], args[:4])
    (statistics,) = _batched(info, in_dims[8:9], args[8:9])
    assert g is not None and x is not None and p is not None and statistics is not None
    if x.dim() != 3 or p.dim() != 3 or in_dims[4] is not None:
        return looped(_operator.backward_op)(info, in_dims, *args)  # type: ignore[no-any-return]
    batch = info.batch_size
    if y is not None:
        flat = _gather_statistics(statistics, batch)
        grads = _operator.backward_op(
            g, x, y, p, weight, ignore_index, sigmoid, reduction, flat, need_logits, need_phi
        )
    else:
        samples = x.shape[1]
        if reduction != REDUCTIONS["none"]:
            g = g[:, None].expand(batch, samples) / (samples if reduction == REDUCTIONS["mean"] else 1)
        flat = _gather_statistics(statistics, 1)
        grads = _operator.backward_op(
            g.reshape(-1),
            x.flatten(0, 1),
            None,
            p.flatten(0, 1),
            None,
            ignore_index,
            sigmoid,
            REDUCTIONS["none"],
            flat,
            need_logits,
            need_phi,
        )
    shaped = tuple(
        r.view(t.shape) if need else r.expand(batch, 0)
        for r, t, need in zip(grads, (x, p), (need_logits, need_phi), strict=True)
    )
    return (shaped[0], shaped[1]), (0, 0)


_operator = Operator(
    "parametric_cross_entropy",
    reference=_reference,
    fake=_fake,
    differentiable=(0, 2),
    num_tensors=4,
    vmap=_vmap,
    vmap_backward=_vmap_backward,
)
