"""Losses that adapt while a PyTorch model trains."""

from lossmeta import losses, metrics, ops
from lossmeta._info import info

__all__ = ["info", "losses", "metrics", "ops"]
__version__ = "0.1.0"
