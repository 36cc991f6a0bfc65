"""Losses that adapt while a PyTorch model trains."""

import lossmeta._source_folder  # noqa: F401 - first: from the bare source folder it leads to the installed one
from lossmeta import adalfl, losses, metrics, ops
from lossmeta._info import info

__all__ = ["adalfl", "info", "losses", "metrics", "ops"]
__version__ = "0.1.0"
