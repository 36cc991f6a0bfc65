"""Losses as modules: each takes the place of one from ``torch.nn`` or of a metric-learning loss."""

from lossmeta.losses.parametric_cross_entropy import ParametricCrossEntropy

__all__ = ["ParametricCrossEntropy"]
