"""Algorithm LearnLoss: what it minimises, Theorem 4, and how it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lossmeta.tuneloss import NotCertified, learn_loss
from lossmeta.tuneloss._statement import Statement

Arrays = dict[str, Any]


def linear_error(seed: int, models: int, k: int, n: int) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Where the error is exactly linear in the features; λ*, and the unit of each of its components."""
    rng = np.random.default_rng(seed)
    unit = 10.0 ** -rng.uniform(-3, 3, k)
    truth = rng.uniform(0.2, 1.0, k) * unit
    features, jacobians = (rng.standard_normal(shape) / unit for shape in ((models, k), (models, n, k)))
    multiplier = rng.uniform(0.1, 10)
    lower, upper = 0.01 * unit, 100 * unit
    lower[0] = upper[0] = truth[0]
    given = {
        "errors": features @ truth / multiplier,
        "features": features,
        "lower": lower,
        "upper": upper,
        "gradients": jacobians @ truth / multiplier,
        "jacobians": jacobians,
    }
    return given, truth, unit


@pytest.mark.parametrize("k", [2, 7, 40])
@pytest.mark.parametrize("seed", range(3))
def test_one_model_with_gradients_gives_lambda(k: int, seed: int) -> None:
    """Theorem 4. Its k + 1 independent vectors cannot be, for (λ*, -α*) is orthogonal to all: a component is fixed."""
    given, truth, unit = linear_error(seed, 1, k, 2 * k)
    found = learn_loss(**given)
    np.testing.assert_allclose(found.values / unit, truth / unit, rtol=0, atol=1e-6)
    assert found.certificate.rank == found.certificate.unknowns == k


@pytest.mark.parametrize("k", [2, 7, 40])
@pytest.mark.parametrize("seed", range(3))
def test_k_independent_models_give_lambda(k: int, seed: int) -> None:
    given, truth, unit = linear_error(seed, k, k, 1)
    found = learn_loss(**without_gradients(given))
    np.testing.assert_allclose(found.values / unit, truth / unit, rtol=0, atol=1e-6)
    assert found.matched == int(np.argmin(given["errors"])) and found.feasible == (True,)


def test_fewer_models_leave_lambda_open_and_say_so() -> None:
    given, _, _ = linear_error(0, 3, 7, 1)
    certificate = learn_loss(**without_gradients(given)).certificate
    assert (certificate.rank, certificate.unknowns) == (3, 7)


def noisy(seed: int, models: int = 6, k: int = 4, n: int = 9) -> Arrays:
    rng = np.random.default_rng(seed)
    features, jacobians = rng.uniform(0.2, 2.0, (models, k)), rng.standard_normal((models, n, k))
    lower, upper = np.full(k, 0.1), np.full(k, 2.0)
    lower[0] = upper[0] = 1.0
    return {
        "errors": rng.uniform(1.0, 2.0, models),
        "features": features,
        "lower": lower,
        "upper": upper,
        "gradients": rng.standard_normal((models, n)),
        "jacobians": jacobians,
    }


def grams(given: Arrays) -> np.ndarray:
    columns = np.concatenate([given["jacobians"], given["gradients"][:, :, None]], axis=2)
    return np.einsum("inj,ink->ijk", columns, columns)


def without_gradients(given: Arrays) -> Arrays:
    return {name: given[name] for name in ("errors", "features", "lower", "upper")}


def cost(given: Arrays, values: np.ndarray, multiplier: float, eps: float) -> float:
    """Eq. 6, term by term."""
    total = 0.0
    for i, error in enumerate(given["errors"]):
        total += (values @ given["features"][i] - multiplier * error) ** 2
        total += eps * np.sum((given["jacobians"][i] @ values - multiplier * given["gradients"][i]) ** 2)
    return float(total)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("eps", ["balanced", 0.0, 3.0])
def test_minimises_equation_6(seed: int, eps: float | str) -> None:
    """In the paper's own terms, by CVXPY."""
    import cvxpy as cp

    given = noisy(seed)
    number = eps
    if isinstance(eps, str):
        number = np.sum(given["gradients"] ** 2) / np.sum(given["jacobians"] ** 2)
    found = learn_loss(**given, eps=eps)
    values, multiplier = cp.Variable(4), cp.Variable(nonneg=True)
    losses = given["features"] @ values
    objective = cp.sum_squares(losses - multiplier * given["errors"])
    for jacobian, gradient in zip(given["jacobians"], given["gradients"], strict=True):
        objective += number * cp.sum_squares(jacobian @ values - multiplier * gradient)
    feasible = []
    for model in np.argsort(given["errors"]):
        in_box = [values >= given["lower"], values <= given["upper"]]
        problem = cp.Problem(cp.Minimize(objective), [*in_box, losses[model] <= losses])
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        feasible.append(problem.status == cp.OPTIMAL)
        if feasible[-1]:
            break
    assert found.feasible == tuple(feasible) and found.matched == model
    assert found.cost == pytest.approx(cost(given, found.values, found.multiplier, number))
    assert found.cost == pytest.approx(problem.value, rel=1e-6)
    np.testing.assert_allclose(found.values, values.value, atol=1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_the_matched_model_has_the_least_loss_in_the_box(seed: int) -> None:
    given = noisy(seed)
    found = learn_loss(**given)
    losses = given["features"] @ found.values
    assert losses[found.matched] <= losses.min() + 1e-8
    assert (found.values >= given["lower"]).all() and (found.values <= given["upper"]).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("apart", [1.0, 1e-4])
def test_grams_are_as_good_as_gradients(seed: int, apart: float) -> None:
    given = noisy(seed)
    for name in ("features", "jacobians"):  # two that are alike
        given[name][..., 3] = given[name][..., 2] + apart * given[name][..., 3]
    wanted = learn_loss(**given)
    found = learn_loss(**without_gradients(given), grams=grams(given))
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-6)
    assert found.cost == pytest.approx(wanted.cost, rel=1e-9)


def test_gram_of_fewer_gradients_than_features() -> None:
    given = noisy(0, models=2, k=12, n=3)
    found = learn_loss(**without_gradients(given), grams=grams(given))
    assert found.cost == pytest.approx(learn_loss(**given).cost, rel=1e-6)
    assert found.certificate.rank == 2 + 2 * 3 < found.certificate.unknowns


def test_raw_gradients_keep_digits_that_squares_lose() -> None:
    """Three features that differ by 1e-7 in their gradients alone."""
    given, truth, unit = linear_error(1, 1, 4, 12)
    for j in (2, 3):
        same = unit[1] / unit[j]
        given["jacobians"][0, :, j] = given["jacobians"][0, :, 1] * same + 1e-7 * given["jacobians"][0, :, j]
        given["features"][0, j] = given["features"][0, 1] * same
    given["errors"], given["gradients"] = given["features"] @ truth, given["jacobians"] @ truth
    raw = learn_loss(**given, eps=1.0)
    squared = learn_loss(**without_gradients(given), grams=grams(given), eps=1.0)
    np.testing.assert_allclose(raw.values / unit, truth / unit, atol=1e-6)
    assert np.abs((squared.values - truth) / unit).max() > 1e-2
    assert raw.certificate.rank == raw.certificate.unknowns
    assert squared.certificate.rank < squared.certificate.unknowns  # it says so


def test_scale_of_a_feature_does_not_matter() -> None:
    given = noisy(3)
    wanted = learn_loss(**given)
    scale = np.array([1.0, 1e6, 1e-7, 1e3])
    scaled = {**given, "features": given["features"] * scale, "jacobians": given["jacobians"] * scale}
    scaled |= {"lower": given["lower"] / scale, "upper": given["upper"] / scale}
    eps = np.sum(given["gradients"] ** 2) / np.sum(given["jacobians"] ** 2)
    np.testing.assert_allclose(learn_loss(**scaled, eps=eps).values * scale, wanted.values, atol=1e-9)


def test_infinite_bounds_are_none() -> None:
    given, truth, unit = linear_error(2, 1, 5, 10)
    given["lower"][1:], given["upper"][1:] = -np.inf, np.inf
    np.testing.assert_allclose(learn_loss(**given).values / unit, truth / unit, atol=1e-9)


def test_equal_models_are_fine() -> None:
    given = noisy(4)
    twice = {
        name: np.concatenate([v, v]) if name not in ("lower", "upper") else v for name, v in given.items()
    }
    found, wanted = learn_loss(**twice), learn_loss(**given)
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-9)
    assert found.matched == wanted.matched and found.cost == pytest.approx(2 * wanted.cost)


def test_equal_features_are_fine_and_said() -> None:
    given = noisy(5)
    for name in ("features", "jacobians"):
        given[name][..., 3] = given[name][..., 2]
    certificate = learn_loss(**given).certificate
    assert certificate.rank == certificate.unknowns - 1


def test_a_feature_that_is_zero_takes_its_bound_next_to_zero() -> None:
    given = noisy(6)
    for name in ("features", "jacobians"):
        given[name][..., 2] = 0.0
    assert learn_loss(**given).values[2] == 0.1


def test_all_components_fixed() -> None:
    given = noisy(7)
    values = np.array([1.0, 0.5, 0.2, 1.5])
    found = learn_loss(**{**given, "lower": values, "upper": values})
    np.testing.assert_array_equal(found.values, values)
    assert found.matched == int(np.argmin(given["features"] @ values))
    assert len(found.feasible) == 1 + int(np.sum(given["errors"] < given["errors"][found.matched]))


def test_an_error_that_opposes_every_loss_has_multiplier_zero() -> None:
    given = noisy(8)
    given["errors"], given["gradients"] = -given["errors"], 0 * given["gradients"]
    found = learn_loss(**given, eps=1.0)
    assert found.multiplier == 0.0


def test_tensors_and_float32_are_taken() -> None:
    given = noisy(9)
    wanted = learn_loss(**given)
    found = learn_loss(**{name: torch.tensor(v) for name, v in given.items()})
    np.testing.assert_array_equal(found.values, wanted.values)
    single = learn_loss(**{name: v.astype(np.float32) for name, v in given.items()})
    np.testing.assert_allclose(single.values, wanted.values, atol=1e-4)


def test_nothing_is_written_to() -> None:
    given = noisy(10)
    before = {name: v.copy() for name, v in given.items()}
    learn_loss(**given)
    learn_loss(**without_gradients(given), grams=grams(given))
    for name, v in given.items():
        np.testing.assert_array_equal(v, before[name])


# ---- Bad input.


def changed(argument: str, place: Any, value: float) -> Arrays:
    given = noisy(0)
    given[argument][place] = value
    return given


ZERO = np.zeros(4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            changed("errors", 2, np.nan),
            ValueError,
            r"learn_loss: errors must be finite, got nan at index \[2\]",
        ),
        (
            changed("features", (1, 3), np.inf),
            ValueError,
            r"features must be finite, got inf at index \[1, 3\]",
        ),
        (
            changed("gradients", (1, 0), np.nan),
            ValueError,
            r"gradients\[1\] must be finite, got nan at index \[0\]",
        ),
        (changed("jacobians", (2, 0, 1), np.nan), ValueError, r"jacobians\[2\] must be finite"),
        (changed("lower", 1, 3.0), ValueError, "lower must not be above upper .* got 3 and 2 at index 1"),
        (changed("lower", 1, np.nan), ValueError, "lower must not be above upper .* got nan and 2"),
        (
            {**noisy(0), "lower": np.full(4, np.inf), "upper": np.full(4, np.inf)},
            ValueError,
            "finite values, got inf",
        ),
        (
            {**noisy(0), "lower": ZERO, "upper": np.ones(4)},
            ValueError,
            "learn_loss: lower and upper must exclude λ = 0, .* got a box with 0 in it",
        ),
        ({**noisy(0), "lower": -np.ones(4), "upper": ZERO}, ValueError, "exclude λ = 0, .* fix a component"),
        ({**noisy(0), "lower": np.zeros(3)}, ValueError, r"lower must have shape \[4\], got \[3\]"),
        (
            {**noisy(0), "features": np.zeros((5, 4))},
            ValueError,
            r"features must have shape \[6, any\], got \[5, 4\]",
        ),
        (
            {**noisy(0), "features": np.zeros((6, 0))},
            ValueError,
            r"features must have shape \[6, any\], got \[6, 0\]",
        ),
        ({**noisy(0), "errors": []}, ValueError, r"errors must have shape \[any\], got \[0\]"),
        ({**noisy(0), "errors": "many"}, TypeError, "errors must be an array of numbers, got str"),
        (
            {**noisy(0), "gradients": np.zeros((6, 8))},
            ValueError,
            r"jacobians\[0\] must have shape \[8, 4\], got \[9, 4\]",
        ),
        (
            {**noisy(0), "gradients": np.zeros((5, 9))},
            ValueError,
            "gradients must hold one for each of 6 models, got 5",
        ),
        ({**noisy(0), "gradients": 3}, TypeError, "gradients must hold one for each model, got int"),
        ({**noisy(0), "jacobians": None}, ValueError, "given together, got no jacobians"),
        ({**noisy(0), "grams": np.zeros((6, 5, 5))}, ValueError, "raw or as grams, got both"),
        ({**noisy(0), "eps": -1.0}, ValueError, "eps must be at least 0 and finite, got -1.0"),
        ({**noisy(0), "eps": np.nan}, ValueError, "eps must be at least 0 and finite, got nan"),
        ({**noisy(0), "eps": "equal"}, ValueError, "eps must be 'balanced' or a number, got 'equal'"),
        ({**noisy(0), "eps": None}, TypeError, "eps must be 'balanced' or a number, got NoneType"),
        (
            {**noisy(0), "jacobians": np.zeros((6, 9, 4))},
            ValueError,
            "jacobians must not all be 0 for eps='balanced'",
        ),
        ({**noisy(0), "solver": "best"}, ValueError, "solver must be one of 'auto', 'daqp', .* got 'best'"),
    ],
)
def test_refuses(given: Arrays, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        learn_loss(**given)


def test_refuses_one_model_without_gradients() -> None:
    with pytest.raises(ValueError, match="2 models or more where there are no gradients, got 1; any λ"):
        learn_loss(**without_gradients(noisy(0, models=1)))


def test_refuses_a_weight_of_no_gradients() -> None:
    with pytest.raises(
        ValueError, match=r"eps must be 0 or 'balanced' where there are no gradients, got 2\.0"
    ):
        learn_loss(**without_gradients(noisy(0)), eps=2.0)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda g: g[:, :4, :4], r"grams must have shape \[6, 5, 5\], got \[6, 4, 4\]"),
        (lambda g: g + np.triu(np.ones((5, 5)), 1), "grams must be symmetric"),
        (lambda g: g - 0.5 * np.eye(5) * g.max(), "grams must be positive semi-definite"),
        (
            lambda g: g * (2 * np.eye(5) - np.ones((5, 5))) * np.where(np.eye(5) > 0, 0.1, 1.0),
            "positive semi-definite",
        ),
    ],
)
def test_refuses_grams_that_are_none(made: Any, message: str) -> None:
    given = noisy(0)
    with pytest.raises(ValueError, match=message):
        learn_loss(**without_gradients(given), grams=made(grams(given)))


def test_refuses_a_box_that_only_a_zero_feature_keeps_from_zero() -> None:
    given = noisy(0)
    given["features"][:, 0], given["jacobians"][:, :, 0], given["lower"][1:] = 0.0, 0.0, 0.0
    with pytest.raises(ValueError, match="exclude λ = 0 in a feature that is not 0 for all models"):
        learn_loss(**given)


def test_a_loss_that_scaling_has_spoilt_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is returned is verified once more, in the caller's units."""
    given = noisy(2)
    found = learn_loss(**given)
    values = np.append(np.where(np.arange(4) == 0, 1.0, 0.1), found.multiplier)
    assert np.argmin(given["features"] @ values[:4]) != found.matched
    monkeypatch.setattr(Statement, "unscaled", lambda self, y: values)
    with pytest.raises(NotCertified, match="learn_loss: scaling left a violation of"):
        learn_loss(**given)


def test_not_certified_is_a_runtime_error() -> None:
    assert issubclass(NotCertified, RuntimeError)


# ---- Limits.


def test_errors_that_are_all_zero_leave_the_multiplier_at_zero() -> None:
    given = without_gradients(noisy(0))
    given["errors"] = np.zeros(6)
    found = learn_loss(**given)
    assert found.multiplier == 0.0 and found.certificate.unknowns == 3
    values = found.values
    fixed = learn_loss(**{**given, "lower": values, "upper": values})  # nothing is left to find
    assert fixed.solver == "none" and fixed.certificate.unknowns == 0
    assert fixed.cost == pytest.approx(found.cost)


@pytest.mark.parametrize("upper", [1.0, 3.0, np.inf])
def test_one_feature(upper: float) -> None:
    found = learn_loss([2.0, 1.0, 4.0], [[1.0], [0.5], [2.0]], [1.0], [upper])
    assert found.matched == 1 and found.cost < 1e-20
    assert found.values[0] / found.multiplier == pytest.approx(2.0)


def test_many_models_and_few_features() -> None:
    rng = np.random.default_rng(0)
    features, truth = rng.uniform(0.5, 1.5, (3000, 4)), np.array([1.0, 0.3, 0.0, 2.0])
    found = learn_loss(features @ truth, features, [1.0, 0.0, 0.0, 0.0], [1.0, 9.0, 9.0, 9.0])
    np.testing.assert_allclose(found.values, truth, atol=1e-9)
