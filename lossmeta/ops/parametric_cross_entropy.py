"""Parametric cross-entropy (ALA, Eq. 6).

A long file, for an operator is one file on each floor: this one has two kinds of targets, two forms of its parameters,
and rules for vmap.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lossmeta._build import _core
from lossmeta._checks import (
    REDUCTIONS,
    check_fraction,
    check_int64,
    check_same_device,
    check_tensors,
    choice,
    may_look,
    outside,
)
from lossmeta.ops._operator import Operator, looped
from lossmeta.ops._precision import accumulation_dtype, in_full_precision
from lossmeta.ops._settled import is_settled

NAME = "parametric_cross_entropy"
ACTIVATIONS = {"sigmoid": True, "identity": False}

KEPT = _core.PARAMETRIC_CROSS_ENTROPY_STATISTICS_PER_SAMPLE


class LowRankPhi(NamedTuple):
    r"""Class correlations without a matrix: :math:`\Phi = \mathrm{diag}(d) + L R^\top`.

    It takes the memory of C (2 r + 1) numbers instead of C², and with it the loss takes the time of N C r products.
    With r = 0 :math:`\Phi` is diagonal.

    Example:
        >>> phi = LowRankPhi(torch.ones(3), torch.zeros(3, 2), torch.rand(3, 2))
        >>> phi.dense().tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    diagonal: Tensor
    """d, ``[C]`` or ``[B, C]``"""
    left: Tensor
    """L, ``[C, r]`` or ``[B, C, r]``; row y meets the samples of class y"""
    right: Tensor
    """R, ``[C, r]`` or ``[B, C, r]``; row j meets the log-probability of class j"""

    def dense(self) -> Tensor:
        """The matrix, ``[C, C]`` or ``[B, C, C]``."""
        return self.diagonal.diag_embed() + self.left @ self.right.mT


Phi = Tensor | LowRankPhi | None


def parametric_cross_entropy(
    logits: Tensor,
    target: Tensor,
    phi: Phi = None,
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
    taken out of the activation, so that a class of weight 2 counts twice whatever the activation. Where a is 0 the
    sigmoid's loss is 0.

    Nothing of the size of a dense :math:`\Phi` is made unless ``phi`` requires a gradient. Smoothed class indices need
    the sum of its rows. While there are fewer samples than classes that sum is kept until ``phi`` or ``weight`` changes
    in a way that torch counts. It counts ``phi.copy_(...)``, but not ``phi.data.copy_(...)``, the steps of fused
    optimizers and collectives. The sum is not kept over a call in which ``phi`` requires a gradient. A compiled graph
    and a CUDA graph sum anew in every call.

    Args:
        logits: ``[C]``, ``[N, C]`` or ``[N, C, d...]``; float32, float64, bfloat16 or float16 (accumulated and returned
            in float32). Or ``[B, N, C]`` with ``phi`` of B models, which are reduced one by one.
        target: class indices (int64 or uint8, shape of ``logits`` without ``C``) or probabilities (shape of
            ``logits``).
        phi: class correlations :math:`\Phi`, ``[C, C]`` or ``[B, C, C]``; a :class:`LowRankPhi`; or ``None``, the
            identity.
        activation: ``"sigmoid"`` (the paper's) or ``"identity"``.
        weight: weight per class, ``[C]``.
        ignore_index: label that contributes neither loss nor gradient.
        label_smoothing: :math:`\epsilon` in [0, 1].
        reduction: ``"none"``, ``"mean"`` (weighted, as in ``cross_entropy``) or ``"sum"``.

    Returns:
        The loss, ``[]``, or without reduction the shape of the class indices. Differentiable in ``logits`` and ``phi``
        (and in probabilities); second derivatives run the reference formula. Besides the result, the forward keeps four
        numbers per sample; all but plain class indices with a dense ``phi`` also cost one tensor of the size of
        ``logits``.

    Raises:
        ValueError: for an unknown activation or reduction, a label_smoothing outside [0, 1], shapes, dtypes or devices
            that do not fit, labels outside [0, C), and an ignore_index from 0 on with probabilities.
        TypeError: for something that is not a tensor, and options of another type.

    Example:
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> loss = parametric_cross_entropy(logits, torch.randint(3, (8,)), torch.eye(3))
        >>> loss.backward()
    """
    check_tensors(NAME, logits=logits, target=target)
    if isinstance(phi, LowRankPhi):
        check_tensors(NAME, **_fields(phi))
    elif not isinstance(phi, Tensor) and phi is not None:
        raise TypeError(f"{NAME}: phi must be a tensor, a LowRankPhi or None, got {type(phi).__name__}")
    sigmoid = choice(NAME, "activation", activation, ACTIVATIONS)
    how = choice(NAME, "reduction", reduction, REDUCTIONS)
    if target.dtype == torch.uint8:
        target = target.long()
    plain = label_smoothing == 0.0 and not target.dtype.is_floating_point and logits.dim() > 1
    if plain and isinstance(phi, Tensor):
        return _operator(logits, target, phi, weight, ignore_index, sigmoid, how)
    return _general(logits, target, phi, sigmoid, weight, ignore_index, label_smoothing, how)


@in_full_precision
def _general(
    logits: Tensor,
    target: Tensor,
    phi: Phi,
    sigmoid: bool,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> Tensor:
    """All but plain class indices with a matrix, by a row of Phi per sample, mixed in PyTorch."""
    check_fraction(NAME, "label_smoothing", label_smoothing)
    if logits.dim() == 1:
        loss = _general(
            logits[None], target[None], phi, sigmoid, weight, ignore_index, label_smoothing, reduction
        )
        return loss[0] if reduction == REDUCTIONS["none"] else loss
    indices = not target.dtype.is_floating_point
    if indices and label_smoothing == 0.0 and isinstance(phi, Tensor):
        return _operator(logits, target, phi, weight, ignore_index, sigmoid, reduction)
    models = _check(logits, target, phi, weight, ignore_index)
    mixture = _Mixture(phi, weight, label_smoothing, logits, models)
    if indices:
        return _of_labels(logits, target, mixture, sigmoid, ignore_index, reduction)
    return _of_probabilities(logits, target, mixture, sigmoid, reduction)


class _Mixture:
    """The rows that targets take from Phi, ``w_k ((1 - e) y_k + e / C)`` of row k, classes last; the options of a call.

    ``label_smoothing`` is e. Everything comes in the accumulation dtype.
    """

    def __init__(
        self, phi: Phi, weight: Tensor | None, label_smoothing: float, logits: Tensor, models: bool
    ) -> None:
        self.phi, self.given_weight, self.smoothing, self.models = phi, weight, label_smoothing, models
        self.dim = 2 if models else 1
        self.classes = logits.shape[self.dim]
        self.dtype = accumulation_dtype(logits.dtype)
        self.weight = None if weight is None else weight.to(self.dtype)
        self.shared = label_smoothing / self.classes if self.classes else 0.0
        if isinstance(phi, LowRankPhi):
            self.phi = LowRankPhi(*(t.to(self.dtype) for t in phi))

    def of_labels(self, labels: Tensor) -> Tensor:
        """The row of each label, ``[..., C]``. Without smoothing the weights are left out."""
        on: Tensor | float = 1 - self.smoothing
        if self.smoothing and self.weight is not None:
            on = on * self.weight[labels][..., None]
        base = self.shared if self.weight is None or not self.smoothing else self.shared * self.weight
        if isinstance(self.phi, Tensor):
            rows = self._take(self.phi, labels).to(self.dtype)
            rest = self.shared * _sum_of_rows(self.phi, self.given_weight, self.dtype).unsqueeze(-2)
            return (
                torch.addcmul(rest, rows, on) if isinstance(on, Tensor) else torch.add(rest, rows, alpha=on)
            )
        if self.phi is None:
            return self._added(self._tensor(base, labels), labels, on)
        diagonal, left, right = self.phi
        values = self._take(diagonal, labels)[..., None] * on
        taken = self._take(left, labels) * on
        if not self.smoothing:
            return self._added(taken @ right.mT, labels, values)
        left_sum = (left * base[:, None]).sum(-2) if isinstance(base, Tensor) else base * left.sum(-2)
        rows = (taken + left_sum.unsqueeze(-2)) @ right.mT + (diagonal * base).unsqueeze(-2)
        return self._added(rows, labels, values)

    def _take(self, table: Tensor, labels: Tensor) -> Tensor:
        """Rows of ``table``, of each model its own. Indexing, whose gradient is summed in a fixed order."""
        if not self.models:
            return table[labels]
        return table[torch.arange(len(labels), device=labels.device)[:, None], labels]

    def _added(self, rows: Tensor, labels: Tensor, values: Tensor | float) -> Tensor:
        """``rows``, of which one may stand for all, with ``values`` added at the labels."""
        at = labels[..., None]
        values = self._tensor(values, labels).expand(at.shape)
        return rows.expand(*labels.shape, self.classes).scatter_add(-1, at, values)

    def _tensor(self, value: Tensor | float, labels: Tensor) -> Tensor:
        """Filled on the device: nothing waits, and a CUDA graph can hold it."""
        if isinstance(value, Tensor):
            return value
        return torch.full((), value, dtype=self.dtype, device=labels.device)

    def of_probabilities(self, target: Tensor) -> Tensor:
        """The mixture of rows, ``[..., C]``, for (smoothed and weighted) targets with the classes last."""
        if self.phi is None:
            return target
        if isinstance(self.phi, Tensor):
            return target @ self.phi.to(self.dtype)
        diagonal, left, right = self.phi
        if not self.models:
            return target * diagonal + (target @ left) @ right.mT
        return target * diagonal[:, None] + (target @ left) @ right.mT

    def of_every_label(self, phi: Tensor) -> Tensor:
        """The rows of all labels, ``[C, C]`` or ``[B, C, C]``."""
        phi = phi.to(self.dtype)
        rows = phi if self.weight is None else self.weight[:, None] * phi
        return (1 - self.smoothing) * rows + self.shared * rows.sum(-2, keepdim=True)

    def weights(self, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Of each label the mean weight of its smoothed target, and what a weighted mean counts it for."""
        if self.weight is None:
            return counted.to(self.dtype), counted.to(self.dtype)
        own = torch.where(counted, self.weight[labels], 0)
        if not self.smoothing:
            return own, own
        rest = self.shared * self.weight.sum()
        return torch.where(counted, (1 - self.smoothing) * own + rest, 0), own


def _of_labels(
    logits: Tensor, labels: Tensor, mixture: _Mixture, sigmoid: bool, ignore_index: int, reduction: int
) -> Tensor:
    phi, models, classes = mixture.phi, mixture.models, mixture.classes
    ignored = labels == ignore_index
    none = REDUCTIONS["none"]
    if isinstance(phi, Tensor) and logits.numel() >= classes * classes * (len(logits) if models else 1):
        rows = mixture.of_every_label(phi)
        if mixture.weight is None:
            return _operator(logits, labels, rows, None, ignore_index, sigmoid, reduction)
        loss = _operator(logits, labels, rows, None, ignore_index, False, none)
        safe = labels.clamp(0, classes - 1)  # the operator has seen what lies outside
    else:
        bad = outside(NAME, "labels", labels, classes, ignore_index)
        safe = labels.masked_fill(ignored | bad, 0)
        rows = mixture.of_labels(safe)
        if not may_look(ignored) or ignored.any():
            # What an ignored sample holds, NaN perhaps, must not reach its gradient.
            logits = logits.masked_fill(ignored.unsqueeze(mixture.dim), 0)
        loss = _by_rows(logits, rows, models, False, none).masked_fill(bad, torch.nan)
    mean_weight, counted = mixture.weights(safe, ~ignored)
    if mixture.smoothing or mixture.weight is None:
        loss = _activated(loss, mean_weight, sigmoid)
    else:
        loss = mean_weight * _activated(loss, torch.ones_like(loss), sigmoid)
    return _reduced(loss.masked_fill(ignored, 0), counted, reduction, models)


def _of_probabilities(
    logits: Tensor, target: Tensor, mixture: _Mixture, sigmoid: bool, reduction: int
) -> Tensor:
    models, weight, smoothing = mixture.models, mixture.weight, mixture.smoothing
    if not mixture.classes:  # As in cross_entropy: z is an empty sum, and the mean 0 / 0.
        empty = -logits.to(mixture.dtype).sum(mixture.dim)
        loss = _activated(empty, torch.ones_like(empty), sigmoid)
        if reduction == REDUCTIONS["mean"]:
            loss = loss * torch.nan
        return _reduced(loss, torch.ones_like(loss), reduction, models)
    soft = target.to(mixture.dtype).movedim(mixture.dim, -1)
    if smoothing:
        soft = (1 - smoothing) * soft + mixture.shared
    weighted = soft if weight is None else soft * weight
    rows = mixture.of_probabilities(weighted)
    if weight is None or not sigmoid:
        if not models:
            return _by_rows(logits, rows, models, sigmoid, reduction)
        loss = _by_rows(logits, rows, models, sigmoid, REDUCTIONS["none"])
    else:
        total = soft.sum(-1)
        # A target of zeros has the mean weight of all classes: weights of 1 are no weights.
        mean_weight = torch.where(total != 0, weighted.sum(-1) / total.where(total != 0, 1), weight.mean())
        loss = _activated(_by_rows(logits, rows, models, False, REDUCTIONS["none"]), mean_weight, True)
    return _reduced(loss, torch.ones_like(loss), reduction, models)


def _by_rows(logits: Tensor, rows: Tensor, models: bool, sigmoid: bool, reduction: int) -> Tensor:
    """The operator on a row of Phi per sample, classes last. Models are reduced by the caller."""
    if models:
        loss = _operator(logits.flatten(0, 1), None, rows.flatten(0, 1), None, 0, sigmoid, reduction)
        return loss.view(logits.shape[:2])
    return _operator(logits, None, rows.movedim(-1, 1), None, 0, sigmoid, reduction)


def _activated(loss: Tensor, mean_weight: Tensor, sigmoid: bool) -> Tensor:
    """``-a act(s / a)`` of the loss ``-s`` and the mean weight ``a``, which the identity need not be divided by."""
    if not sigmoid:
        return loss
    return -mean_weight * _sigmoid(-loss / mean_weight.where(mean_weight != 0, 1))


def _sigmoid(z: Tensor) -> Tensor:
    # Of the sigmoid's two forms the one whose derivative, s (1 - s), keeps its digits.
    return torch.where(z > 0, 1 - (-z).sigmoid(), z.sigmoid())


# Of a matrix: what it and the weight were, and the sum of its rows.
_sums: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _sum_of_rows(phi: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``weight @ phi``, ``[C]`` or ``[B, C]``. Where samples are few it costs more than all else, so it is kept."""

    def summed() -> Tensor:
        return phi.sum(-2, dtype=dtype) if weight is None else weight.to(dtype) @ phi.to(dtype)

    if not (is_settled(phi) and (weight is None or is_settled(weight))):
        if not torch.compiler.is_compiling():
            _sums.pop(phi, None)  # what learns in between may be moved in a way that torch does not count
        return summed()
    stream = torch.cuda.current_stream(phi.device) if phi.is_cuda else None
    state = (phi._version, phi.data_ptr(), dtype, stream)
    weight_state = None if weight is None else (weight._version, weight.data_ptr())
    if (kept := _sums.get(phi)) is not None:
        *states, kept_weight, total, _ = kept
        if states == [state, weight_state] and (weight is None or kept_weight() is weight):
            return total  # type: ignore[no-any-return]
    total = summed()
    if not total.is_inference():
        # While the memory is held it does not become that of other values.
        held = [t.detach() for t in (phi, weight) if t is not None]
        _sums[phi] = state, weight_state, None if weight is None else weakref.ref(weight), total, held
    return total


def _reduced(loss: Tensor, weights: Tensor, reduction: int, models: bool) -> Tensor:
    """The loss per sample, or its sum or mean over the samples (of each model)."""
    if reduction == REDUCTIONS["none"]:
        return loss
    dims = [1] if models else list(range(loss.dim()))
    return loss.sum(dims) if reduction == REDUCTIONS["sum"] else loss.sum(dims) / weights.sum(dims)


def _check(logits: Tensor, target: Tensor, phi: Phi, weight: Tensor | None, ignore_index: int) -> bool:
    """What the operator checks by itself where it gets these arguments unchanged; whether phi is of B models."""
    own = {} if phi is None else {"phi": phi} if isinstance(phi, Tensor) else _fields(phi)
    for argument, tensor in {"logits": logits, **own, "weight": weight}.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{NAME}: {argument} must be of a floating-point dtype, got {tensor.dtype}")
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(
                f"{NAME}: {argument} and logits must be on the same device, "
                f"got {tensor.device} and {logits.device}; move one with .to()"
            )
    models = phi.dim() == 3 if isinstance(phi, Tensor) else phi is not None and phi.diagonal.dim() == 2
    if logits.dim() < 2 or (models and logits.dim() != 3):
        raise ValueError(
            f"{NAME}: logits must be [N, C] or [N, C, d...], and [B, N, C] with phi of B models, "
            f"got {list(logits.shape)}"
        )
    classes = logits.shape[2 if models else 1]
    batch, text = ([logits.shape[0]], "B, ") if models else ([], "")
    if isinstance(phi, Tensor) and list(phi.shape) != [*batch, classes, classes]:
        raise ValueError(f"{NAME}: phi must be [{text}C, C] with C = {classes}, got {list(phi.shape)}")
    if isinstance(phi, LowRankPhi):
        if list(phi.diagonal.shape) != [*batch, classes]:
            raise ValueError(
                f"{NAME}: phi.diagonal must be [C] or [B, C] with C = {classes}, got {list(phi.diagonal.shape)}"
            )
        rank = phi.left.shape[-1:]
        for side in ("left", "right"):
            shape = getattr(phi, side).shape
            if list(shape) != [*batch, classes, *rank]:
                raise ValueError(
                    f"{NAME}: phi.{side} must be [{text}C, r] with C = {classes}"
                    f"{' and the r of phi.left' * (side == 'right')}, got {list(shape)}"
                )
    if weight is not None and list(weight.shape) != [classes]:
        raise ValueError(f"{NAME}: weight must be [{classes}], got {list(weight.shape)}")
    if not target.dtype.is_floating_point:
        check_int64(NAME, labels=target)
        check_same_device(NAME, labels=target, logits=logits)
        samples = [*logits.shape[:2]] if models else [*logits.shape[:1], *logits.shape[2:]]
        if list(target.shape) != samples:
            raise ValueError(
                f"{NAME}: labels must have the shape of logits without the class dimension, "
                f"got {list(target.shape)} for logits {list(logits.shape)}"
            )
        if not classes:
            raise ValueError(f"{NAME}: logits must have at least one class, got {list(logits.shape)}")
        return models
    if target.shape != logits.shape:
        hint = "; class indices are int64: target.long()" if target.dim() < logits.dim() else ""
        raise ValueError(
            f"{NAME}: probabilities must have the shape of logits, {list(logits.shape)}, "
            f"got {list(target.shape)}{hint}"
        )
    if ignore_index >= 0:
        raise ValueError(
            f"{NAME}: ignore_index must be negative with probabilities, which it cannot ignore, got {ignore_index}"
        )
    return models


def _fields(phi: LowRankPhi) -> dict[str, Tensor]:
    return {f"phi.{field}": tensor for field, tensor in phi._asdict().items()}


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
    loss = -scale * (_sigmoid(z) if sigmoid else z)
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
