"""Losses as modules: each takes the place of one from ``torch.nn`` or of a metric-learning loss."""

from lossmeta.losses._parameters import check_not_minimized
from lossmeta.losses.distance_mixture import DistanceMixtureLoss
from lossmeta.losses.focal_weighted import FocalWeightedLoss
from lossmeta.losses.imbalance import FocalLoss, LDAMLoss, LogitAdjustedLoss
from lossmeta.losses.loss_network import LossNetwork
from lossmeta.losses.loss_weighting import LossWeighting
from lossmeta.losses.noise_correction import ForwardCorrectedLoss, anchor_transition, gold_transition
from lossmeta.losses.parametric_cross_entropy import ParametricCrossEntropy
from lossmeta.losses.regression import PinballLoss, TukeyLoss
from lossmeta.losses.robust import BootstrappingLoss, GeneralizedCrossEntropy, SymmetricCrossEntropy
from lossmeta.losses.taylor import TaylorLoss
from lossmeta.losses.transition import TransitionLoss

__all__ = [
    "BootstrappingLoss",
    "DistanceMixtureLoss",
    "FocalLoss",
    "FocalWeightedLoss",
    "ForwardCorrectedLoss",
    "GeneralizedCrossEntropy",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "LossNetwork",
    "LossWeighting",
    "ParametricCrossEntropy",
    "PinballLoss",
    "SymmetricCrossEntropy",
    "TaylorLoss",
    "TransitionLoss",
    "TukeyLoss",
    "anchor_transition",
    "check_not_minimized",
    "gold_transition",
]
