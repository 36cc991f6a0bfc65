"""ALA: losses adapted to any metric while the model trains."""

from lossmeta.ala.population import Population
from lossmeta.ala.records import PopulationReport
from lossmeta.ala.space import LossSpace, Parameter
from lossmeta.ala.spaces import (
    ClassCorrelation,
    ContrastiveShape,
    LearningRate,
    LogitAdjustment,
    ModuleSpace,
    Robust,
    Smoothing,
)

__all__ = [
    "ClassCorrelation",
    "ContrastiveShape",
    "LearningRate",
    "LogitAdjustment",
    "LossSpace",
    "ModuleSpace",
    "Parameter",
    "Population",
    "PopulationReport",
    "Robust",
    "Smoothing",
]
