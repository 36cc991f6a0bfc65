"""The best of all convex regularisers of single weights: an isotonic regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossmeta._checks import check_at_least_one
from lossmeta.tuneloss._regularizer import check_model
from lossmeta.tuneloss.piecewise_linear import PiecewiseLinear

BINS = 1 << 16
ZERO = BINS // 2  # the bin of 0
_LARGEST = float(np.finfo(np.float32).max)
Array = NDArray[np.float64]
Integers = NDArray[np.int64]


class _Counts(NamedTuple):
    """Weights of one group of one model, in the bins that hold some."""

    bins: Integers
    counts: Integers
    sums: Array  # of validation gradient less training gradient


class ConvexRegularizer:
    r"""Learns a regulariser :math:`\sum_j r(\theta_j)` among all convex r, from the gradients of the last models.

    .. math:: \min_{r' \text{ non-decreasing}} \sum_{i} \sum_j
              \bigl(\nabla_j \ell(\theta_i) + r'(\theta_{ij}) - \nabla_j \tilde e(\theta_i)\bigr)^2

    This is the gradient matching of Eq. 6 with the multiplier of the validation error fixed at 1, for the task's loss
    :math:`\ell` has coefficient 1 on both sides. Its solution is the isotonic regression of
    :math:`\nabla_j \tilde e - \nabla_j \ell` on :math:`\theta_j`, over all weights of the models, as
    :class:`ConvexPWL` would have it with a knot between any two weights.

    Weights are counted in bins that the leading 16 bits of a float32 are: equal sign and exponent, and 7 bits of the
    significand, so that two weights of a bin differ by less than 0.8 %. Within a bin r has one slope: with 6,400
    weights slopes moved by 2 % from those without bins, and 0.4 % of what r explains was lost. The bins are the same
    for all weights ever, so that models add up whatever their scale.

    Args:
        window: models that are looked at, the last ones. A model is kept as its bins, 1.5 MB at most.
        least_at_zero: take the best of those r that are least at 0, and so push no weight away from it: deep networks
            were less steady without. The slope is then 0 from 0 half-way to the nearest weight of either sign.

    Raises:
        ValueError: for a window below 1.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), Eq. 4 and 6, has convex piecewise-linear r
        with given knots, and a multiplier that is found with it.

    Example:
        >>> regularizer = lossmeta.tuneloss.ConvexRegularizer()
        >>> weights = torch.tensor([-1.0, -0.5, 0.5, 1.0])
        >>> regularizer.observe([weights], [torch.zeros(4)], [torch.tensor([-0.2, -0.1, -0.3, 0.4])])
        >>> (r,) = regularizer.fit()
        >>> r.slope(weights)
        tensor([-0.2000, -0.1000,  0.0000,  0.4000], dtype=torch.float64)
    """

    def __init__(self, window: int = 5, *, least_at_zero: bool = True) -> None:
        check_at_least_one("ConvexRegularizer", "window", window)
        self.window, self.least_at_zero = window, least_at_zero
        self._models: list[list[_Counts]] = []

    def observe(
        self,
        weights: Sequence[Tensor],
        train_gradients: Sequence[Tensor],
        valid_gradients: Sequence[Tensor],
        train_loss: float = 0.0,
        valid_loss: float = 0.0,
    ) -> None:
        """Takes a model into the window.

        Args:
            weights: a vector [P] for each group, which has a regulariser of its own; usually one.
            train_gradients: of the task's loss on the training data, of the same shapes.
            valid_gradients: of the validation error, of the same shapes.
            train_loss: is not looked at.
            valid_loss: is not looked at.

        Raises:
            TypeError: for something else than sequences of tensors.
            ValueError: for other groups than before, shapes that differ, no weights, and numbers that are not finite.
        """
        check_model("ConvexRegularizer", weights, train_gradients, valid_gradients)
        if self._models and len(self._models[0]) != len(weights):
            raise ValueError(
                f"ConvexRegularizer: weights must be of {len(self._models[0])} groups as before, got {len(weights)}"
            )
        triples = zip(weights, train_gradients, valid_gradients, strict=True)
        self._models.append([_counted(*triple) for triple in triples])
        del self._models[: -self.window]

    def fit(self) -> list[PiecewiseLinear]:
        """The regularisers of the models in the window, one for each group.

        Raises:
            ValueError: before any model.
        """
        if not self._models:
            raise ValueError("ConvexRegularizer: a model must be observed before the fit, got none")
        return [_fitted(group, self.least_at_zero) for group in zip(*self._models, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The models of the window."""
        models = [[tuple(torch.from_numpy(a.copy()) for a in group) for group in m] for m in self._models]
        return {"window": self.window, "least_at_zero": self.least_at_zero, "models": models}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there.

        Raises:
            ValueError: for the state of other options. Nothing has changed then.
        """
        for name in ("window", "least_at_zero"):
            if state.get(name) != getattr(self, name):
                raise ValueError(
                    f"ConvexRegularizer: the state must be of {name} {getattr(self, name)}, got {state.get(name)}"
                )
        self._models = [
            [
                _Counts(bins.numpy().copy(), counts.numpy().copy(), sums.numpy().copy())
                for bins, counts, sums in m
            ]
            for m in state["models"]
        ]


def _counted(weights: Tensor, train_gradient: Tensor, valid_gradient: Tensor) -> _Counts:
    """A group of weights in bins, with the difference of the gradients."""
    at = _bins(weights)
    target = valid_gradient.detach().cpu().double() - train_gradient.detach().cpu().double()
    counts = np.bincount(at, minlength=BINS)
    sums: Array = np.bincount(at, weights=target.numpy(), minlength=BINS).astype(np.float64)
    used = np.flatnonzero(counts)
    return _Counts(used, counts[used], sums[used])


def _fitted(models: Sequence[_Counts], least_at_zero: bool) -> PiecewiseLinear:
    """The isotonic regression of one group in several models."""
    counts, sums = np.zeros(BINS), np.zeros(BINS)
    for model in models:
        counts[model.bins] += model.counts
        sums[model.bins] += model.sums
    used = np.flatnonzero(counts)
    means, weights = sums[used] / counts[used], counts[used]
    if least_at_zero:
        # Bounds of an isotonic regression are met by clipping it. Weights that are 0 have no say: all slopes between
        # those of both sides suit them.
        below, above = used < ZERO, used > ZERO
        falling, rising = (_isotonic(means[side], weights[side]) for side in (below, above))
        fitted = np.concatenate([np.minimum(falling, 0), [0.0], np.maximum(rising, 0)])
        used = np.concatenate([used[below], [ZERO], used[above]])
    else:
        fitted = _isotonic(means, weights)
    last = np.flatnonzero(np.diff(fitted) > 0)  # of each run of equal slopes but the final one
    upper, lower = _edges(used[last] + 1), _edges(used[last + 1])
    knots = np.where(upper < lower, (upper + lower) / 2, _before(lower))
    slopes = fitted[np.append(last, len(fitted) - 1)]
    return PiecewiseLinear(torch.from_numpy(knots), torch.from_numpy(slopes))


def _isotonic(values: Array, weights: Array) -> Array:
    from sklearn.isotonic import isotonic_regression

    found: Array = isotonic_regression(values, sample_weight=weights) if len(values) else values
    return found


# ---- Bins: the numbers of the leading 16 bits, in the order of the weights. A common edge of two bins, such as 0.5, is
# in the one of greater magnitude; 0 is in the upper one.

_LEADING = np.arange(BINS, dtype=np.int64)
_ORDER: Integers = ZERO + np.where(_LEADING < ZERO, _LEADING, ZERO - 1 - _LEADING)


def _bins(weights: Tensor) -> Integers:
    """The bin of each weight."""
    given = weights.detach().cpu()
    if given.dtype == torch.float64:
        given = given.clamp(-_LARGEST, _LARGEST)
    single = given.float() + 0.0  # turns -0 into 0
    found: Integers = _ORDER[single.numpy().view(np.uint32) >> 16]
    return found


def _edges(bins: Integers) -> Array:
    """The lower edge of each bin."""
    signed = bins - ZERO
    magnitude = np.where(signed >= 0, signed, -signed).astype(np.int32) << 16
    values = magnitude.view(np.float32).astype(np.float64)
    return np.where(signed >= 0, values, -values)


def _before(edges: Array) -> Array:
    """The next float32 outside of the bin that an edge is in."""
    single = edges.astype(np.float32)
    target = np.where(single == 0, np.float32(-np.inf), np.float32(0))
    return np.nextafter(single, target).astype(np.float64)
