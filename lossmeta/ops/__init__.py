"""The compiled operators. Each is a function here and ``torch.ops.lossmeta.<name>`` beneath."""

from lossmeta.ops._operator import FallbackWarning, debug
from lossmeta.ops.parametric_cross_entropy import parametric_cross_entropy

__all__ = ["FallbackWarning", "debug", "parametric_cross_entropy"]
