"""The wrappers of pytorch-metric-learning for our losses.

The losses are called as those of the library, references included: its trainers, testers, miners and ``MultipleLosses``
take them as they are. Two wrappers, however, look for the name of a loss in a list.
"""

from __future__ import annotations

from lossmeta.losses import DistanceMixtureLoss, FocalWeightedLoss

try:
    from pytorch_metric_learning import losses
except ImportError as error:
    raise ImportError(
        "lossmeta.integrations.pytorch_metric_learning: pytorch-metric-learning must be installed, "
        f'got {str(error)!r}; pip install "lossmeta[integrations]"'
    ) from error

OURS = (DistanceMixtureLoss.__name__, FocalWeightedLoss.__name__)


class CrossBatchMemory(losses.CrossBatchMemory):  # type: ignore[misc]
    """The library's own, which compares a batch with those before it, for our losses too.

    Example:
        >>> criterion = CrossBatchMemory(lossmeta.losses.DistanceMixtureLoss(), embedding_size=4, memory_size=64)
        >>> loss = criterion(torch.nn.functional.normalize(torch.randn(8, 4)), torch.arange(8) // 2)
    """

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.CrossBatchMemory.supported_losses(), *OURS]


class SelfSupervisedLoss(losses.SelfSupervisedLoss):  # type: ignore[misc]
    """The library's own, which takes two views of each sample for one class, for our losses too.

    Example:
        >>> criterion = SelfSupervisedLoss(lossmeta.losses.FocalWeightedLoss())
        >>> views = torch.nn.functional.normalize(torch.randn(2, 8, 4), dim=-1)
        >>> loss = criterion(views[0], views[1])
    """

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.SelfSupervisedLoss.supported_losses(), *OURS]
