"""Losses as modules: each takes the place of one from ``torch.nn`` or of a metric-learning loss."""

from lossmeta.losses._parameters import check_not_minimized
from lossmeta.losses.distance_mixture import DistanceMixtureLoss
from lossmeta.losses.focal_weighted import FocalWeightedLoss
from lossmeta.losses.loss_network import LossNetwork
from lossmeta.losses.loss_weighting import LossWeighting
from lossmeta.losses.parametric_cross_entropy import ParametricCrossEntropy
from lossmeta.losses.taylor import TaylorLoss
from lossmeta.losses.transition import TransitionLoss

__all__ = [
    "DistanceMixtureLoss",
    "FocalWeightedLoss",
    "LossNetwork",
    "LossWeighting",
    "ParametricCrossEntropy",
    "TaylorLoss",
    "TransitionLoss",
    "check_not_minimized",
]
