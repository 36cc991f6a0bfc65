"""Classification error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossmeta._checks import check_int64, check_same_device, check_tensors, outside


class ErrorRate:
    """The share of samples whose highest score is not at their label; lower is better.

    Counts stay on the device of the scores: only reading the result waits for it. On a GPU a label out of range, which
    is not looked at there, makes the result NaN.

    Args:
        ignore_index: label of samples that do not count.

    Example:
        >>> metric = ErrorRate()
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        >>> metric.compute().item()
        0.5
    """

    higher_is_better = False

    def __init__(self, *, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets every sample."""
        self.errors = torch.zeros((), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds a batch: scores ``[N, C]`` or ``[N, C, d...]`` (logits do), labels (int64) without ``C``.

        Raises:
            TypeError: for something that is not a tensor.
            ValueError: for shapes, dtypes, devices or labels that do not fit. Nothing is counted then.
        """
        check_tensors("ErrorRate", scores=scores, labels=labels)
        if scores.dim() < 2 or labels.shape != (*scores.shape[:1], *scores.shape[2:]):
            raise ValueError(
                "ErrorRate: labels must have the shape of scores [N, C, d...] without C, "
                f"got {list(labels.shape)} for scores {list(scores.shape)}"
            )
        classes = scores.shape[1]
        if classes == 0:
            raise ValueError(f"ErrorRate: scores must have at least one class, got {list(scores.shape)}")
        check_int64("ErrorRate", labels=labels)
        check_same_device("ErrorRate", labels=labels, scores=scores)
        bad = outside("ErrorRate", "labels", labels, classes, self.ignore_index)
        valid = labels != self.ignore_index
        wrong = (scores.argmax(1) != labels) & valid
        errors = wrong.sum(dtype=torch.float64).masked_fill(bad.any(), torch.nan)
        self.errors = self.errors.to(scores.device) + errors
        self.count = self.count.to(scores.device) + valid.sum()

    def compute(self) -> Tensor:
        """The error rate in [0, 1], a float64 scalar; NaN before the first sample."""
        return self.errors.double() / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"errors": self.errors, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors, self.count = state["errors"], state["count"]
