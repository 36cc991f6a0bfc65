"""The task's loss on inputs that have been changed: dropout, and mixtures of augmentations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta._batches import Loss
from lossmeta._checks import check_at_least_one
from lossmeta.tuneloss.features import PredictionFeature, sum_of

Transform = Callable[[Tensor], Tensor]


class TransformedLoss(PredictionFeature):
    """The task's loss on changed inputs; an entry for every way to change them.

    Attributes:
        task_loss: ``task_loss(prediction, target)``, a mean over samples.
    """

    task_loss: Loss

    @abstractmethod
    def draw(self, inputs: Tensor, entry: int, generator: torch.Generator | None) -> Tensor:
        """Some samples changed in the way of an entry, with random numbers of their own."""


class DropoutLoss(TransformedLoss):
    """The task's loss with dropout on the inputs; kept entries are scaled by 1 / keep.

    Args:
        keep: probability with which an entry of the inputs is kept.
        task_loss: ``task_loss(prediction, target)``, a mean over samples; the same as that of :class:`TunedLoss`.
        masks: over how many masks the loss is averaged.
        seed: of fixed masks, which make the objective an exact one: they depend on a sample's place in its batch and on
            the batch's shape. ``None`` draws them anew in every call, by torch's own random numbers.

    Raises:
        ValueError: for keep outside of (0, 1), and fewer masks than one.
        TypeError: when called with inputs that are no floating tensor.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), section 4.2; keep is 0.5 there.

    Example:
        >>> model = torch.nn.Linear(3, 4)
        >>> batch = torch.randn(5, 3), torch.randint(4, (5,))
        >>> feature = lossmeta.tuneloss.DropoutLoss()
        >>> bool(feature(model, batch) == feature(model, batch))
        True
    """

    def __init__(
        self, keep: float = 0.5, *, task_loss: Loss = F.cross_entropy, masks: int = 1, seed: int | None = 0
    ) -> None:
        if not 0 < keep < 1:
            raise ValueError(f"DropoutLoss: keep must lie in (0, 1), got {keep}")
        check_at_least_one("DropoutLoss", "masks", masks)
        self.keep, self.task_loss, self.masks, self.seed = keep, task_loss, masks, seed

    def variants(self, inputs: Any) -> list[Any]:
        generator = None if self.seed is None else torch.Generator(device="cpu").manual_seed(self.seed)
        return [self.draw(inputs, 0, generator) for _ in range(self.masks)]

    def of_predictions(self, predictions: Sequence[Tensor], target: Tensor) -> Tensor:
        return sum_of(self.task_loss(p, target) for p in predictions) / len(predictions)

    def draw(self, inputs: Tensor, entry: int, generator: torch.Generator | None) -> Tensor:
        _check_inputs("DropoutLoss", inputs)
        if not inputs.is_floating_point():
            raise TypeError(f"DropoutLoss: inputs must be floating, got {inputs.dtype}")
        device = inputs.device if generator is None else generator.device
        kept = torch.rand(inputs.shape, generator=generator, device=device, dtype=torch.float32) < self.keep
        return inputs * kept.to(inputs.device) / self.keep


class AugmentationMixture(TransformedLoss):
    r"""The task's losses on transformed inputs, [k]: the features of a mixture of augmentations, Eq. 3.

    With the task's own loss, whose coefficient is 1, the loss is
    :math:`(1 + \|\lambda\|_1) \sum_{j=0}^{k} p_j \ell_j(\theta)`: samples stay as they are with probability
    :math:`p_0 = 1 / (1 + \|\lambda\|_1)`, else the j-th transformation is applied, with probability
    :math:`p_j = \lambda_j / (1 + \|\lambda\|_1)`.

    Args:
        transforms: k callables from inputs to inputs of the same samples. Random ones draw from torch's, Python's or
            NumPy's own random numbers, which :func:`measure` replays.
        task_loss: ``task_loss(prediction, target)``, a mean over samples; the same as that of :class:`TunedLoss`.

    Raises:
        TypeError: for transforms that cannot be called.
        ValueError: for none.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), Eq. 3.

    Example:
        >>> mixture = lossmeta.tuneloss.AugmentationMixture([lambda x: x.flip(-1), lambda x: 0.5 * x])
        >>> mixture(torch.nn.Linear(3, 4), (torch.randn(5, 3), torch.randint(4, (5,)))).shape
        torch.Size([2])
        >>> mixture.probabilities([1.0, 2.0])
        [0.25, 0.25, 0.5]
    """

    def __init__(self, transforms: Sequence[Transform], *, task_loss: Loss = F.cross_entropy) -> None:
        self.transforms, self.task_loss = list(transforms), task_loss
        if not self.transforms:
            raise ValueError("AugmentationMixture: transforms must have at least one, got none")
        for transform in self.transforms:
            if not callable(transform):
                raise TypeError(f"AugmentationMixture: transforms must be callable, got {transform!r}")

    def variants(self, inputs: Any) -> list[Any]:
        _check_inputs("AugmentationMixture", inputs)
        return [transform(inputs) for transform in self.transforms]

    def of_predictions(self, predictions: Sequence[Tensor], target: Tensor) -> Tensor:
        return torch.stack([self.task_loss(p, target) for p in predictions])

    def draw(self, inputs: Tensor, entry: int, generator: torch.Generator | None) -> Tensor:
        _check_inputs("AugmentationMixture", inputs)
        return self.transforms[entry](inputs)

    def probabilities(self, coefficients: Sequence[float]) -> list[float]:
        """[1 + k]: how probable it is that a sample stays as it is, and of each transformation.

        Raises:
            ValueError: for another number of coefficients, and negative ones.
        """
        given = [float(c) for c in coefficients]
        if len(given) != len(self.transforms) or not all(0 <= c < float("inf") for c in given):
            raise ValueError(
                f"AugmentationMixture: coefficients must be {len(self.transforms)} finite numbers of at least 0, got "
                f"{given}"
            )
        total = 1 + sum(given)
        return [c / total for c in (1.0, *given)]


def _check_inputs(name: str, inputs: Any) -> None:
    if not isinstance(inputs, Tensor):
        raise TypeError(f"{name}: inputs must be one tensor, got {type(inputs).__name__}")
