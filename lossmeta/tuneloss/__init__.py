"""TuneLoss: the parameters of a loss by convex programming (Streeter, 2019)."""

from lossmeta.tuneloss.features import L1, PredictionFeature, SquaredL2, UniformLabelLoss
from lossmeta.tuneloss.loss import TunedLoss
from lossmeta.tuneloss.measure import measure
from lossmeta.tuneloss.measurement import Measurement, Trial
from lossmeta.tuneloss.mixture import AugmentationMixture, DropoutLoss
from lossmeta.tuneloss.search import TPE, GaussianProcess, RandomSearch, TuneReg
from lossmeta.tuneloss.tuner import TuneLoss

__all__ = [
    "L1",
    "TPE",
    "AugmentationMixture",
    "DropoutLoss",
    "GaussianProcess",
    "Measurement",
    "PredictionFeature",
    "RandomSearch",
    "SquaredL2",
    "Trial",
    "TuneLoss",
    "TuneReg",
    "TunedLoss",
    "UniformLabelLoss",
    "measure",
]
