"""What of a loss is adapted: named, bounded numbers, and the loss that takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta.ala._adjusted import Adjusted
from lossmeta.ops.adjusted_cross_entropy import adjusted_cross_entropy, with_slope

Values = Mapping[str, Tensor]
"""What the parameters of a space are, by name."""

LEARNING_RATE = "learning_rate"
"""The parameter of that name multiplies the steps of the optimizer."""


@dataclass(frozen=True)
class Parameter:
    """One of the numbers, or vectors of numbers, that a loss is adapted by.

    Attributes:
        name: under which the loss finds it.
        default: where the loss is the plain one; of a vector a number for all, or a tuple.
        scale: a change that matters; searches move in units of it.
        low: smallest value.
        high: largest value.
        size: of a vector; ``None`` for a number.
        policy: name of the policy of :class:`Controller` that moves it, which parameters may share; its own by default.

    Raises:
        ValueError: for bounds that do not hold the default, and a scale that is not positive.
    """

    name: str
    default: float | tuple[float, ...]
    scale: float
    low: float
    high: float
    size: int | None = None
    policy: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"Parameter: size must be at least 1 for {self.name!r}, got {self.size}")
        if isinstance(self.default, tuple) and len(self.default) != self.size:
            raise ValueError(
                f"Parameter: default must be a number or of size {self.size} for {self.name!r}, got "
                f"{len(self.default)} numbers"
            )
        if not self.low < self.high or not all(self.low <= d <= self.high for d in self.defaults):
            raise ValueError(
                f"Parameter: low <= default <= high must hold for {self.name!r}, got {self.low}, {self.default} and "
                f"{self.high}"
            )
        if not 0 < self.scale < math.inf or not all(map(math.isfinite, (self.low, self.high))):
            raise ValueError(
                f"Parameter: scale must be positive and all finite for {self.name!r}, got scale {self.scale}, low "
                f"{self.low} and high {self.high}"
            )

    @property
    def count(self) -> int:
        return 1 if self.size is None else self.size

    @property
    def defaults(self) -> tuple[float, ...]:
        return self.default if isinstance(self.default, tuple) else (self.default,) * self.count


class LossSpace:
    """A family of losses with named, bounded parameters. Inherit from it for one of your own.

    A space has any of three parts, each a function of tensors for one model, which also runs under
    ``torch.func.vmap``. :meth:`transform` changes the prediction, :meth:`loss` judges it, :meth:`penalty` is added. The
    product ``a * b`` of two spaces has the parts of both, so one of them at most has a loss; where none has one it is
    the cross-entropy.

    Attributes:
        parameters: what is adapted.
        jitter: standard deviation of the noise on validation predictions that smooths a metric which moves in steps;
            in the unit of the prediction. 0 for predictions of no fixed unit.

    Example:
        >>> class Temperature(lossmeta.ala.LossSpace):
        ...     parameters = (lossmeta.ala.Parameter("sharpness", default=0.0, scale=0.3, low=-2.0, high=2.0),)
        ...
        ...     def transform(self, prediction, target, values):
        ...         return prediction * values["sharpness"].exp()
        >>> space = Temperature() * lossmeta.ala.Robust()
        >>> [p.name for p in space.parameters]
        ['sharpness', 'q']
    """

    parameters: Sequence[Parameter] = ()
    jitter: float = 0.3
    shift: str | None = None  # the vector that is added to the predictions of the classes

    def transform(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        """The prediction that the loss judges. ``values`` are the parameters by name, ``[]`` or ``[size]``."""
        return prediction

    def loss(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        """The mean loss of a batch, a scalar."""
        return F.cross_entropy(prediction, target)

    def penalty(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor | None:
        """What is added to the loss, a scalar; ``None`` for nothing."""
        return None

    def adjusted(self, values: Values) -> Adjusted | None:
        """What the space does to the cross-entropy of logits ``[N, C]``, where that is all: it makes a step cheaper."""
        return None

    def prepared(self, values: Values) -> Values:
        """The values with what the loss would make of them for every batch, where they stay the same for many."""
        return values

    def statistics(self, prediction: Tensor, target: Tensor, values: Values) -> dict[str, Tensor]:
        """What tells a policy how the parameters stand, from predictions on validation data.

        By default two numbers of each: the derivative of the loss in it, and the loss.

        Returns:
            By name ``[size, S]`` (``[1, S]`` of a number). What is not finite keeps its entry from moving.
        """
        return self._slopes(prediction, target, values, [p.name for p in self.parameters])

    def _slopes(
        self, prediction: Tensor, target: Tensor, values: Values, names: list[str]
    ) -> dict[str, Tensor]:
        with torch.enable_grad():
            leaves = {name: values[name].detach().requires_grad_() for name in names}
            loss = self(prediction.detach(), target, {**values, **leaves})
            if not loss.requires_grad:
                slopes: tuple[Tensor | None, ...] = (None,) * len(names)
            else:
                slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        loss = loss.detach()
        return {
            name: torch.stack(
                torch.broadcast_tensors(
                    (torch.zeros_like(leaf) if slope is None else slope).reshape(-1), loss.to(leaf.dtype)
                ),
                1,
            )
            for (name, leaf), slope in zip(leaves.items(), slopes, strict=True)
        }

    def __call__(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        """The whole loss under these values."""
        adjusted = self._fused(prediction, target, values, 2)
        if adjusted is not None:
            return adjusted_cross_entropy(prediction, target, **vars(adjusted))
        prediction = self.transform(prediction, target, values)
        loss = self.loss(prediction, target, values)
        penalty = self.penalty(prediction, target, values)
        return loss if penalty is None else loss + penalty

    def _adjustment(self, values: Values) -> Adjusted | None:
        """What :meth:`adjusted` says, unless a class further down has changed a part of which that does not know."""
        return self.adjusted(values) if _knows_its_parts(type(self)) else None  # type: ignore[arg-type]

    def _fused(self, predictions: Tensor, target: Tensor, values: Values, dim: int) -> Adjusted | None:
        """What the space does to logits ``[..., N, C]`` of classes ``[N]``, where these are such and that is all."""
        shape = predictions.shape
        if len(shape) != dim or target.shape != shape[-2:-1] or target.dtype != torch.int64:
            return None
        found = self._adjustment(values)
        # Shapes that do not fit are refused by the parts, which know why.
        fits = found is None or found.shift is None or found.shift.shape[-1:] == shape[-1:]
        return found if fits else None

    def of_children(self, predictions: Tensor, target: Tensor, values: Values) -> tuple[Tensor, Tensor]:
        """The losses ``[B]`` of all children, and their derivative in the predictions ``[B, N, ...]``.

        ``values`` are ``[B]`` and ``[B, size]``.
        """
        adjusted = self._fused(predictions, target, values, 3)
        if adjusted is not None:
            losses, slope = with_slope(predictions, target, **vars(adjusted))
            return losses, slope.to(predictions.dtype)
        with torch.enable_grad():
            leaves = predictions.detach().requires_grad_()
            losses = torch.func.vmap(lambda p, v: self(p, target, v), randomness="same")(leaves, dict(values))
            if losses.dim() != 1:
                raise ValueError(
                    f"Population: the space's loss must be a scalar, got {list(losses.shape[1:])}"
                )
            (slope,) = torch.autograd.grad(losses.sum(), leaves)
        return losses.detach(), slope

    def __mul__(self, other: LossSpace) -> LossSpace:
        if not isinstance(other, LossSpace):
            return NotImplemented
        return Product(self, other)


class Product(LossSpace):
    """The parts of several spaces together; see :class:`LossSpace`.

    Raises:
        ValueError: where two have a parameter of the same name, or a loss.
    """

    def __init__(self, *spaces: LossSpace) -> None:
        self.spaces: list[LossSpace] = []
        for space in spaces:
            self.spaces += space.spaces if isinstance(space, Product) else [space]
        self.parameters = tuple(p for s in self.spaces for p in s.parameters)
        self.jitter = min(s.jitter for s in self.spaces)
        shifts = [s.shift for s in self.spaces if s.shift is not None]
        self.shift = shifts[0] if shifts else None
        names = [p.name for p in self.parameters]
        if len(set(names)) < len(names):
            raise ValueError(f"Product: every parameter must have a name of its own, got {', '.join(names)}")
        judges = [s for s in self.spaces if type(s).loss is not LossSpace.loss]
        if len(judges) > 1:
            raise ValueError(
                "Product: one space at most must have a loss, got "
                + ", ".join(type(s).__name__ for s in judges)
            )
        self.judge = judges[0] if judges else self.spaces[0]

    def transform(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        for space in self.spaces:
            prediction = space.transform(prediction, target, values)
        return prediction

    def loss(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        return self.judge.loss(prediction, target, values)

    def adjusted(self, values: Values) -> Adjusted | None:
        found: Adjusted | None = Adjusted()
        for space in self.spaces:
            own = space._adjustment(values)
            found = None if found is None or own is None else found.joined(own)
        return found

    def prepared(self, values: Values) -> Values:
        for space in self.spaces:
            values = space.prepared(values)
        return values

    def statistics(self, prediction: Tensor, target: Tensor, values: Values) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {}
        for space in self.spaces:
            if type(space).statistics is not LossSpace.statistics:
                own |= space.statistics(prediction, target, values)
        left = [p.name for p in self.parameters if p.name not in own]
        return {**own, **self._slopes(prediction, target, values, left)} if left else own

    def penalty(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor | None:
        found = [s.penalty(prediction, target, values) for s in self.spaces]
        return sum((p for p in found if p is not None), start=prediction.new_zeros(()))


class Coordinates:
    """The parameters of a space as one vector ``u`` [..., U], in units of their scales from their defaults."""

    def __init__(self, space: LossSpace, where: str = "Population") -> None:
        self.where = where
        if not isinstance(space, LossSpace):
            raise TypeError(f"{where}: space must be a LossSpace, got {type(space).__name__}")
        self.parameters = tuple(space.parameters)
        if not self.parameters:
            raise ValueError(
                f"{where}: space must have at least one parameter, {type(space).__name__} has none"
            )
        self.places: dict[str, slice] = {}
        end = 0
        for p in self.parameters:
            self.places[p.name] = slice(end, end + p.count)
            end += p.count
        self.size = end
        self.default = _vector([d for p in self.parameters for d in p.defaults])
        self.scale, low, high = (
            _vector([number for p in self.parameters for number in [getattr(p, what)] * p.count])
            for what in ("scale", "low", "high")
        )
        self.low, self.high = (low - self.default) / self.scale, (high - self.default) / self.scale

    def clip(self, u: Tensor) -> Tensor:
        return u.clamp(self.low, self.high)

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """By name ``[...]`` for a number, ``[..., size]`` for a vector, in float64."""
        v = self.default + self.scale * u
        return {
            p.name: v[..., self.places[p.name]].squeeze(-1) if p.size is None else v[..., self.places[p.name]]
            for p in self.parameters
        }

    def moved(self, u: Tensor, values: Mapping[str, object]) -> Tensor:
        """``u`` with these parameters there."""
        u = u.clone()
        for name, value in values.items():
            if name not in self.places:
                known = ", ".join(self.places)
                raise ValueError(
                    f"{self.where}: the space must have a parameter {name!r}, its own are {known}"
                )
            place = self.places[name]
            given = torch.as_tensor(value, dtype=torch.float64, device="cpu")
            if given.dim() and given.shape != self.default[place].shape:  # a number is for all of a vector
                raise ValueError(
                    f"{self.where}: {name} must be {list(self.default[place].shape)}, got {list(given.shape)}"
                )
            found = (given - self.default[place]) / self.scale[place]
            # As far as rounding may have moved what was read from the bounds.
            if not bool(((found >= self.low[place] - 1e-6) & (found <= self.high[place] + 1e-6)).all()):
                parameter = next(p for p in self.parameters if p.name == name)
                raise ValueError(
                    f"{self.where}: {name} must lie in [{parameter.low}, {parameter.high}], got {value!r}"
                )
            u[place] = found
        return self.clip(u)


@cache
def _knows_its_parts(kind: type[LossSpace]) -> bool:
    def depth(name: str) -> int:
        return next(i for i, base in enumerate(kind.__mro__) if name in vars(base))

    return all(depth("adjusted") <= depth(part) for part in ("transform", "loss", "penalty"))


def _vector(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")
