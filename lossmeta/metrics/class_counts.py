"""Metrics of how often each class is true, predicted, and both."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lossmeta._checks import check_at_least_one, may_look
from lossmeta.metrics._metric import Metric, check_batch, check_ignore_index, counted_samples


class ClassCounts(Metric):
    """What the metrics of this file share.

    Args:
        num_classes: C.
        ignore_index: label that does not count.
    """

    joined: ClassVar[dict[str, str]] = {"counts": "sum"}

    def __init__(self, num_classes: int, *, ignore_index: int = -100) -> None:
        self.name = type(self).__name__
        check_at_least_one(self.name, "num_classes", num_classes)
        check_ignore_index(self.name, ignore_index)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets every sample."""
        # Hits, predictions and labels of each class.
        self.counts = torch.zeros(3, self.num_classes, dtype=torch.float64, device="cpu")

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
        check_batch(self.name, scores, labels, weight)
        counts = self._counted(scores[None], labels, weight)[0]
        self.counts = self.counts.to(scores.device) + counts

    def compute(self) -> Tensor:
        """The metric, a float64 scalar; NaN before the first sample."""
        return self._of(*self.counts)

    @torch.no_grad()
    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        check_batch(self.name, scores, labels, None)
        return self._of(*self._counted(scores, labels, None).unbind(1))

    def _counted(self, scores: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        """``[B, 3, C]`` of scores ``[B, N, C, d...]``."""
        if (
            scores.dim() < 3
            or scores.shape[2] != self.num_classes
            or labels.shape != (*scores.shape[1:2], *scores.shape[3:])
        ):
            raise ValueError(
                f"{self.name}: scores must be [N, {self.num_classes}] or [N, {self.num_classes}, d...] and labels of "
                f"that shape without the classes, got {list(scores.shape[1:])} and {list(labels.shape)}"
            )
        labels, share, unusable = counted_samples(
            self.name, labels, self.num_classes, self.ignore_index, weight
        )
        top = scores.max(2)  # NaN where one of them is
        unknown = top.values.isnan() & (labels != self.ignore_index)
        if may_look(scores) and unknown.any():
            raise ValueError(f"{self.name}: scores must not be NaN, which predicts no class")
        unusable = unknown.flatten(1).any(1) | unusable
        predicted = top.indices.flatten(1)
        true = labels.clamp(0, self.num_classes - 1).flatten().expand_as(predicted)
        share = share.flatten().expand_as(true)
        counts = share.new_zeros(len(scores), 3, self.num_classes)
        counts[:, 0].scatter_add_(1, true, share * (predicted == true))
        counts[:, 1].scatter_add_(1, predicted, share)
        counts[:, 2].scatter_add_(1, true, share)
        return counts.masked_fill(unusable.view(-1, 1, 1), torch.nan)

    def _of(self, hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        """The metric of counts ``[..., C]``."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["counts"].shape != (3, self.num_classes):
            raise ValueError(
                f"{self.name}: counts must be [3, {self.num_classes}], got {list(state['counts'].shape)}"
            )
        self.counts = state["counts"].double()


class WorstClassRecall(ClassCounts):
    """The share of right predictions in the class that has the lowest; classes without samples do not count.

    Args:
        num_classes: C.
        ignore_index: label that does not count.

    Example:
        >>> metric = WorstClassRecall(2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> metric.compute().item()
        0.5
    """

    higher_is_better = True

    def _of(self, hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        recall = (hits / true).masked_fill(true == 0, torch.inf).amin(-1)
        return recall.masked_fill(recall == torch.inf, torch.nan)


class BalancedErrorRate(ClassCounts):
    """The mean over classes of the share of wrong predictions; classes without samples do not count.

    Args:
        num_classes: C.
        ignore_index: label that does not count.

    Example:
        >>> metric = BalancedErrorRate(2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> metric.compute().item()
        0.25
    """

    higher_is_better = False

    def _of(self, hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        return 1 - _mean_where(true > 0, hits / true, hits)


class MacroF1(ClassCounts):
    """The mean over classes of F1, 2 hits / (predictions + labels).

    Classes that are neither true nor predicted do not count.

    Args:
        num_classes: C.
        ignore_index: label that does not count.

    Example:
        >>> metric = MacroF1(2)
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> round(metric.compute().item(), 4)
        0.6667
    """

    higher_is_better = True

    def _of(self, hits: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        total = predicted + true
        return _mean_where(total > 0, 2 * hits / total, hits)


def _mean_where(counts: Tensor, values: Tensor, known: Tensor) -> Tensor:
    """Over the last dimension, of the values that count; NaN where there is none, or what is known is NaN."""
    mean = torch.where(counts, values, 0).sum(-1) / counts.sum(-1)
    return mean.masked_fill(known.isnan().any(-1), torch.nan)
