"""TuneLoss: the parameters of a loss by convex programming (Streeter, 2019)."""

from lossmeta.tuneloss.convex_pwl import ConvexPWL
from lossmeta.tuneloss.convex_pwl_regularizer import ConvexPWLRegularizer
from lossmeta.tuneloss.convex_regularizer import ConvexRegularizer
from lossmeta.tuneloss.features import L1, PredictionFeature, SquaredL2, UniformLabelLoss
from lossmeta.tuneloss.finite import FiniteArgmin, finite_argmin
from lossmeta.tuneloss.learn_loss import LearnedLoss, learn_loss
from lossmeta.tuneloss.loss import TunedLoss
from lossmeta.tuneloss.measure import measure
from lossmeta.tuneloss.measurement import Measurement, Trial
from lossmeta.tuneloss.mixture import AugmentationMixture, DropoutLoss
from lossmeta.tuneloss.online import OnlineReport, OnlineTuner
from lossmeta.tuneloss.piecewise_linear import PiecewiseLinear
from lossmeta.tuneloss.search import TPE, GaussianProcess, RandomSearch, TuneReg
from lossmeta.tuneloss.solvers import NotCertified
from lossmeta.tuneloss.tuner import TuneLoss

__all__ = [
    "L1",
    "TPE",
    "AugmentationMixture",
    "ConvexPWL",
    "ConvexPWLRegularizer",
    "ConvexRegularizer",
    "DropoutLoss",
    "FiniteArgmin",
    "GaussianProcess",
    "LearnedLoss",
    "Measurement",
    "NotCertified",
    "OnlineReport",
    "OnlineTuner",
    "PiecewiseLinear",
    "PredictionFeature",
    "RandomSearch",
    "SquaredL2",
    "Trial",
    "TuneLoss",
    "TuneReg",
    "TunedLoss",
    "UniformLabelLoss",
    "finite_argmin",
    "learn_loss",
    "measure",
]
