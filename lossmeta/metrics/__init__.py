"""Metrics that a loss can be adapted to: ``update``, ``compute``, ``reset``, ``higher_is_better``."""

from lossmeta.metrics._metric import Metric
from lossmeta.metrics.average_precision import AveragePrecision
from lossmeta.metrics.error_rate import ErrorRate

__all__ = ["AveragePrecision", "ErrorRate", "Metric"]
