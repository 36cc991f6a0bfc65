"""Metrics that a loss can be adapted to: ``update``, ``compute``, ``reset``, ``higher_is_better``."""

from lossmeta.metrics._metric import Metric
from lossmeta.metrics.average_precision import AveragePrecision
from lossmeta.metrics.class_counts import BalancedErrorRate, MacroF1, WorstClassRecall
from lossmeta.metrics.error_rate import ErrorRate
from lossmeta.metrics.recall_at_k import RecallAtK, recall_at_k

__all__ = [
    "AveragePrecision",
    "BalancedErrorRate",
    "ErrorRate",
    "MacroF1",
    "Metric",
    "RecallAtK",
    "WorstClassRecall",
    "recall_at_k",
]
