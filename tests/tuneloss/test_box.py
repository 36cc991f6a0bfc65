"""Named bounds and their unit coordinates."""

from __future__ import annotations

import numpy as np
import pytest

from lossmeta.tuneloss._box import Box

BOUNDS = {"l1": (0.01, 10.0), "drop": (0.0, 1.0), "l2": (np.full(3, 0.1), np.array([5.0, 6.0, 7.0]))}


def test_coordinates_are_logarithmic_where_the_lower_bound_is_positive() -> None:
    box = Box.of("X", BOUNDS)
    middle = box.named(box.at(np.full(5, 0.5)))
    assert middle["l1"] == pytest.approx(np.sqrt(0.01 * 10)) and middle["drop"] == 0.5
    np.testing.assert_allclose(middle["l2"], np.sqrt(0.1 * np.array([5.0, 6.0, 7.0])))
    assert box.groups == [slice(2, 5)] and box.size == 5


def test_there_and_back() -> None:
    box = Box.of("X", BOUNDS)
    unit = np.random.default_rng(0).random((20, 5))
    unit[0], unit[1] = 0, 1
    for u in unit:
        np.testing.assert_allclose(box.unit(box.at(u)), u, atol=1e-14)
        np.testing.assert_array_equal(box.entries(box.named(box.at(u))), box.at(u))


def test_slope_is_the_derivative() -> None:
    box = Box.of("X", BOUNDS)
    u, h = np.array([0.3, 0.4, 0.5, 0.6, 0.7]), 1e-6
    np.testing.assert_allclose((box.at(u + h) - box.at(u - h)) / (2 * h), box.slope(box.at(u)), rtol=1e-7)


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ([("a", 0, 1)], TypeError, "must map names"),
        ({}, ValueError, "at least one parameter"),
        ({1: (0, 1)}, TypeError, "must be strings"),
        ({"a": 3}, TypeError, "must be \\(lower, upper\\)"),
        ({"a": (0, 1, 2)}, TypeError, "must be \\(lower, upper\\)"),
        ({"a": (1.0, 1.0)}, ValueError, "the lower below the upper, got 1 and 1"),
        ({"a": (0.0, np.inf)}, ValueError, "finite"),
        ({"a": (np.zeros(3), np.array([1.0, -1.0, 1.0]))}, ValueError, "got 0 and -1 at index 1"),
        ({"a": (np.zeros(3), np.ones(2))}, ValueError, "two vectors of one length"),
    ],
)
def test_bounds_that_are_none(bounds: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Box.of("X", bounds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": 2.0}, "X: value of 'drop' must lie in \\[0, 1\\], got 2"),
        ({"l2": np.array([1.0, np.nan, 1.0])}, "value of 'l2\\[1\\]' must lie"),
        ({"l2": 1.0}, "must have shape \\[3\\], got \\[\\]"),
        ({"more": 1.0}, "values must be of l1, drop, l2, got"),
    ],
)
def test_values_that_are_none(change: dict[str, object], message: str) -> None:
    box = Box.of("X", BOUNDS)
    with pytest.raises(ValueError, match=message):
        box.entries({**box.named(box.at(np.full(5, 0.5))), **change})


def test_rounding_beyond_a_bound_is_moved_inside() -> None:
    box = Box.of("X", BOUNDS)
    values = box.named(box.at(np.ones(5)))
    assert box.entries({**values, "l1": 10 + 1e-9})[0] == 10
