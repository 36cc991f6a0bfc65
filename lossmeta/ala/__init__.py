"""ALA: losses adapted to any metric while the model trains."""

from lossmeta.ala.controller import Controller
from lossmeta.ala.policy import Policy
from lossmeta.ala.population import Population
from lossmeta.ala.records import ControllerReport, PopulationReport
from lossmeta.ala.schedule import Schedule
from lossmeta.ala.space import LossSpace, Parameter
from lossmeta.ala.space_loss import SpaceLoss
from lossmeta.ala.spaces import (
    ClassCorrelation,
    ContrastiveShape,
    DistanceMixture,
    FocalWeighting,
    LearningRate,
    LogitAdjustment,
    ModuleSpace,
    Robust,
    Smoothing,
)

__all__ = [
    "ClassCorrelation",
    "ContrastiveShape",
    "Controller",
    "ControllerReport",
    "DistanceMixture",
    "FocalWeighting",
    "LearningRate",
    "LogitAdjustment",
    "LossSpace",
    "ModuleSpace",
    "Parameter",
    "Policy",
    "Population",
    "PopulationReport",
    "Robust",
    "Schedule",
    "Smoothing",
    "SpaceLoss",
]
