"""Losses that adapt while a PyTorch model trains."""

from lossmeta import ops

__all__ = ["ops"]
__version__ = "0.1.0"
