"""Distance mixture (ALA, Eq. 9) as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lossmeta._checks import REDUCTIONS, choice
from lossmeta.losses import _plot
from lossmeta.losses._mining import mined_triplets
from lossmeta.losses._parameters import register
from lossmeta.losses._saved import SavedLoss
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
        Called as a loss of pytorch-metric-learning: embeddings ``[M, D]``, labels ``[M]`` and, if wanted, the
        ``indices_tuple`` of a miner (or triplets ``[T, 3]``). Without it, all valid triplets count, and
        ``reduction="none"`` gives ``[M]``, the sum per anchor. Triplets (anchor, positive, negative) are taken
        as they are, pairs (anchor, positive, anchor, negative) as all triplets that they form; labels are not
        read then.

    Raises:
        ValueError: for an unknown reduction or a ``min_distance`` that is not finite or, in float32, not a normal
            positive number; when called, without labels and ``indices_tuple``, for shapes, dtypes or devices that do
            not fit, for indices outside [0, M), and for a ``phi`` that is not finite. On CUDA, where looking would wait
            for the device, a triplet with a bad index has loss NaN and gradient 0.
        TypeError: when called with something that is not a tensor.

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
    ) -> None:
        super().__init__()
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
    ) -> Tensor:
        if labels is None and indices_tuple is None:
            raise ValueError("DistanceMixtureLoss: labels or indices_tuple must be given, got neither")
        triplets = (
            None
            if indices_tuple is None
            else mined_triplets("DistanceMixtureLoss", indices_tuple, embeddings)
        )
        loss, _ = distance_mixture(
            embeddings,
            triplets,
            self.phi,
            labels=labels if triplets is None else None,
            min_distance=self.min_distance,
            reduction=self.reduction,
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
