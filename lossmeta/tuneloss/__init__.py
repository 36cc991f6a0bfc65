"""TuneLoss: the parameters of a loss by convex programming (Streeter, 2019)."""

from lossmeta.tuneloss.measurement import Measurement, Trial

__all__ = ["Measurement", "Trial"]
