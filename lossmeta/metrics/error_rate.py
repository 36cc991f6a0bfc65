"""Classification error."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossmeta._checks import may_look, outside
from lossmeta.metrics._metric import (
    Metric,
    check_batch,
    check_ignore_index,
    class_labels,
    is_no_weight,
    yes_or_no,
)

NO_PREDICTION = "ErrorRate: scores must not be NaN; such a prediction is neither right nor wrong"


class ErrorRate(Metric):
    """The share of samples whose highest score is not at their label; lower is better.

    With a ``threshold`` also the share of wrong yes-or-no labels: yes is predicted where a score lies above it. All
    labels of all samples count alike, as in scikit-learn's ``hamming_loss`` and torchmetrics' micro average.

    Counts stay on the device of the scores: only reading the result waits for it. On a GPU nothing is looked at. There
    a label or weight out of range or a NaN among the scores makes the result NaN.

    Args:
        ignore_index: label that does not count.
        threshold: of yes-or-no labels: 0 for logits, 0.5 for probabilities. Without it they are refused.

    Raises:
        TypeError: for an ``ignore_index`` that is no integer and a threshold that is no number.
        ValueError: for a threshold that is not finite.

    Example:
        >>> metric = ErrorRate()
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        >>> metric.compute().item()
        0.5
        >>> ErrorRate(threshold=0.0)(torch.tensor([[2.0, -1.0], [0.5, 3.0]]), torch.tensor([[1, 0], [0, 1]])).item()
        0.25
    """

    higher_is_better = False
    joined: ClassVar[dict[str, str]] = {"errors": "sum", "count": "sum"}

    def __init__(self, *, ignore_index: int = -100, threshold: float | None = None) -> None:
        check_ignore_index("ErrorRate", ignore_index)
        if threshold is not None and not isinstance(threshold, (int, float)):
            raise TypeError(f"ErrorRate: threshold must be a number, got {type(threshold).__name__}")
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"ErrorRate: threshold must be finite, got {threshold}")
        self.ignore_index = ignore_index
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Forgets every sample."""
        self.errors = torch.zeros((), dtype=torch.float64, device="cpu")
        self.count = torch.zeros((), dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def update(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            scores: ``[N, C]`` or ``[N, C, d...]`` (logits do); with a threshold also ``[N, ...]``.
            labels: integers in [0, C) of that shape without ``C``; with a threshold also 0 and 1 of the shape of the
                scores, as integers, bools or floats. Those of scores with one column may lack it.
            weight: of each sample, ``[N]``.

        Raises:
            TypeError: for something that is not a tensor.
            ValueError: for shapes, dtypes, devices, labels or weights that do not fit, and a NaN among the scores: such
                a prediction is neither right nor wrong. Nothing is counted then.
        """
        check_batch("ErrorRate", scores, labels, weight)
        if scores.shape[1:2] == (1,) and labels.shape == (*scores.shape[:1], *scores.shape[2:]):
            scores = scores.squeeze(1)
        if labels.shape == scores.shape:
            wrong, valid, bad = self._yes_or_no(scores, labels)
        else:
            wrong, valid, bad = self._classes(scores, labels)
        unknown = scores.isnan()
        unknown = (unknown if wrong.shape == scores.shape else unknown.any(1)) & valid
        if may_look(scores) and unknown.any():
            raise ValueError(NO_PREDICTION)
        share, unusable = valid.double(), (bad | unknown).any()
        if weight is not None:
            share = share * weight.double().view(-1, *[1] * (valid.dim() - 1))
            unusable = unusable | is_no_weight(weight).any()
        errors = (share * wrong).sum().masked_fill(unusable, torch.nan)
        self.errors = self.errors.to(scores.device) + errors
        self.count = self.count.to(scores.device) + share.sum()

    @torch.no_grad()
    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != (*scores.shape[1:2], *scores.shape[3:]) or scores.dim() < 3:
            return super().each(scores, labels)
        check_batch("ErrorRate", scores, labels, None)
        flat = scores.flatten(0, 1), labels.expand(len(scores), *labels.shape).flatten(0, 1)
        wrong, valid, bad = self._classes(*flat)
        unknown = flat[0].isnan().any(1) & valid
        if may_look(scores) and unknown.any():
            raise ValueError(NO_PREDICTION)
        wrong, valid, unusable = (t.view(len(scores), -1) for t in (wrong, valid, bad | unknown))
        return (wrong.sum(1) / valid.double().sum(1)).masked_fill(unusable.any(1), torch.nan)

    def _classes(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which are wrong, which count, and which have no such class."""
        if scores.dim() < 2 or labels.shape != (*scores.shape[:1], *scores.shape[2:]):
            raise ValueError(
                "ErrorRate: labels must have the shape of scores [N, C, d...] without C, "
                f"got {list(labels.shape)} for scores {list(scores.shape)}"
            )
        classes = scores.shape[1]
        if classes == 0:
            raise ValueError(f"ErrorRate: scores must have at least one class, got {list(scores.shape)}")
        labels = class_labels("ErrorRate", labels)
        bad = outside("ErrorRate", "labels", labels, classes, self.ignore_index)
        valid = labels != self.ignore_index
        return (scores.argmax(1) != labels) & valid, valid, bad

    def _yes_or_no(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.threshold is None:
            raise ValueError(
                "ErrorRate: yes-or-no labels need a threshold, 0 for logits or 0.5 for probabilities, got none for "
                f"labels {list(labels.shape)} and scores {list(scores.shape)}; or give scores [N, C] with the index of "
                "a class per sample"
            )
        labels = yes_or_no("ErrorRate", labels, self.ignore_index)
        valid = labels != self.ignore_index
        wrong = ((scores > self.threshold) != (labels == 1)) & valid
        return wrong, valid, ((labels != 0) & (labels != 1)) & valid

    def compute(self) -> Tensor:
        """The error rate in [0, 1], a float64 scalar; NaN before the first sample."""
        return self.errors / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"errors": self.errors, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors, self.count = state["errors"], state["count"].double()
