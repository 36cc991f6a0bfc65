"""TuneLoss: the parameters of a loss by convex programming (Streeter, 2019)."""

from lossmeta.tuneloss.convex_pwl import ConvexPWL
from lossmeta.tuneloss.convex_pwl_regularizer import ConvexPWLRegularizer
from lossmeta.tuneloss.convex_regularizer import ConvexRegularizer
from lossmeta.tuneloss.measurement import Measurement, Trial
from lossmeta.tuneloss.online import OnlineReport, OnlineTuner
from lossmeta.tuneloss.piecewise_linear import PiecewiseLinear

__all__ = [
    "ConvexPWL",
    "ConvexPWLRegularizer",
    "ConvexRegularizer",
    "Measurement",
    "OnlineReport",
    "OnlineTuner",
    "PiecewiseLinear",
    "Trial",
]
