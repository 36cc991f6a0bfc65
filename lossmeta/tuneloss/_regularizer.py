"""What learns regularisers from models that have been trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from lossmeta.tuneloss._weights import finite
from lossmeta.tuneloss.piecewise_linear import PiecewiseLinear


class Regularizer(Protocol):
    """What learns regularisers from models: :class:`ConvexRegularizer`, or :class:`ConvexPWLRegularizer`."""

    def observe(
        self,
        weights: Sequence[Tensor],
        train_gradients: Sequence[Tensor],
        valid_gradients: Sequence[Tensor],
        train_loss: float,
        valid_loss: float,
    ) -> None: ...

    def fit(self) -> list[PiecewiseLinear]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class NotFitted(RuntimeError):
    """No regulariser could be found for the models in the window."""


def check_model(where: str, weights: Sequence[Tensor], *gradients: Sequence[Tensor]) -> None:
    """Refuses what is not groups of weights with their gradients."""
    for given in (weights, *gradients):
        if isinstance(given, Tensor) or not all(isinstance(t, Tensor) for t in given):
            raise TypeError(f"{where}: weights and gradients must be lists of tensors, one for each group")
        if not len(given) or len(given) != len(weights):
            raise ValueError(
                f"{where}: weights and gradients must be of the same groups, one at least, got {len(weights)} and "
                f"{len(given)}"
            )
        for w, t in zip(weights, given, strict=True):
            if w.dim() != 1 or t.shape != w.shape or not len(w):
                raise ValueError(
                    f"{where}: weights and gradients of a group must be [P] with one P >= 1, got {list(w.shape)} and "
                    f"{list(t.shape)}"
                )
            if not finite(t):
                raise ValueError(f"{where}: weights and gradients must be finite, got NaN or infinity")
