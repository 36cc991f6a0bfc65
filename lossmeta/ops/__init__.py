"""The compiled operators. Each is a function here and ``torch.ops.lossmeta.<name>`` beneath."""

from lossmeta._checks import debug
from lossmeta.ops._operator import FallbackWarning
from lossmeta.ops.adjusted_cross_entropy import adjusted_cross_entropy
from lossmeta.ops.class_confusion import class_confusion
from lossmeta.ops.distance_mixture import distance_mixture
from lossmeta.ops.focal_weighting import focal_weighting
from lossmeta.ops.gaussian_curvature import gaussian_curvature
from lossmeta.ops.loss_network import loss_network
from lossmeta.ops.parametric_cross_entropy import LowRankPhi, parametric_cross_entropy
from lossmeta.ops.perturb import perturb
from lossmeta.ops.pwl_penalty import pwl_penalty
from lossmeta.ops.pwl_statistics import pwl_statistics

__all__ = [
    "FallbackWarning",
    "LowRankPhi",
    "adjusted_cross_entropy",
    "class_confusion",
    "debug",
    "distance_mixture",
    "focal_weighting",
    "gaussian_curvature",
    "loss_network",
    "parametric_cross_entropy",
    "perturb",
    "pwl_penalty",
    "pwl_statistics",
]
