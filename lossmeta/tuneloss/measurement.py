"""What a trained model says of the loss that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lossmeta.tuneloss._box import Array, Values


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one trained model says; k parameters of the loss, in the order of their bounds.

    Attributes:
        error: validation error.
        features: [1 + k], the task's loss and the features on the training data; ``None`` where they are not known.
        gram: [2 + k, 2 + k], the Gram matrix of the columns of [J, g]: gradients of the task's loss, of every feature
            and, last, of the validation error.
        slope: [k], how the error of the retrained model moves with the parameters.
        curvature: [k, k], how that slope does.
        names: of the parameters, in that order.
    """

    error: float
    features: Array | None = None
    gram: Array | None = None
    slope: Array | None = None
    curvature: Array | None = None
    names: tuple[str, ...] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and arrays; ``Measurement(**state)`` is the same again."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Measurement:
        """The measurement of a :meth:`state_dict`; arrays and tuples may have become lists, as JSON makes them."""
        fields = dict(state)
        for name in ("features", "gram", "slope", "curvature"):
            if fields.get(name) is not None:
                fields[name] = np.array(fields[name], dtype=np.float64)
        if fields.get("names") is not None:
            fields["names"] = tuple(fields["names"])
        return cls(**fields)

    @property
    def finite(self) -> bool:
        """Whether all that is known is a number."""
        known = {name: value for name, value in self.state_dict().items() if name != "names"}
        return all(bool(np.isfinite(value).all()) for value in known.values())


@dataclass(frozen=True, eq=False)
class Trial:
    """A training run.

    Attributes:
        values: of the parameters, by name.
        measurement: what it led to.
    """

    values: Values
    measurement: Measurement
