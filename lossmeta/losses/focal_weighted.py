"""Focal weighting (ALA, Eq. 10) as a module."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lossmeta._checks import REDUCTIONS, check_same_device, choice, may_look, refuse
from lossmeta.losses import _plot
from lossmeta.losses._mining import Pairs, read_batch, refuse_options
from lossmeta.losses._parameters import register
from lossmeta.losses._saved import SavedLoss
from lossmeta.ops._precision import accumulation_dtype
from lossmeta.ops.distance_mixture import distances
from lossmeta.ops.focal_weighting import focal_weighting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FocalWeightedLoss(SavedLoss):
    r"""Soft hardest-pair loss with adaptive temperatures (ALA, Eq. 10).

    .. math::
        \ell = \frac{1}{\Phi_1} \log\Bigl[1 + \sum_{i^+} e^{\Phi_1 (d^+_{i^+} - \alpha)}\Bigr]
             + \frac{1}{\Phi_2} \log\Bigl[1 + \sum_{i^-} e^{-\Phi_2 (d^-_{i^-} - \alpha)}\Bigr]

    :math:`\Phi \in [0.1, 10]^2` starts at (1, 1). ``phi`` is a buffer, which no optimizer finds among the parameters
    and a controller sets; with ``learnable=True`` it is a parameter, which whoever steps it brings back into that range
    by :meth:`project_`.

    Args:
        offset: the distance :math:`\alpha` beyond which a positive, or within which a negative, weighs in.
        learnable: whether ``phi`` is a parameter instead of a buffer, for a controller that learns it from a
            validation loss; minimising the training loss over it would only make the loss meaningless.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over the M anchors.
        device: where ``phi`` is made.
        dtype: dtype of ``phi``.

    Shape:
        Called as a loss of pytorch-metric-learning: embeddings ``[M, D]``, labels (integers) ``[M]`` and, if wanted,
        the ``indices_tuple`` of a miner (or triplets ``[T, 3]``), references ``ref_emb`` ``[R, D]`` and ``ref_labels``
        ``[R]``. Without indices, the sums of an anchor run over all other embeddings, or over all references; with
        them, over the different positives and negatives mined for that anchor, and labels are not read. Indices and
        references run in plain PyTorch, which keeps D numbers of each pair.

        Anchors are embeddings; positives and negatives are references, by default the embeddings. No embedding is its
        own positive unless the references are another tensor, or indices say so. The distance is the Euclidean one of
        the embeddings as they come. That library's ``CrossBatchMemory`` and ``SelfSupervisedLoss`` know losses by
        name; those of ``lossmeta.integrations.pytorch_metric_learning`` know this one.

    Raises:
        ValueError: for an unknown reduction or an offset that is not finite; when called, without labels and
            ``indices_tuple``, for shapes, dtypes or devices that do not fit, for indices out of range, and for a
            ``phi`` that is not positive and finite. On CUDA, where looking would wait for the device, such an index
            makes the loss of its anchor NaN (of every anchor where it is the anchor's own), and such a ``phi`` every
            loss; their gradients are 0.
        TypeError: for ``reducer``, ``distance`` and other options of pytorch-metric-learning's losses, and when called
            with something that is not a tensor.

    Example:
        >>> criterion = FocalWeightedLoss()  # was: pytorch_metric_learning.losses.TripletMarginLoss()
        >>> embeddings = torch.nn.functional.normalize(torch.randn(8, 4)).requires_grad_()
        >>> criterion(embeddings, torch.arange(8) // 2).backward()
    """

    DEFINING = ("offset",)
    APPLIED = ("learnable", "reduction")

    phi: Tensor

    def __init__(
        self,
        *,
        offset: float = 1.0,
        learnable: bool = False,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        refuse_options("FocalWeightedLoss", options)
        choice("FocalWeightedLoss", "reduction", reduction, REDUCTIONS)
        if not math.isfinite(offset):
            raise ValueError(f"FocalWeightedLoss: offset must be finite, got {offset}")
        self.offset = offset
        self.reduction = reduction
        register(self, "phi", torch.ones(2, device=device, dtype=dtype), learnable)

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
        batch = read_batch("FocalWeightedLoss", embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if batch.labels is not None:
            return focal_weighting(
                embeddings, batch.labels, self.phi, offset=self.offset, reduction=self.reduction
            )
        if batch.triplets is None:
            assert batch.pairs is not None
            return self._of_pairs(embeddings, batch.references, *batch.pairs)
        anchor, positive, negative = batch.triplets
        return self._of_pairs(embeddings, batch.references, (anchor, positive), (anchor, negative))

    def _of_pairs(self, embeddings: Tensor, references: Tensor, positives: Pairs, negatives: Pairs) -> Tensor:
        check_same_device("FocalWeightedLoss", phi=self.phi, embeddings=embeddings)
        dtype = accumulation_dtype(torch.promote_types(embeddings.dtype, references.dtype))
        x, others, phi = embeddings.to(dtype), references.to(dtype), self.phi.to(dtype)
        bad = ~((phi > 0) & phi.isfinite())
        if may_look(phi):
            refuse("FocalWeightedLoss", "phi must be positive and finite", phi, bad)
        phi = phi.masked_fill(bad, 1)
        near, bad_near = _log_sum_exp(x, others, positives, phi[0], self.offset)
        far, bad_far = _log_sum_exp(x, others, negatives, -phi[1], self.offset)
        loss = (near / phi[0] + far / phi[1]).masked_fill(bad_near | bad_far | bad.any(), torch.nan)
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.sum() / max(len(loss), 1)

    @torch.no_grad()
    def project_(self) -> None:
        """Brings ``phi`` back into [0.1, 10], in place; learners do so after every update."""
        self.phi.clamp_(0.1, 10)

    @torch.no_grad()
    def plot(self, distances: tuple[float, float] = (0.0, 2.0)) -> Figure:
        r"""Draws the loss of an anchor with a single positive, and with a single negative, over its distance.

        Args:
            distances: lowest and highest; normalised embeddings are 2 apart at most.

        Returns:
            A ``matplotlib.figure.Figure``: write it with its ``savefig``.

        Raises:
            ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
            ValueError: for distances that are none.
        """
        d = _plot.distances("FocalWeightedLoss", distances, self.phi)
        embeddings = torch.cat([torch.zeros_like(d), d])[:, None]
        anchor = torch.arange(len(d), device=d.device)
        pair, none = (anchor, anchor + len(d)), (anchor[:0], anchor[:0])
        each = copy.copy(self)
        each.reduction = "none"
        values = {
            "positive": each._of_pairs(embeddings, embeddings, pair, none)[: len(d)],
            "negative": each._of_pairs(embeddings, embeddings, none, pair)[: len(d)],
        }
        return _plot.panels("FocalWeightedLoss", d, "distance", values)

    def extra_repr(self) -> str:
        return f"offset={self.offset}, learnable={self.learnable}, reduction={self.reduction!r}"


def _log_sum_exp(
    x: Tensor,  # [M, D]
    others: Tensor,  # [R, D]
    pairs: Pairs,
    temperature: Tensor,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """log(1 + sum over its different pairs of exp(temperature (d - offset))) for each of M anchors; which are bad."""
    sizes = len(x), len(others)
    # An index out of range, which nobody has looked at on a GPU, goes to a row or column of its own.
    slots = tuple(i.where((i >= 0) & (i < size), size) for i, size in zip(pairs, sizes, strict=True))
    chosen = torch.zeros(sizes[0] + 1, sizes[1] + 1, dtype=torch.bool, device=x.device)
    chosen[slots] = True
    bad = chosen[:-1, -1] | chosen[-1].any()
    anchor, other = chosen[:-1, :-1].nonzero(as_tuple=True)
    exponents = temperature * (distances(x[anchor] - others[other]) - offset)
    dense = x.new_full(sizes, -torch.inf).index_put((anchor, other), exponents)
    return torch.logsumexp(torch.cat([x.new_zeros(len(x), 1), dense], 1), 1), bad
