"""Bad input and limits of finite_argmin."""

from __future__ import annotations

import numpy as np
import pytest

from lossmeta.tuneloss import finite_argmin

FEATURES = np.array([[1.0, 0.2], [0.5, 0.8], [0.1, 2.0]])
ERRORS = np.array([0.1, 0.2, 0.3])
ONE, WIDE = np.array([1.0, 0.0]), np.array([1.0, 9.0])


def test_one_model() -> None:
    found = finite_argmin([0.5], [[2.0, 1.0]], ONE, WIDE)
    assert (found.model, found.margin, found.feasible) == (0, 1.0, (True,))


def test_equal_models_tie() -> None:
    found = finite_argmin([0.2, 0.1, 0.3], FEATURES[[0, 0, 1]], ONE, WIDE)
    assert found.model == 1 and found.margin > 0  # over the one that differs


def test_a_fixed_box_leaves_the_argmin_of_its_point() -> None:
    found = finite_argmin(ERRORS, FEATURES, [1.0, 0.01], [1.0, 0.01])
    assert found.model == 2 and found.feasible == (False, False, True)


def test_scale_does_not_matter() -> None:
    scale = np.array([1e-5, 1e6])
    wanted = finite_argmin(ERRORS, FEATURES, ONE, WIDE)
    found = finite_argmin(ERRORS, FEATURES * scale, ONE / scale, WIDE / scale)
    np.testing.assert_allclose(found.values * scale, wanted.values)
    assert found.margin == pytest.approx(wanted.margin)


@pytest.mark.parametrize(
    ("errors", "features", "lower", "upper", "error", "message"),
    [
        (
            [0.1, np.nan, 0.3],
            FEATURES,
            ONE,
            WIDE,
            ValueError,
            "finite_argmin: errors must be finite, got nan",
        ),
        (ERRORS, FEATURES[:2], ONE, WIDE, ValueError, r"features must have shape \[3, any\], got \[2, 2\]"),
        (ERRORS, FEATURES, WIDE, ONE, ValueError, "lower must not be above upper .* got 9 and 0 at index 1"),
        (ERRORS, FEATURES, -ONE, WIDE, ValueError, "exclude λ = 0"),
        (ERRORS, FEATURES * [0, 1], ONE, WIDE, ValueError, "exclude λ = 0 in a feature that is not 0"),
        ("none", FEATURES, ONE, WIDE, TypeError, "errors must be an array of numbers, got str"),
    ],
)
def test_refuses(
    errors: object, features: object, lower: object, upper: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finite_argmin(errors, features, lower, upper)
