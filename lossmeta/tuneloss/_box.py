"""The box in which parameters of a loss are sought: named bounds, and coordinates from 0 to 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bounds = Mapping[str, tuple[Any, Any]]
Values = dict[str, Any]  # a number, or a float64 array for a vector


@dataclass(frozen=True, eq=False)
class Box:
    """Bounds of k entries, which are the named parameters one after the other.

    A coordinate is logarithmic where the lower bound is positive, and linear elsewhere.

    Attributes:
        operator: whose messages speak of it.
        places: where the entries of each parameter are; an integer for a number.
        lower: [k].
        upper: [k].
    """

    operator: str
    places: dict[str, int | slice]
    lower: Array
    upper: Array

    @classmethod
    def of(cls, operator: str, bounds: Bounds) -> Box:
        """From ``{name: (lower, upper)}`` of numbers or of vectors of one length.

        Raises:
            TypeError: for bounds that are no mapping of pairs.
            ValueError: for no parameter, bounds that are not finite, and a lower one that is not below the upper.
        """
        if not isinstance(bounds, Mapping):
            raise TypeError(
                f"{operator}: bounds must map names to (lower, upper), got {type(bounds).__name__}"
            )
        if not bounds:
            raise ValueError(f"{operator}: bounds must have at least one parameter, got none")
        places: dict[str, int | slice] = {}
        both: tuple[list[Array], list[Array]] = [], []
        size = 0
        for name, pair in bounds.items():
            if not isinstance(name, str):
                raise TypeError(f"{operator}: names of bounds must be strings, got {name!r}")
            try:
                ends = [np.array(end, dtype=np.float64) for end in pair]
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"{operator}: bounds of {name!r} must be (lower, upper), got {pair!r}"
                ) from error
            if len(ends) != 2:
                raise TypeError(f"{operator}: bounds of {name!r} must be (lower, upper), got {pair!r}")
            low, high = np.broadcast_arrays(*ends) if ends[0].shape == () or ends[1].shape == () else ends
            if low.shape != high.shape or low.ndim > 1 or low.size == 0:
                raise ValueError(
                    f"{operator}: bounds of {name!r} must be two numbers, or two vectors of one length, got shapes "
                    f"{list(ends[0].shape)} and {list(ends[1].shape)}"
                )
            if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
                at = int(np.argmin(np.isfinite(low) & np.isfinite(high) & (low < high)))
                where = "" if low.ndim == 0 else f" at index {at}"
                raise ValueError(
                    f"{operator}: bounds of {name!r} must be finite, the lower below the upper, got "
                    f"{low.flat[at]:g} and {high.flat[at]:g}{where}"
                )
            places[name] = size if low.ndim == 0 else slice(size, size + low.size)
            size += low.size
            for ends_of_all, end in zip(both, (low, high), strict=True):
                ends_of_all.append(end.reshape(-1))
        return cls(operator, places, np.concatenate(both[0]), np.concatenate(both[1]))

    @property
    def size(self) -> int:
        """k."""
        return len(self.lower)

    @property
    def logarithmic(self) -> NDArray[np.bool_]:
        return self.lower > 0

    @property
    def groups(self) -> list[slice]:
        """The vectors of two or more entries."""
        return [p for p in self.places.values() if isinstance(p, slice) and p.stop - p.start > 1]

    def at(self, unit: Array) -> Array:
        """The entries [k] at coordinates [k] from 0 to 1."""
        low, high = self.lower, self.upper
        safe = np.where(self.logarithmic, low, 1.0)
        found = np.where(
            self.logarithmic,
            safe * (np.where(self.logarithmic, high, 1.0) / safe) ** unit,
            low + (high - low) * unit,
        )
        return np.clip(found, low, high)

    def unit(self, entries: Array) -> Array:
        """Coordinates of entries [k] inside the bounds."""
        low, high = self.lower, self.upper
        log = self.logarithmic
        safe, top, inside = (np.where(log, x, y) for x, y in ((low, 1.0), (high, np.e), (entries, 1.0)))
        return np.clip(
            np.where(log, np.log(inside / safe) / np.log(top / safe), (entries - low) / (high - low)), 0, 1
        )

    def slope(self, entries: Array) -> Array:
        """How fast entries [k] move with their coordinates."""
        ratio = np.where(self.logarithmic, self.upper / np.where(self.logarithmic, self.lower, 1.0), np.e)
        return np.where(self.logarithmic, entries * np.log(ratio), self.upper - self.lower)

    def named(self, entries: Array) -> Values:
        """``{name: number or vector}`` of entries [k]."""
        return {
            name: float(entries[p]) if isinstance(p, int) else entries[p].copy()
            for name, p in self.places.items()
        }

    def entries(self, values: Mapping[str, Any]) -> Array:
        """Entries [k] of named values.

        Raises:
            ValueError: for other names or sizes, and values out of bounds. Beyond them by rounding is moved inside.
        """
        if set(values) != set(self.places):
            wanted, given = ", ".join(self.places), ", ".join(map(str, values)) or "none"
            raise ValueError(f"{self.operator}: values must be of {wanted}, got {given}")
        found = np.empty(self.size)
        for name, place in self.places.items():
            value = np.asarray(values[name], dtype=np.float64)
            shape = () if isinstance(place, int) else (place.stop - place.start,)
            if value.shape != shape:
                raise ValueError(
                    f"{self.operator}: value of {name!r} must have shape {list(shape)}, got {list(value.shape)}"
                )
            found[place] = value
        slack = 1e-9 * (self.upper - self.lower)
        outside = ~((found >= self.lower - slack) & (found <= self.upper + slack))
        if outside.any():
            at = int(outside.argmax())
            bounds = f"[{self.lower[at]:g}, {self.upper[at]:g}]"
            raise ValueError(
                f"{self.operator}: value of {self._name(at)!r} must lie in {bounds}, got {found[at]:g}"
            )
        return np.clip(found, self.lower, self.upper)

    def _name(self, entry: int) -> str:
        for name, place in self.places.items():
            if isinstance(place, int):
                if place == entry:
                    return name
            elif place.start <= entry < place.stop:
                return f"{name}[{entry - place.start}]"
        raise AssertionError(entry)
