"""What a loss can have beside the task's: norms of the weights, and losses on other labels.

A feature is any callable ``feature(model, batch) -> Tensor``, with ``batch = (inputs, targets)``. It gives a number, or
[size] for a parameter that is a vector. Autograd supplies its gradient. Those here say more, which saves passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._batches import Batch, call_model, checked, prediction_of
from lossmeta._checks import check_positive_and_finite, choice
from lossmeta.tuneloss._weights import check_names, selected

Feature = Callable[[nn.Module, Batch], Tensor]


def uses_data(feature: Feature) -> bool:
    """Whether a feature depends on the batch; one whose attribute ``uses_data`` is false is of the weights alone."""
    return bool(getattr(feature, "uses_data", True))


# ---- Of the weights.


def _names(name: str, parameters: Sequence[str] | None) -> list[str] | None:
    if parameters is None:
        return None
    names = check_names(name, parameters)
    if not names:
        raise ValueError(f"{name}: parameters must have at least one name, got none")
    return names


class L1:
    r"""The sum of absolute weights, :math:`s \sum_i |w_i|`.

    Args:
        scale: s. The paper's penalty on n samples has 1/n.
        smoothing: :math:`\mu` of the smooth form :math:`\sqrt{w^2 + \mu^2} - \mu`. Zero is the plain one, whose
            second derivative is zero: the corner at w = 0 is then unknown to :func:`measure`.
        parameters: names of the model's parameters. ``None`` takes the trainable ones of two or more dimensions, so
            that biases and the scales of normalisation layers are left out.

    Raises:
        TypeError: for parameters that are no names.
        ValueError: for a scale that is not positive and finite, a negative smoothing, and names that the model lacks.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), section 4.2.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> feature = lossmeta.tuneloss.L1(scale=0.5)
        >>> bool(feature(model) == 0.5 * model.weight.abs().sum())
        True
    """

    uses_data = False

    def __init__(
        self, scale: float = 1.0, *, smoothing: float = 0.0, parameters: Sequence[str] | None = None
    ) -> None:
        check_positive_and_finite("L1", "scale", scale)
        if not 0 <= smoothing < float("inf"):
            raise ValueError(f"L1: smoothing must be at least 0 and finite, got {smoothing}")
        self.scale, self.smoothing = scale, smoothing
        self.parameters = _names("L1", parameters)

    def __call__(self, model: nn.Module, batch: Batch | None = None) -> Tensor:
        """A number, whatever the batch."""
        return self.scale * sum_of(self._sum(w) for w in selected("L1", model, self.parameters).values())

    def _sum(self, weight: Tensor) -> Tensor:
        if self.smoothing == 0:
            return weight.abs().sum()
        return ((weight * weight + self.smoothing**2).sqrt() - self.smoothing).sum()


class SquaredL2:
    r"""The sum of squared weights, :math:`s \sum_i w_i^2`: of all of them, or a vector of several sums.

    Args:
        scale: s. The paper's penalty on n samples has 1/n.
        by: ``"all"`` is a number; ``"tensor"`` is [t], an entry per parameter in their order; ``"input"`` is [d], an
            entry per input of one weight, whose second dimension inputs are.
        parameters: names of the model's parameters; see :class:`L1`. ``by="input"`` needs exactly one.

    Raises:
        TypeError: for parameters that are no names.
        ValueError: for a scale that is not positive and finite, names that the model lacks, and with ``by="input"``
            several weights or one of a single dimension.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), section 4.2.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> lossmeta.tuneloss.SquaredL2(by="tensor")(model).shape
        torch.Size([2])
        >>> lossmeta.tuneloss.SquaredL2(by="input", parameters=["0.weight"])(model).shape
        torch.Size([5])
    """

    uses_data = False

    def __init__(
        self, scale: float = 1.0, *, by: str = "all", parameters: Sequence[str] | None = None
    ) -> None:
        check_positive_and_finite("SquaredL2", "scale", scale)
        self.scale, self.by = scale, by
        self._of = choice("SquaredL2", "by", by, {"all": _all, "tensor": _by_tensor, "input": _by_input})
        self.parameters = _names("SquaredL2", parameters)

    def __call__(self, model: nn.Module, batch: Batch | None = None) -> Tensor:
        """A number or a vector, whatever the batch."""
        return self.scale * self._of(selected("SquaredL2", model, self.parameters))


def _all(weights: Mapping[str, Tensor]) -> Tensor:
    return sum_of(w.square().sum() for w in weights.values())


def _by_tensor(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([w.square().sum() for w in weights.values()])


def _by_input(weights: Mapping[str, Tensor]) -> Tensor:
    if len(weights) != 1:
        raise ValueError(
            f"SquaredL2: by='input' must have one weight, got {', '.join(weights)}; name one by parameters="
        )
    (weight,) = weights.values()
    if weight.dim() < 2:
        raise ValueError(
            f"SquaredL2: by='input' must have a weight of two or more dimensions, got {list(weight.shape)}"
        )
    return weight.square().transpose(0, 1).flatten(1).sum(1)


def sum_of(terms: Any) -> Tensor:
    """Of at least one tensor."""
    first, *others = terms
    for term in others:
        first = first + term
    return first


# ---- Of predictions.


class PredictionFeature(ABC):
    """A feature that depends on the weights through predictions alone.

    :class:`TunedLoss` shares the predictions among such features, and :func:`measure` takes Gauss-Newton products.
    """

    def variants(self, inputs: Any) -> list[Any]:
        """The inputs of the predictions; ``inputs`` itself stands for those that the task's loss has, too."""
        return [inputs]

    @abstractmethod
    def of_predictions(self, predictions: Sequence[Tensor], target: Tensor) -> Tensor:
        """The feature of the predictions for :meth:`variants`."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        name = type(self).__name__
        inputs, target = checked(name, "batch", batch)
        found = [prediction_of(name, call_model(model, x)) for x in self.variants(inputs)]
        return self.of_predictions(found, target)


class UniformLabelLoss(PredictionFeature):
    r"""Cross-entropy with uniform labels, :math:`-\frac{1}{N C} \sum_{n, c} \log p_c(x_n)`.

    It is the expected loss on the training data with labels drawn at random, as label smoothing adds it. Predictions
    are logits [N, C, d...].

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), section 4.2.

    Example:
        >>> model = torch.nn.Linear(3, 4)
        >>> batch = torch.randn(5, 3), torch.randint(4, (5,))
        >>> bool(lossmeta.tuneloss.UniformLabelLoss()(model, batch) >= torch.tensor(4.0).log() - 1e-6)
        True
    """

    def of_predictions(self, predictions: Sequence[Tensor], target: Tensor) -> Tensor:
        (logits,) = predictions
        if logits.dim() < 2:
            raise ValueError(
                f"UniformLabelLoss: predictions must be logits [N, C, ...], got {list(logits.shape)}"
            )
        return -logits.log_softmax(1).mean()
