"""How often the label is not among the k most likely classes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lossmeta._checks import check_at_least_one, may_look
from lossmeta.metrics._metric import Metric, check_batch, check_ignore_index, counted_samples

NAME = "TopKErrorRate"


class TopKErrorRate(Metric):
    """The share of samples whose label is not among the k classes with the highest scores.

    Where other classes have the label's score, every order of them is as likely: a sample then counts in part.

    Args:
        k: how many classes; from C on nothing is wrong.
        ignore_index: label that does not count.

    Example:
        >>> metric = TopKErrorRate(2)
        >>> metric.update(torch.tensor([[3.0, 2.0, 1.0], [0.0, 3.0, 1.0]]), torch.tensor([1, 0]))
        >>> metric.compute().item()
        0.5
    """

    higher_is_better = False
    joined: ClassVar[dict[str, str]] = {"errors": "sum", "count": "sum"}

    def __init__(self, k: int = 5, *, ignore_index: int = -100) -> None:
        check_at_least_one(NAME, "k", k)
        check_ignore_index(NAME, ignore_index)
        self.k, self.ignore_index = k, ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets every sample."""
        self.errors = torch.zeros((), dtype=torch.float64, device="cpu")
        self.count = torch.zeros((), dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def update(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            scores: ``[N, C]`` or ``[N, C, d...]``, the higher the more likely.
            labels: integers in [0, C), ``[N]`` or ``[N, d...]``.
            weight: of each sample, ``[N]``.

        Raises:
            TypeError: for something that is not a tensor.
            ValueError: for shapes, dtypes, devices, labels or weights that do not fit, and a NaN among the scores.
                Nothing is counted then.
        """
        check_batch(NAME, scores, labels, weight)
        errors, count = self._counted(scores[None], labels, weight)
        self.errors = self.errors.to(scores.device) + errors[0]
        self.count = self.count.to(scores.device) + count

    def compute(self) -> Tensor:
        """The error rate in [0, 1], a float64 scalar; NaN before the first sample."""
        return self.errors / self.count

    @torch.no_grad()
    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        check_batch(NAME, scores, labels, None)
        errors, count = self._counted(scores, labels, None)
        return errors / count

    def _counted(self, scores: Tensor, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """The errors ``[B]`` of scores ``[B, N, C, d...]``, and the number of samples."""
        if scores.dim() < 3 or labels.shape != (*scores.shape[1:2], *scores.shape[3:]) or not scores.shape[2]:
            raise ValueError(
                f"{NAME}: scores must be [N, C] or [N, C, d...] and labels of that shape without the classes, got "
                f"{list(scores.shape[1:])} and {list(labels.shape)}"
            )
        labels, share, unusable = counted_samples(NAME, labels, scores.shape[2], self.ignore_index, weight)
        used = (labels >= 0) & (labels < scores.shape[2]) & (labels != self.ignore_index)
        unknown = scores.isnan().any(2) & used
        if may_look(scores) and unknown.any():
            raise ValueError(f"{NAME}: scores must not be NaN, which have no order")
        own = scores.gather(
            2, labels.where(used, 0)[None, :, None].expand(len(scores), -1, 1, *labels.shape[1:])
        )
        higher, as_high = (scores > own).sum(2), (scores == own).sum(2)
        right = ((self.k - higher).double() / as_high).clamp(0, 1)
        unusable = unknown.flatten(1).any(1) | unusable
        errors = ((1 - right) * share).flatten(1).sum(1).masked_fill(unusable, torch.nan)
        return errors, share.sum()

    def state_dict(self) -> dict[str, Any]:
        return {"errors": self.errors, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors, self.count = state["errors"], state["count"].double()
