"""Average precision, the area under the precision-recall curve (AUCPR in ALA)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossmeta._checks import check_int64, check_same_device, check_tensors, may_look, refuse


class AveragePrecision:
    """Average precision, exact also where scores are tied; higher is better.

    With positives P, ``AP = (1/|P|) sum_{p in P} |{q in P: s_q >= s_p}| / |{n: s_n >= s_p}|``: the precision
    at the threshold of each positive, averaged. With C classes it is the mean over the classes (one against
    the rest) that occur among the labels. Scores of different samples are ranked against each other, so give
    probabilities (or their logarithms), not logits. All scores are kept until :meth:`reset`, on their device.

    Example:
        >>> metric = AveragePrecision()
        >>> metric.update(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1]))
        >>> round(metric.compute().item(), 4)
        0.8333
    """

    higher_is_better = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets every sample."""
        self.scores: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds a batch: scores ``[N, C]`` with labels (int64) in [0, C), or scores ``[N]`` with labels 0 and 1.

        Raises:
            TypeError: for something that is not a tensor.
            ValueError: for shapes, dtypes or devices that do not fit, a NaN among the scores, or labels out of range.
                Nothing is added then. On a GPU, where looking would wait for the device, :meth:`compute` looks.
        """
        check_tensors("AveragePrecision", scores=scores, labels=labels)
        if scores.dim() not in (1, 2) or labels.shape != scores.shape[:1]:
            raise ValueError(
                "AveragePrecision: scores must be [N] or [N, C] and labels [N], "
                f"got {list(scores.shape)} and {list(labels.shape)}"
            )
        if self.scores and scores.shape[1:] != self.scores[0].shape[1:]:
            raise ValueError(
                f"AveragePrecision: scores must stay [N{_classes(self.scores[0])}], got [N{_classes(scores)}]"
            )
        check_int64("AveragePrecision", labels=labels)
        check_same_device("AveragePrecision", labels=labels, scores=scores)
        if may_look(scores):
            _check_values(scores, labels)
        # Copies: the caller may reuse its buffers.
        self.scores.append(scores.detach().clone())
        self.labels.append(labels.detach().clone())

    def compute(self) -> Tensor:
        """The average precision in [0, 1], a float64 scalar; NaN where no class has a positive.

        Raises:
            ValueError: for a NaN among the scores, or labels out of range, where :meth:`update` could not look.
        """
        if not self.scores:
            return torch.full((), torch.nan, dtype=torch.float64)
        scores, labels = torch.cat(self.scores), torch.cat(self.labels)
        _check_values(scores, labels)
        if scores.dim() == 1:
            return _average_precision(scores, labels == 1)
        return torch.stack([_average_precision(s, labels == c) for c, s in enumerate(scores.T)]).nanmean()

    def state_dict(self) -> dict[str, Any]:
        return {"scores": list(self.scores), "labels": list(self.labels)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.labels = list(state["scores"]), list(state["labels"])


def _check_values(scores: Tensor, labels: Tensor) -> None:
    if scores.isnan().any():
        raise ValueError("AveragePrecision: scores must not be NaN")
    classes = 2 if scores.dim() == 1 else scores.shape[1]
    refuse(
        "AveragePrecision", f"labels must lie in [0, {classes})", labels, (labels < 0) | (labels >= classes)
    )


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


def _sorted(values: Tensor) -> Tensor:
    if values.device.type != "cpu":
        return values.sort().values
    # numpy's sort of values is vectorised: ten times as fast as torch's, which also returns indices.
    values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    return torch.from_numpy(np.sort(values.numpy()))
