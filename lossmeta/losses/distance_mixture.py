"""Distance mixture (ALA, Eq. 9) as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lossmeta._checks import REDUCTIONS, choice
from lossmeta.losses import _plot
from lossmeta.losses._mining import Batch, Pairs, Triplets, read_batch, refuse_options
from lossmeta.losses._parameters import register
from lossmeta.losses._saved import SavedLoss
from lossmeta.ops._precision import accumulation_dtype
from lossmeta.ops.distance_mixture import distance_mixture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DistanceMixtureLoss(SavedLoss):
    r"""Triplet loss as an adaptive mixture of ten functions of the distance (ALA, Eq. 9).

    .. math:: \ell = \sum_{i=1}^5 \Phi_i F^+_i(d^+) + \sum_{i=1}^5 \Phi_{i+5} F^-_i(d^-)

    The functions are listed at :func:`lossmeta.ops.distance_mixture`. :math:`\Phi \in [0, 1]^{10}` starts by
    selecting :math:`d^2` and :math:`0.5 / d`. ``phi`` is a buffer, which no optimizer finds among the
    parameters and a controller sets; with ``learnable=True`` it is a parameter, which whoever steps it brings back into
    that range by :meth:`project_`.

    Args:
        learnable: whether ``phi`` is a parameter instead of a buffer, for a controller that learns it from a
            validation loss; minimising the training loss over it would only make the loss meaningless.
        min_distance: smallest distance that the decreasing functions see.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over triplets.
        device: where ``phi`` is made.
        dtype: dtype of ``phi``.

    Shape:
        Called as a loss of pytorch-metric-learning: embeddings ``[M, D]``, labels (integers) ``[M]`` and, if wanted,
        the ``indices_tuple`` of a miner (or triplets ``[T, 3]``), references ``ref_emb`` ``[R, D]`` and ``ref_labels``
        ``[R]``. Without indices, all valid triplets count, and ``reduction="none"`` gives ``[M]``, the sum per anchor.
        Triplets (anchor, positive, negative) are taken as they are, pairs (anchor, positive, anchor, negative) as all
        triplets that they form; labels are not read then.

        Anchors are embeddings; positives and negatives are references, by default the embeddings. No embedding is its
        own positive unless the references are another tensor, or indices say so. The distance is the Euclidean one of
        the embeddings as they come. That library's ``CrossBatchMemory`` and ``SelfSupervisedLoss`` know losses by
        name; those of ``lossmeta.integrations.pytorch_metric_learning`` know this one.

    Raises:
        ValueError: for an unknown reduction or a ``min_distance`` that is not finite or, in float32, not a normal
            positive number; when called, without labels and ``indices_tuple``, for shapes, dtypes or devices that do
            not fit, for indices out of range, and for a ``phi`` that is not finite. On CUDA, where looking would wait
            for the device, a triplet with a bad index has loss NaN and gradient 0.
        TypeError: for ``reducer``, ``distance`` and other options of pytorch-metric-learning's losses, and when called
            with something that is not a tensor.

    Example:
        >>> criterion = DistanceMixtureLoss()  # was: pytorch_metric_learning.losses.TripletMarginLoss()
        >>> embeddings = torch.nn.functional.normalize(torch.randn(8, 4)).requires_grad_()
        >>> criterion(embeddings, torch.arange(8) // 2).backward()
    """

    DEFINING = ("min_distance",)
    APPLIED = ("learnable", "reduction")

    phi: Tensor

    def __init__(
        self,
        *,
        learnable: bool = False,
        min_distance: float = 1e-3,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        refuse_options("DistanceMixtureLoss", options)
        choice("DistanceMixtureLoss", "reduction", reduction, REDUCTIONS)
        tiny = torch.finfo(torch.float32).tiny
        if not (min_distance >= tiny and math.isfinite(min_distance)):
            raise ValueError(
                f"DistanceMixtureLoss: min_distance must be finite and at least {tiny} "
                f"(float32's smallest normal number), got {min_distance}"
            )
        self.min_distance = min_distance
        self.reduction = reduction
        phi = torch.zeros(10, device=device, dtype=dtype)
        phi[0] = phi[5] = 1
        register(self, "phi", phi, learnable)

    @property
    def learnable(self) -> bool:
        """Whether ``phi`` is a parameter."""
        return isinstance(self.phi, nn.Parameter)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Tensor | Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        batch = read_batch("DistanceMixtureLoss", embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if batch.labels is not None:
            return self._mixture(embeddings, None, self.phi, self.reduction, batch.labels)
        if batch.pairs is not None and not (batch.mined and self.reduction == "none"):
            return self._of_pairs(batch, *batch.pairs)
        triplets = batch.triplets or _formed(*batch.pairs)  # type: ignore[misc]
        x, (anchor, positive, negative) = _together(batch, (0,), triplets)
        return self._mixture(x, (anchor, positive, negative), self.phi, self.reduction)

    def _of_pairs(self, batch: Batch, positives: Pairs, negatives: Pairs) -> Tensor:
        """All triplets that the pairs form, pair by pair, each times the number of triplets that it is part of."""
        count = len(batch.anchors)
        x, (a, p, b, n) = _together(batch, (0, 2), (*positives, *negatives))
        # Anchors out of range, which nobody has looked at on a GPU, share a slot of their own.
        near_slot, far_slot = a.where(a >= 0, count), b.where(b >= 0, count)
        positives_of, negatives_of = (slot.bincount(minlength=count + 1) for slot in (near_slot, far_slot))
        rows, zeros = x.new_zeros(count + 1, dtype=accumulation_dtype(x.dtype)), self.phi.new_zeros(5)
        parts = (
            (a, p, near_slot, negatives_of, torch.cat([self.phi[:5], zeros])),
            (b, n, far_slot, positives_of, torch.cat([zeros, self.phi[5:]])),
        )
        for anchor, other, slot, others_of, phi in parts:
            times = others_of[slot]
            kept = (times > 0) | (slot == count)  # 0 times infinity is NaN
            values = self._mixture(x, (anchor[kept], other[kept], other[kept]), phi, "none")
            rows = rows.index_add(0, slot[kept], values * times[kept])
        if self.reduction == "none":
            return rows[:-1]
        number = (positives_of * negatives_of).sum().clamp(min=1)
        return rows.sum() if self.reduction == "sum" else rows.sum() / number

    def _mixture(
        self,
        x: Tensor,
        triplets: Triplets | None,
        phi: Tensor,
        reduction: str,
        labels: Tensor | None = None,
    ) -> Tensor:
        loss, _ = distance_mixture(
            x, triplets, phi, labels=labels, min_distance=self.min_distance, reduction=reduction
        )
        return loss

    @torch.no_grad()
    def project_(self) -> None:
        """Brings ``phi`` back into [0, 1], in place; learners do so after every update."""
        self.phi.clamp_(0, 1)

    @torch.no_grad()
    def plot(self, distances: tuple[float, float] = (0.1, 2.0)) -> Figure:
        r"""Draws what a positive and what a negative adds to the loss, over its distance to the anchor.

        Args:
            distances: lowest and highest; normalised embeddings are 2 apart at most.

        Returns:
            A ``matplotlib.figure.Figure``: write it with its ``savefig``.

        Raises:
            ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
            ValueError: for distances that are none.
        """
        d = _plot.distances("DistanceMixtureLoss", distances, self.phi)
        embeddings = torch.cat([d.new_zeros(1), d])[:, None]
        other = torch.arange(1, len(d) + 1, device=d.device)
        triplets = torch.stack([torch.zeros_like(other), other, other], 1)

        def side(chosen: Tensor) -> Tensor:
            return distance_mixture(
                embeddings, triplets, chosen, min_distance=self.min_distance, reduction="none"
            )[0]

        phi = self.phi.to(d.dtype)
        none = torch.zeros_like(phi[:5])
        values = {
            "positive": side(torch.cat([phi[:5], none])),
            "negative": side(torch.cat([none, phi[5:]])),
        }
        return _plot.panels("DistanceMixtureLoss", d, "distance", values)

    def extra_repr(self) -> str:
        return f"learnable={self.learnable}, min_distance={self.min_distance}, reduction={self.reduction!r}"


def _formed(positives: Pairs, negatives: Pairs) -> Triplets:
    (anchor, positive), (other_anchor, negative) = positives, negatives
    i, j = torch.where(anchor[:, None] == other_anchor)
    return anchor[i], positive[i], negative[j]


def _together(
    batch: Batch, anchors: Sequence[int], parts: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    """Anchors and references as one, and the indices into it, -1 where they were out of range."""
    count = len(batch.anchors)
    own = batch.references is batch.anchors
    x = batch.anchors if own else torch.cat([batch.anchors, batch.references])
    moved = []
    for i, part in enumerate(parts):
        size, start = (count, 0) if own or i in anchors else (len(batch.references), count)
        moved.append((part + start).where((part >= 0) & (part < size), -1))
    return x, moved
