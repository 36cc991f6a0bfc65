"""Losses as modules: each takes the place of one from ``torch.nn`` or of a metric-learning loss."""

from lossmeta.losses._parameters import check_not_minimized
from lossmeta.losses.distance_mixture import DistanceMixtureLoss
from lossmeta.losses.focal_weighted import FocalWeightedLoss
from lossmeta.losses.loss_network import LossNetwork
from lossmeta.losses.parametric_cross_entropy import ParametricCrossEntropy
from lossmeta.losses.taylor import TaylorLoss

__all__ = [
    "DistanceMixtureLoss",
    "FocalWeightedLoss",
    "LossNetwork",
    "ParametricCrossEntropy",
    "TaylorLoss",
    "check_not_minimized",
]
