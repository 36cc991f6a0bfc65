"""What a controller sees of a model: metrics, and statistics of the loss's parameters, on validation data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._batches import Batch, Output, call_model, prediction_of
from lossmeta._checks import check_positive_and_finite
from lossmeta._model_state import RandomState, evaluating
from lossmeta.ala._fitness import Fitness
from lossmeta.ala._validation import Validation
from lossmeta.ala.space import Coordinates, LossSpace
from lossmeta.ala.space_loss import SpaceLoss


class Measurement:
    """Metrics of a model, the higher the better, and the statistics of a space.

    Args:
        space: whose statistics are asked for.
        coordinates: of the space.
        metric: one, or pairs ``(metric, weight)``.
        valid: what statistics and metrics are measured on.
        rewarded_on: what the metrics are measured on where that is not ``valid``.
        higher_is_better: the metrics' direction where they do not say it.
        output: what of the model's output is the prediction.

    Attributes:
        metrics: without their weights.
        weights: of the metrics.
    """

    def __init__(
        self,
        space: LossSpace,
        coordinates: Coordinates,
        metric: Any,
        valid: Batch | Iterable[Batch],
        rewarded_on: Batch | Iterable[Batch] | None,
        higher_is_better: bool | None,
        output: Output,
    ) -> None:
        self.space, self.coordinates, self.output = space, coordinates, output
        self.metrics, self.weights = _weighted(metric)
        self.valid = Validation("Controller", valid)
        self.rewarded_on = (
            self.valid if rewarded_on is None else Validation("Controller", rewarded_on, "rewarded_on")
        )
        self.fitness = [
            Fitness("Controller", m, self.rewarded_on.valid, higher_is_better, 0.0) for m in self.metrics
        ]

    @torch.no_grad()
    def of(self, model: nn.Module, loss: SpaceLoss, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The metrics ``[metrics]`` now and, at a window's end, the statistics by parameter.

        The random numbers of the training go on as without: iterating over a DataLoader draws one.
        """
        random = RandomState(next((p.device for p in model.parameters()), torch.device("cpu")))
        try:
            return self._seen(model, loss, last)
        finally:
            random.bring_back()

    def _seen(self, model: nn.Module, loss: SpaceLoss, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        def predict(inputs: Any) -> Tensor:
            return prediction_of("Controller", call_model(model, inputs), self.output)[None]

        with evaluating(model):
            predictions, target = self.rewarded_on.predicted(predict)
            values = torch.stack([f.of_predictions(predictions, target)[0] for f in self.fitness])
            if not last:
                return values, {}
            if self.rewarded_on is not self.valid:
                predictions, target = self.valid.predicted(predict)
        prediction = predictions[0].float() if predictions.dtype != torch.float64 else predictions[0]
        seen = self.space.statistics(prediction, target, loss.placed(prediction))
        for p in self.coordinates.parameters:
            t = seen.get(p.name)
            if t is None or t.dim() != 2 or len(t) != p.count or not t.shape[1]:
                got = "none" if t is None else str(list(t.shape))
                raise ValueError(
                    f"Controller: the space's statistics of {p.name} must be [{p.count}, S], got {got}"
                )
        return values, {name: t.detach().float().cpu() for name, t in seen.items()}

    @property
    def names(self) -> list[str]:
        """Of the metrics."""
        return [
            type(m).__name__ if hasattr(m, "update") else str(getattr(m, "__name__", type(m).__name__))
            for m in self.metrics
        ]


def _weighted(metric: Any) -> tuple[list[Any], list[float]]:
    if not isinstance(metric, (list, tuple)):
        return [metric], [1.0]
    if not metric or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in metric):
        raise ValueError(f"Controller: metric must be one, or pairs (metric, weight), got {metric!r}")
    for _, weight in metric:
        check_positive_and_finite("Controller", "a metric's weight", weight)
    return [m for m, _ in metric], [float(weight) for _, weight in metric]


def measured_at(window: int, discount: float, evaluations: int) -> dict[int, float]:
    """At which steps of a window, from 1, the metric is measured, and its weight: the sum of Eq. 4 in as many parts."""
    weights = torch.tensor(
        [discount ** (window - j) for j in range(1, window + 1)], dtype=torch.float64, device="cpu"
    )
    # Steps whose share of the weights, counted from the end, passes 0/n, 1/n, ...: the last one is always there.
    share = weights.flip(0).cumsum(0) / weights.sum()
    found: dict[int, float] = {}
    back = -1
    for i in range(evaluations):
        back = max(back + 1, int((share <= i / evaluations + 1e-12).sum()))
        if back < window:
            found[window - back] = 0.0
    if evaluations == window:
        return {j: float(w) for j, w in enumerate(weights, 1)}
    return dict.fromkeys(sorted(found), 1.0)
