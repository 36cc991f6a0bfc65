"""TuneLoss: the parameters of a loss by convex programming (Streeter, 2019)."""

from lossmeta.tuneloss.finite import FiniteArgmin, finite_argmin
from lossmeta.tuneloss.learn_loss import LearnedLoss, learn_loss
from lossmeta.tuneloss.measurement import Measurement, Trial
from lossmeta.tuneloss.solvers import NotCertified

__all__ = [
    "FiniteArgmin",
    "LearnedLoss",
    "Measurement",
    "NotCertified",
    "Trial",
    "finite_argmin",
    "learn_loss",
]
