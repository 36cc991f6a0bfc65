"""How good predictions on the validation data are, the higher the better."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lossmeta._batches import Batch
from lossmeta.ala._validation import Validation
from lossmeta.metrics import Metric

COPIES = 4  # of the predictions, with noise
PROBE = 0.3  # of a logit
HALVES = 16  # pairs of halves of the validation data
AT_ONCE = 1 << 22  # predictions whose copies are judged in one call


class Fitness:
    """A metric of children's predictions on the same data.

    Args:
        where: who asks, for errors.
        metric: as for :class:`Population`.
        valid: a batch, or batches.
        higher_is_better: the metric's direction.
        jitter: standard deviation of the noise.
    """

    def __init__(
        self,
        where: str,
        metric: Any,
        valid: Batch | Iterable[Batch],
        higher_is_better: bool | None,
        jitter: float,
    ) -> None:
        self.where, self.each = where, _each(where, metric)
        if higher_is_better is None:
            higher_is_better = getattr(
                metric, "higher_is_better", True if not hasattr(metric, "update") else None
            )
        if higher_is_better is None:
            raise ValueError(
                f"{where}: higher_is_better must be given, {type(metric).__name__} does not say its direction"
            )
        self.sign = 1.0 if higher_is_better else -1.0
        self.validation, self.jitter = Validation(where, valid), jitter
        self.noise: Tensor | None = None

    def of(self, predict: Callable[[Any], Tensor]) -> Tensor:
        """``[B]``; NaN where a prediction is not finite. ``predict(inputs)`` gives ``[B, N, ...]``."""
        return self.of_predictions(*self.validation.predicted(predict))

    def of_predictions(self, predictions: Tensor, target: Tensor) -> Tensor:
        """The same, of predictions ``[B, N, ...]`` that are at hand."""
        return self.sign * self._smoothed(predictions, target)

    def slopes(self, predict: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """Of a single model: its fitness ``[]``, and what it would gain, ``[C]``, from a higher logit of each class."""
        predictions, target = self.validation.predicted(predict)
        if predictions.dim() != 3:
            raise ValueError(
                f"{self.where}: with one child the prediction must be [N, C], got {list(predictions.shape[1:])}"
            )
        shifts = (
            PROBE
            * torch.eye(predictions.shape[2], dtype=predictions.dtype, device=predictions.device)[:, None]
        )
        up, down = (self._smoothed(predictions + s * shifts, target) for s in (1, -1))
        return (
            self.sign * self._smoothed(predictions, target)[0].cpu(),
            (self.sign * (up - down)).cpu(),
        )

    @torch.no_grad()
    def ahead(self, predictions: Tensor, target: Tensor) -> bool:
        """Whether the first of two models, ``[2, N, ...]``, is fitter than the second by more than a standard error.

        The error is that of the difference over random halves of the samples: of half of N without replacement it is
        as large as that of N. Halves have the same share of every class.
        """
        fitness = self.of_predictions(predictions, target)
        difference = float(fitness[0] - fitness[1])
        if not bool(fitness[1].isfinite()):
            return bool(fitness[0].isfinite())
        return difference > self._error(predictions.float(), target)

    def _error(self, scores: Tensor, target: Tensor) -> float:
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(HALVES):
            rows = torch.randperm(scores.shape[1], generator=generator, device="cpu").to(scores.device)
            if target.dim() == 1 and not target.is_floating_point():
                rows = rows[target[rows].argsort(stable=True)]
            for half in (rows[::2], rows[1::2]):
                try:
                    values = self._value(scores[:, half], target[half])
                except ValueError:
                    continue  # a half without what the metric needs says nothing
                found.append(values[0] - values[1])
        known = [d for d in torch.stack(found).tolist() if math.isfinite(d)] if found else []
        return statistics.pstdev(known) if len(known) > 1 else 0.0

    @torch.no_grad()
    def _smoothed(self, predictions: Tensor, target: Tensor) -> Tensor:
        finite = predictions.flatten(1).isfinite().all(1)
        scores = predictions.float().where(finite.view(-1, *[1] * (predictions.dim() - 1)), 0)
        copies = [scores]
        if self.jitter > 0:
            copies += [scores + n for n in self._noise(scores)]
        if scores.numel() <= AT_ONCE:
            found = self._value(torch.cat(copies), target).view(len(copies), -1)
        else:
            found = torch.stack([self._value(c, target) for c in copies])
        return found.mean(0).masked_fill(~finite, torch.nan)

    def _value(self, scores: Tensor, target: Tensor) -> Tensor:
        value = self.each(scores, target)
        if value.shape != (len(scores),):
            raise ValueError(f"{self.where}: metric must give one number, got {list(value.shape[1:])}")
        return value.double()

    def _noise(self, scores: Tensor) -> Tensor:
        """The same for all children and windows."""
        shape = (COPIES, *scores.shape[1:])
        if self.noise is None or self.noise.shape != shape or self.noise.device != scores.device:
            generator = torch.Generator().manual_seed(0)
            draws = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
            self.noise = (self.jitter * draws).to(scores.device)
        return self.noise


def _each(where: str, metric: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """``each(scores [B, N, ...], target) -> [B]``."""
    if isinstance(metric, Metric):
        return metric.each
    if all(hasattr(metric, name) for name in ("reset", "update", "compute")):
        function = partial(_once, metric)
    elif callable(metric):
        function = metric
    else:
        raise TypeError(f"{where}: metric must be a metric or a function, got {type(metric).__name__}")

    def each(scores: Tensor, target: Tensor) -> Tensor:
        values = [function(s, target) for s in scores]
        for v in values:
            if isinstance(v, Tensor) and v.numel() != 1:
                raise ValueError(f"{where}: metric must give one number, got {list(v.shape)}")
        return torch.stack(
            [
                (v if isinstance(v, Tensor) else torch.tensor(v, device="cpu", dtype=torch.float64))
                .double()
                .reshape(())
                .to(scores.device)
                for v in values
            ]
        )

    return each


def _once(metric: Any, prediction: Tensor, target: Tensor) -> Any:
    """A metric as those of torchmetrics are, of this alone."""
    alone = copy.deepcopy(metric)
    alone.reset()
    alone.update(prediction, target)
    return alone.compute()
