"""Losses that adapt while a PyTorch model trains."""

import lossmeta._source_folder  # first: from the bare source folder it leads to the installed package
from lossmeta import ops

__all__ = ["ops"]
__version__ = "0.1.0"
