"""How far a model's confidence is from how often it is right."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lossmeta._checks import check_at_least_one, may_look, refuse
from lossmeta.metrics._metric import Metric, check_batch, check_ignore_index, counted_samples

NAME = "CalibrationError"


class CalibrationError(Metric):
    r"""The expected calibration error of the most likely class, :math:`\sum_b \frac{n_b}{N} |a_b - c_b|`.

    Samples go by their confidence, the probability of the most likely class, into bins of equal width, each with its
    upper edge; :math:`a_b` is the share of right predictions in a bin, :math:`c_b` the mean confidence, and
    :math:`n_b` the number of samples. Its value depends on the number of bins.

    Args:
        bins: how many.
        logits: whether scores are logits, or probabilities.
        ignore_index: label that does not count.

    Sources:
        Guo et al., "On Calibration of Modern Neural Networks" (2017).

    Example:
        >>> metric = CalibrationError(logits=False)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        >>> metric.compute().item()  # half of them are right, at a confidence of 3/4
        0.25
    """

    higher_is_better = False
    joined: ClassVar[dict[str, str]] = {"sums": "sum"}

    def __init__(self, bins: int = 15, *, logits: bool = True, ignore_index: int = -100) -> None:
        check_at_least_one(NAME, "bins", bins)
        check_ignore_index(NAME, ignore_index)
        self.bins, self.logits, self.ignore_index = bins, logits, ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets every sample."""
        # Samples, right ones, and confidences of each bin.
        self.sums = torch.zeros(3, self.bins, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def update(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            scores: ``[N, C]`` or ``[N, C, d...]``.
            labels: integers in [0, C), ``[N]`` or ``[N, d...]``.
            weight: of each sample, ``[N]``.

        Raises:
            TypeError: for something that is not a tensor.
            ValueError: for shapes, dtypes, devices, labels or weights that do not fit, a NaN among the scores, and
                probabilities outside of [0, 1]. Nothing is counted then.
        """
        check_batch(NAME, scores, labels, weight)
        sums = self._summed(scores[None], labels, weight)[0]
        self.sums = self.sums.to(scores.device) + sums

    def compute(self) -> Tensor:
        """The error in [0, 1], a float64 scalar; NaN before the first sample."""
        return self._of(self.sums)

    @torch.no_grad()
    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        check_batch(NAME, scores, labels, None)
        return self._of(self._summed(scores, labels, None))

    def _of(self, sums: Tensor) -> Tensor:
        count, right, confidence = sums.unbind(-2)
        return (right - confidence).abs().sum(-1) / count.sum(-1)

    def _summed(self, scores: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        """``[B, 3, bins]`` of scores ``[B, N, C, d...]``."""
        if scores.dim() < 3 or labels.shape != (*scores.shape[1:2], *scores.shape[3:]) or not scores.shape[2]:
            raise ValueError(
                f"{NAME}: scores must be [N, C] or [N, C, d...] and labels of that shape without the classes, got "
                f"{list(scores.shape[1:])} and {list(labels.shape)}"
            )
        labels, share, unusable = counted_samples(NAME, labels, scores.shape[2], self.ignore_index, weight)
        outside_of_range = scores.isnan() if self.logits else ~((scores >= 0) & (scores <= 1))
        expected = "scores must not be NaN" if self.logits else "probabilities must lie in [0, 1]"
        outside_of_range = outside_of_range & (labels != self.ignore_index)[:, None]
        if may_look(scores):
            refuse(NAME, expected, scores, outside_of_range)
        p = scores.double().softmax(2) if self.logits else scores.double()
        confidence, predicted = p.max(2)
        unusable = outside_of_range.flatten(1).any(1) | unusable
        place = (confidence * self.bins).ceil().long().sub(1).clamp(0, self.bins - 1).flatten(1)
        share = share.expand_as(confidence).flatten(1)
        right = (predicted == labels).double().flatten(1)
        sums = share.new_zeros(len(scores), 3, self.bins)
        for k, values in enumerate((torch.ones_like(right), right, confidence.flatten(1).nan_to_num())):
            sums[:, k].scatter_add_(1, place, share * values)
        return sums.masked_fill(unusable.view(-1, 1, 1), torch.nan)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["sums"].shape != (3, self.bins):
            raise ValueError(f"{NAME}: sums must be [3, {self.bins}], got {list(state['sums'].shape)}")
        self.sums = state["sums"].double()
