"""Arguments of LearnLoss: checked errors, features, gradients and bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._least_squares import factor_of_gram, triangle


def numbers(name: str, argument: str, value: Any, shape: tuple[int | None, ...]) -> Array:
    """As float64, finite, of that shape, where ``None`` is any size."""
    found = _float64(name, argument, value, shape)
    bad = ~np.isfinite(found)
    if bad.any():
        at = [int(i) for i in np.argwhere(bad)[0]]
        raise ValueError(f"{name}: {argument} must be finite, got {found[tuple(at)]} at index {at}")
    return found


def _float64(name: str, argument: str, value: Any, shape: tuple[int | None, ...]) -> Array:
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: {argument} must be an array of numbers, got {type(value).__name__}: {error}"
        ) from error
    fits = found.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, found.shape, strict=True)
    )
    if not fits or found.size == 0:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: {argument} must have shape [{wanted}], got {list(found.shape)}")
    return found


def models(name: str, errors: Any, features: Any) -> tuple[Array, Array]:
    """Errors [m] and features [m, k]."""
    found = numbers(name, "errors", errors, (None,))
    return found, numbers(name, "features", features, (len(found), None))


def box(name: str, lower: Any, upper: Any, size: int) -> tuple[Array, Array]:
    """Bounds [k]; infinite ones are none."""
    low, high = (_float64(name, argument, v, (size,)) for argument, v in (("lower", lower), ("upper", upper)))
    bad = ~((low <= high) & (low < np.inf) & (high > -np.inf))
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(
            f"{name}: lower must not be above upper and both must leave finite values, got {low[at]:g} and "
            f"{high[at]:g} at index {at}"
        )
    return low, high


def zero_features(name: str) -> ValueError:
    """What to raise where only features that are 0 for all models keep λ = 0 out of the box."""
    return ValueError(
        f"{name}: lower and upper must exclude λ = 0 in a feature that is not 0 for all models, got bounds that do so "
        "in no other; fix a feature that is not"
    )


def refuse_zero(name: str, lower: Array, upper: Array) -> None:
    if ((lower <= 0) & (upper >= 0)).all():
        raise ValueError(
            f"{name}: lower and upper must exclude λ = 0, the loss that is 0 for every model, got a box with 0 in it; "
            "fix a component, such as the task's own loss at lower == upper == 1"
        )


def gradient_factor(
    name: str, m: int, k: int, gradients: Any, jacobians: Any, grams: Any, eps: float | str
) -> Array | None:
    """Factor [rows, k + 1] of the second sum of Eq. 6, ε included; ``None`` without gradients."""
    if (gradients is None) != (jacobians is None):
        missing = "gradients" if gradients is None else "jacobians"
        raise ValueError(f"{name}: gradients and jacobians must be given together, got no {missing}")
    if grams is not None and gradients is not None:
        raise ValueError(f"{name}: gradients must be given raw or as grams, got both")
    weight = _number(name, eps)
    if grams is not None:
        return _of_grams(name, m, k, grams, weight)
    if gradients is not None:
        return _of_gradients(name, m, k, gradients, jacobians, weight)
    if m == 1:
        raise ValueError(
            f"{name}: errors must be of 2 models or more where there are no gradients, got 1; any λ fits one"
        )
    if weight:
        raise ValueError(f"{name}: eps must be 0 or 'balanced' where there are no gradients, got {eps}")
    return None


def _of_grams(name: str, m: int, k: int, grams: Any, eps: float | None) -> Array:
    total = numbers(name, "grams", grams, (m, k + 1, k + 1)).sum(axis=0)
    largest = np.sqrt(np.outer(total.diagonal(), total.diagonal()).clip(0))
    if (np.abs(total - total.T) > 1e-6 * largest).any():
        raise ValueError(
            f"{name}: grams must be symmetric, got a difference of {np.abs(total - total.T).max():.2g}"
        )
    factor = factor_of_gram((total + total.T) / 2)
    if factor is None:
        raise ValueError(
            f"{name}: grams must be positive semi-definite, as [J, g]' [J, g] is; got a sum that is not"
        )
    diagonal = total.diagonal()
    factor[:, k] *= -1
    return np.sqrt(_weight(name, eps, float(diagonal[k]), float(diagonal[:k].sum()))) * factor


def _of_gradients(name: str, m: int, k: int, gradients: Any, jacobians: Any, eps: float | None) -> Array:
    for argument, value in (("gradients", gradients), ("jacobians", jacobians)):
        if not isinstance(value, (Sequence, np.ndarray)) and not hasattr(value, "__len__"):
            raise TypeError(f"{name}: {argument} must hold one for each model, got {type(value).__name__}")
        if len(value) != m:
            raise ValueError(f"{name}: {argument} must hold one for each of {m} models, got {len(value)}")
    squares = np.zeros(k + 1)
    factor = np.zeros((0, k + 1))
    for i in range(m):
        g = numbers(name, f"gradients[{i}]", gradients[i], (None,))
        jacobian = numbers(name, f"jacobians[{i}]", jacobians[i], (len(g), k))
        block = np.column_stack([jacobian, -g])
        squares += np.einsum("ij,ij->j", block, block)
        factor = triangle([factor, block])
    return np.sqrt(_weight(name, eps, float(squares[k]), float(squares[:k].sum()))) * factor


def _number(name: str, eps: float | str) -> float | None:
    """ε; ``None`` for "balanced"."""
    if isinstance(eps, str):
        if eps != "balanced":
            raise ValueError(f"{name}: eps must be 'balanced' or a number, got {eps!r}")
        return None
    if not isinstance(eps, (int, float, np.number)):
        raise TypeError(f"{name}: eps must be 'balanced' or a number, got {type(eps).__name__}")
    if not 0 <= eps < np.inf:
        raise ValueError(f"{name}: eps must be at least 0 and finite, got {eps}")
    return float(eps)


def _weight(name: str, eps: float | None, gradients: float, jacobians: float) -> float:
    """ε; where it is not given Σ|g_i|² / Σ|J_i|² (Appendix B.2)."""
    if eps is not None:
        return eps
    if not jacobians > 0:
        raise ValueError(
            f"{name}: jacobians must not all be 0 for eps='balanced', got 0; give eps as a number"
        )
    return gradients / jacobians
