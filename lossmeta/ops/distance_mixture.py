"""Distance mixture for metric learning (ALA, Eq. 9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lossmeta._checks import REDUCTIONS, check_tensors, choice
from lossmeta.ops._operator import Operator
from lossmeta.ops._precision import accumulation_dtype


def distance_mixture(
    embeddings: Tensor,
    triplets: Tensor | Sequence[Tensor] | None,
    phi: Tensor,
    *,
    labels: Tensor | None = None,
    min_distance: float = 1e-3,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    r"""Triplet loss as a mixture of ten functions of the distance, with coefficients :math:`\Phi` (ALA, Eq. 9).

    .. math:: \ell = \sum_{i=1}^5 \Phi_i F^+_i(d^+) + \sum_{i=1}^5 \Phi_{i+5} F^-_i(d^-)

    where :math:`d^+` and :math:`d^-` are the Euclidean distances of an anchor to a positive and to a negative, and
    (supplement B) :math:`F^+ = d^2, d^{2.5}, d^{1.5}, \tfrac12 (e^{0.6 d^2} - 1), \tfrac12 (e^{0.6 d} - 1)` and
    :math:`F^- = 0.5/d, 0.2/d, 0.1/d^2, \log(1/d), \log(1/d^2)`. The paper starts from :math:`d^2` and :math:`0.5/d`,
    each with coefficient 1, and keeps :math:`\Phi` in [0, 1].

    With ``labels`` instead of triplets, all valid triplets are meant: anchor and positive of one label, the negative
    of another. They are never enumerated but summed pair by pair, times the number of triplets that a pair is part of.

    A coefficient 0 contributes 0 to the loss and to the gradients even where its function overflows
    (:math:`e^{0.6 d^2}`, beyond d = 12 in float32). :math:`F^+` has gradient 0 at d = 0; :math:`F^-` is constant below
    ``min_distance``.

    Args:
        embeddings: ``[M, D]``; float32, float64, bfloat16 or float16 (accumulated and returned in float32).
        triplets: int64 indices into the embeddings, ``[T, 3]`` (anchor, positive, negative), or three tensors ``[T]``
            of them, as the miners of pytorch-metric-learning return them. ``None`` with ``labels``.
        phi: the coefficients :math:`\Phi`, ``[10]``, those of :math:`F^+` first.
        labels: int64, ``[M]``, any values; in place of triplets.
        min_distance: smallest distance that :math:`F^-` sees.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``: over the triplets in either form.

    Returns:
        The loss, and the ten means of :math:`F_i` over the triplets, which are the controller's statistics (infinite
        where a function overflows). Without reduction the loss is ``[T]``; with labels it is ``[M]``, for each anchor
        the *sum* over its triplets, so that ``loss.sum()`` is the ``"sum"`` in either form. Without any triplet mean,
        sum and means are 0, with gradient 0, so that a batch without valid triplets can be trained on.

        Both are differentiable in ``embeddings`` and ``phi`` (detach the means before keeping them); second derivatives
        run the reference formula. For the backward the distances are kept, 2 T numbers, with labels M (M + 2).

    Raises:
        ValueError: for an unknown reduction, shapes, dtypes or devices that do not fit, triplets and labels both or
            neither, indices outside [0, M), a ``phi`` that is not finite, and a ``min_distance`` that is not positive.
            On CUDA, where looking would wait for the device, a triplet with a bad index has loss NaN and gradient 0.
        TypeError: for something that is not a tensor.

    Example:
        >>> embeddings = torch.nn.functional.normalize(torch.randn(8, 4)).requires_grad_()
        >>> phi = torch.tensor([1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0])
        >>> loss, terms = distance_mixture(embeddings, None, phi, labels=torch.arange(8) // 2)
        >>> loss.backward()
    """
    how = choice("distance_mixture", "reduction", reduction, REDUCTIONS)
    if triplets is not None and not isinstance(triplets, Tensor):
        check_tensors("distance_mixture", **{f"triplets[{i}]": t for i, t in enumerate(triplets)})
        if len(triplets) != 3 or any(t.shape != triplets[0].shape or t.dim() != 1 for t in triplets):
            raise ValueError(
                "distance_mixture: triplets must be a tensor [T, 3] or three tensors [T], got shapes "
                f"{[list(t.shape) for t in triplets]}"
            )
        triplets = torch.stack(tuple(triplets), 1)
    return _operator(embeddings, triplets, phi, labels, min_distance, how)  # type: ignore[no-any-return]


def distances(difference: Tensor) -> Tensor:
    """Norms of ``difference`` [..., D] with gradient 0, to any order, where they are 0."""
    square = difference.square().sum(-1)
    zero = square == 0
    return square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _increasing(d: Tensor) -> Tensor:
    """F+, row i at the distances d[i]."""
    zero = d == 0
    safe = d.masked_fill(zero, 1)
    powers = [(safe[i] ** p).masked_fill(zero[i], 0) for i, p in enumerate((2, 2.5, 1.5))]
    return torch.stack([*powers, 0.5 * torch.expm1(0.6 * d[3] ** 2), 0.5 * torch.expm1(0.6 * d[4])])


def _decreasing(d: Tensor, min_distance: float) -> Tensor:
    """F-, row i at the distances d[i]."""
    d = torch.where(d < min_distance, min_distance, d)
    return torch.stack([0.5 / d[0], 0.2 / d[1], 0.1 / d[2] ** 2, -d[3].log(), -2 * d[4].log()])


def _side(function: Callable[[Tensor], Tensor], phi: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The functions of one side, and their mixture, in which an infinity with coefficient 0 counts nowhere."""
    rows = d.expand(5, *d.shape)
    f = function(rows)
    column = phi.view(5, *(1,) * d.dim())
    unused = (column == 0) & f.isinf()
    return f, (column * function(rows.masked_fill(unused, 1)).masked_fill(unused, 0)).sum(0)


def _reference(
    embeddings: Tensor,
    triplets: Tensor | None,
    phi: Tensor,
    labels: Tensor | None,
    min_distance: float,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(embeddings.dtype)
    x, phi = embeddings.to(dtype), phi.to(dtype)
    count = x.shape[0]
    decreasing = partial(_decreasing, min_distance=min_distance)
    if triplets is not None:
        valid = ((triplets >= 0) & (triplets < count)).all(1)
        anchor, positive, negative = x[triplets.where(valid[:, None], 0)].unbind(1)
        near, near_loss = _side(_increasing, phi[:5], distances(anchor - positive))
        far, far_loss = _side(decreasing, phi[5:], distances(anchor - negative))
        loss = (near_loss + far_loss).where(valid, torch.nan)
        totals = torch.cat([near, far]).where(valid, torch.nan).sum(1)
        number = torch.full((), triplets.shape[0], dtype=dtype, device=x.device)
    else:
        assert labels is not None
        same = labels[:, None] == labels
        others = ~torch.eye(count, dtype=torch.bool, device=x.device)
        positives, negatives = (same & others).sum(1).to(dtype), (~same).sum(1).to(dtype)
        # Pairs in no triplet are set to distance 1, not to 0 afterwards: 0 times the gradient of infinity is NaN.
        near_pairs = same & others & (negatives > 0)[:, None]
        far_pairs = ~same & (positives > 0)[:, None]
        d = distances(x[:, None] - x)
        near, near_loss = _side(_increasing, phi[:5], d.where(near_pairs, 1))
        far, far_loss = _side(decreasing, phi[5:], d.where(far_pairs, 1))
        loss = negatives * near_loss.where(near_pairs, 0).sum(1) + positives * far_loss.where(
            far_pairs, 0
        ).sum(1)
        near, far = near.where(near_pairs, 0).sum(2) * negatives, far.where(far_pairs, 0).sum(2) * positives
        totals = torch.cat([near, far]).sum(1)
        number = (positives * negatives).sum()
    terms = totals / number.clamp(min=1)
    if reduction == REDUCTIONS["none"]:
        return loss, terms
    return (loss.sum() if reduction == REDUCTIONS["sum"] else loss.sum() / number.clamp(min=1)), terms


def _fake(
    embeddings: Tensor,
    triplets: Tensor | None,
    phi: Tensor,
    labels: Tensor | None,
    min_distance: float,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(embeddings.dtype)
    count = embeddings.shape[0]
    items = count if triplets is None else triplets.shape[0]
    kept = count * count + 2 * count + 1 if triplets is None else 2 * items
    loss = embeddings.new_empty((items,) if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    return loss, embeddings.new_empty(10, dtype=dtype), embeddings.new_empty(kept, dtype=dtype)


_operator = Operator(
    "distance_mixture",
    reference=_reference,
    fake=_fake,
    differentiable=(0, 2),
    num_tensors=4,
    num_outputs=2,
)
