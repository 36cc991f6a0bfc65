"""Metrics that a loss can be adapted to: ``update``, ``compute``, ``reset``, ``higher_is_better``."""

from lossmeta.metrics._metric import Metric
from lossmeta.metrics.average_precision import AveragePrecision
from lossmeta.metrics.calibration_error import CalibrationError
from lossmeta.metrics.class_counts import BalancedErrorRate, MacroF1, WorstClassRecall
from lossmeta.metrics.error_rate import ErrorRate
from lossmeta.metrics.recall_at_k import RecallAtK, recall_at_k
from lossmeta.metrics.top_k import TopKErrorRate
from lossmeta.metrics.verification import VerificationAccuracy, verification_accuracy, verification_pairs

__all__ = [
    "AveragePrecision",
    "BalancedErrorRate",
    "CalibrationError",
    "ErrorRate",
    "MacroF1",
    "Metric",
    "RecallAtK",
    "TopKErrorRate",
    "VerificationAccuracy",
    "WorstClassRecall",
    "recall_at_k",
    "verification_accuracy",
    "verification_pairs",
]
