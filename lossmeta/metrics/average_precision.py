"""Average precision, the area under the precision-recall curve (AUCPR in ALA)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lossmeta._checks import may_look, refuse
from lossmeta.metrics._metric import (
    Metric,
    check_batch,
    check_ignore_index,
    class_labels,
    refuse_weights,
    yes_or_no,
)

NAME = "AveragePrecision"
MIXED = f"{NAME}: all batches must have a weight, or none, got both"


class AveragePrecision(Metric):
    """Average precision, exact also where scores are tied; higher is better.

    With positives P, ``AP = (1/|P|) sum_{p in P} |{q in P: s_q >= s_p}| / |{n: s_n >= s_p}|``: the precision
    at the threshold of each positive, averaged. With C classes (one against the rest), or C labels of a sample, it is
    the mean over those that occur; scikit-learn's ``average="macro"`` counts 0 for the others. Scores of different
    samples are ranked against each other, so give probabilities (or their logarithms), not logits, where classes
    exclude each other. All scores are kept until :meth:`reset`, on their device.

    Args:
        ignore_index: label that does not count.

    Raises:
        TypeError: for an ``ignore_index`` that is no integer.

    Example:
        >>> metric = AveragePrecision()
        >>> metric.update(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1]))
        >>> round(metric.compute().item(), 4)
        0.8333
    """

    higher_is_better = True
    joined: ClassVar[dict[str, str]] = {"scores": "cat", "labels": "cat", "weights": "cat"}

    def __init__(self, *, ignore_index: int = -100) -> None:
        check_ignore_index(NAME, ignore_index)
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets every sample."""
        self.scores: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.weights: list[Tensor] = []

    def update(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            scores: ``[N, C]``; or ``[N]`` or ``[N, 1]`` for one label.
            labels: integers in [0, C), ``[N]``; or 0 and 1 of the shape of the scores, as integers, bools or floats.
                Those of one label are 0 and 1 in either shape.
            weight: of each sample, ``[N]``; in all batches or in none.

        Raises:
            TypeError: for something that is not a tensor.
            ValueError: for shapes, dtypes, devices or weights that do not fit, a NaN among the scores, or labels out of
                range. Nothing is added then. On a GPU, where looking would wait for the device, :meth:`compute` looks.
        """
        check_batch(NAME, scores, labels, weight)
        if scores.dim() not in (1, 2) or labels.shape not in (scores.shape, scores.shape[:1]):
            raise ValueError(
                f"{NAME}: scores must be [N] or [N, C] and labels [N] or [N, C], "
                f"got {list(scores.shape)} and {list(labels.shape)}"
            )
        if scores.shape[1:] == (1,):
            scores, labels = scores.squeeze(1), labels.flatten()
        if self.scores and (scores.shape[1:], labels.dim()) != (
            self.scores[0].shape[1:],
            self.labels[0].dim(),
        ):
            raise ValueError(
                f"{NAME}: scores must stay [N{_classes(self.scores[0])}] and labels [N{_classes(self.labels[0])}], "
                f"got [N{_classes(scores)}] and [N{_classes(labels)}]"
            )
        if self.scores and bool(self.weights) != (weight is not None):
            raise ValueError(MIXED)
        per_class = labels.dim() < scores.dim()
        labels = class_labels(NAME, labels) if per_class else yes_or_no(NAME, labels, self.ignore_index)
        if may_look(scores):
            self._check_values(scores, labels)
        # Copies: the caller may reuse its buffers.
        self.scores.append(scores.detach().clone())
        self.labels.append(labels.detach().clone())
        if weight is not None:
            self.weights.append(weight.detach().double().clone())

    def compute(self) -> Tensor:
        """The average precision in [0, 1], a float64 scalar; NaN where nothing has a positive.

        Raises:
            ValueError: for a NaN among the scores, and labels or weights out of range, where :meth:`update` could not
                look.
        """
        if not self.scores:
            return torch.full((), torch.nan, dtype=torch.float64, device="cpu")
        scores, labels = torch.cat(self.scores), torch.cat(self.labels)
        weight = torch.cat(self.weights) if self.weights else None
        self._check_values(scores, labels)
        if weight is not None:
            if len(weight) != len(scores):
                raise ValueError(MIXED)
            refuse_weights(NAME, weight)
        columns = scores.T if scores.dim() == 2 else [scores]
        if labels.dim() == scores.dim():
            given = labels.T if labels.dim() == 2 else [labels]
            found = [self._of(s, y == 1, y, weight) for s, y in zip(columns, given, strict=True)]
        else:
            found = [self._of(s, labels == c, labels, weight) for c, s in enumerate(columns)]
        return torch.stack(found).nanmean() if found else scores.new_full((), torch.nan, dtype=torch.float64)

    def _of(self, scores: Tensor, positive: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        counts = labels != self.ignore_index
        if not counts.all():
            scores, positive = scores[counts], positive[counts]
            weight = None if weight is None else weight[counts]
        return (
            _average_precision(scores, positive)
            if weight is None
            else _weighted_average_precision(scores, positive, weight)
        )

    def _check_values(self, scores: Tensor, labels: Tensor) -> None:
        counts = labels != self.ignore_index
        unknown = scores.isnan() & (counts if labels.dim() == scores.dim() else counts[:, None])
        if unknown.any():
            raise ValueError(f"{NAME}: scores must not be NaN")
        classes = 2 if labels.dim() == scores.dim() else scores.shape[1]
        refuse(
            NAME, f"labels must lie in [0, {classes})", labels, ((labels < 0) | (labels >= classes)) & counts
        )

    def state_dict(self) -> dict[str, Any]:
        return {"scores": list(self.scores), "labels": list(self.labels), "weights": list(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.labels = list(state["scores"]), list(state["labels"])
        self.weights = list(state.get("weights", ()))


def _classes(scores: Tensor) -> str:
    return "".join(f", {size}" for size in scores.shape[1:])


def _average_precision(
    scores: Tensor,  # [N]
    positive: Tensor,  # [N]
) -> Tensor:
    order, hits = _sorted(scores), _sorted(scores[positive])
    thresholds, counts = hits.unique_consecutive(return_counts=True)
    hits_above = counts.flip(0).cumsum(0).flip(0)
    # Of n sorted values, n - searchsorted(v) are at least v.
    above = len(order) - torch.searchsorted(order, thresholds)
    return (counts * hits_above.double() / above).sum() / len(hits)


def _weighted_average_precision(scores: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Each sample counts as often as its weight says."""
    order = scores.argsort(descending=True)
    scores, hits = scores[order], torch.where(positive, weight, 0)[order]
    _, groups = scores.unique_consecutive(return_counts=True)
    last = groups.cumsum(0) - 1  # of the samples with the same score
    above, hits_above = weight[order].cumsum(0)[last], hits.cumsum(0)[last]
    gained = torch.diff(hits_above, prepend=hits_above.new_zeros(1))
    return (gained * (hits_above / above).where(above > 0, 0)).sum() / hits.sum()


def _sorted(values: Tensor) -> Tensor:
    if values.device.type != "cpu":
        return values.sort().values
    # numpy's sort of values is vectorised: ten times as fast as torch's, which also returns indices.
    values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    return torch.from_numpy(np.sort(values.numpy()))
