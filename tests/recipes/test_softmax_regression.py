"""Batched softmax regressions: their losses, two trainers and what trained models say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from lossmeta.recipes._softmax_regression import Coefficients, SoftmaxRegression, evaluate
from lossmeta.recipes._softmax_regression_adagrad import adagrad
from lossmeta.recipes._softmax_regression_loss import MU, Loss, Scales
from lossmeta.recipes._softmax_regression_measurements import measure
from lossmeta.recipes._softmax_regression_minimum import minimise

R, N, D, C = 2, 23, 5, 3  # repetitions, samples, features, classes
VALUES = [
    {"l1": 0.7, "l2": np.array([0.4, 1.3]), "uniform": 0.2, "dropout": 0.6},
    {"l1": 0.2, "l2": np.array([2.0, 0.1]), "uniform": 0.0, "dropout": 1.0},
    {"l1": 3.0, "l2": np.array([0.5, 0.5]), "uniform": 0.1, "dropout": 0.0},
    {"l1": 0.1, "l2": np.array([0.1, 5.0]), "uniform": 1.0, "dropout": 0.3},
]


def data(count: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(R, count, D, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(C, (R, count), generator=generator)


def problem(**options: Any) -> SoftmaxRegression:
    return SoftmaxRegression(*data(), classes=C, **options)


def weights(seed: int = 1) -> Tensor:
    return torch.randn(
        len(VALUES), C, D + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def alone(w: Tensor, of: SoftmaxRegression, index: int, coefficients: Tensor | None = None) -> Tensor:
    """The loss of one problem, by its formula; coefficients l1, l2, l2, uniform, dropout."""
    repetition = index // (len(VALUES) // R)
    inputs, labels = of.inputs[repetition], of.labels[repetition]
    if coefficients is None:
        coefficients = Coefficients.of(VALUES).vectors()[index]
    l1, first, second, uniform, dropout = coefficients
    group = torch.where(torch.arange(D) * 2 < D, first, second)
    logs = F.log_softmax(inputs @ w.T, -1)
    w = w[:, :-1]
    return (
        F.nll_loss(logs[:N], labels[:N])
        - uniform * logs[:N].mean()
        + dropout * F.nll_loss(logs[N:], labels[N:])
        + (l1 * ((w * w + MU * MU).sqrt() - MU) + group * w * w).sum() / N
    )


# ---- The loss.


def test_values_gradients_and_hessians() -> None:
    of, w = problem(), weights()
    loss = Loss(of, w, Scales.of(of, Coefficients.of(VALUES)))
    direction = weights(2)
    products = loss.hessian_product(direction.view(R, 2, 1, C, D + 1))
    for b, one in enumerate(w):
        at = divmod(b, 2)
        value = alone(one, of, b)
        torch.testing.assert_close(loss.values[at], value)
        torch.testing.assert_close(loss.gradient()[at], torch.func.grad(alone)(one, of, b))
        hessian = torch.func.hessian(alone)(one, of, b).reshape(one.numel(), -1)
        torch.testing.assert_close(products[at][0].flatten(), hessian @ direction[b].flatten())
        torch.testing.assert_close(loss.hessian_diagonal()[at].flatten() - 1e-6, hessian.diagonal())


def test_masks_drop_half_of_the_inputs_and_double_the_others() -> None:
    inputs = torch.ones(R, 400, D, dtype=torch.float64)
    of = SoftmaxRegression(inputs, torch.zeros(R, 400, dtype=torch.int64), classes=C, masks=3)
    assert of.inputs.shape == (R, 1600, D + 1)
    assert bool((of.inputs[..., -1] == 1).all())
    dropped = of.inputs[:, 400:, :-1]
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    again = SoftmaxRegression(
        inputs[1:], torch.zeros(1, 400, dtype=torch.int64), classes=C, masks=3, seeds=[1]
    )
    assert torch.equal(again.inputs[0], of.inputs[1]) and not torch.equal(of.inputs[0], of.inputs[1])


# ---- The minimum.


def test_minimum_is_that_of_scipy() -> None:
    of = problem()
    found = minimise(of, Coefficients.of(VALUES), tolerance=1e-9)
    assert found.gradient.max() <= 1e-9
    for b in range(len(VALUES)):

        def both(x: np.ndarray, index: int = b) -> tuple[float, np.ndarray]:
            w = torch.from_numpy(x).view(C, D + 1)
            gradient, value = torch.func.grad_and_value(alone)(w, of, index)
            return float(value), gradient.flatten().numpy()

        options = {"maxiter": 5000, "maxcor": 20, "ftol": 1e-16, "gtol": 1e-10}
        best = minimize(both, np.zeros(C * (D + 1)), jac=True, method="L-BFGS-B", options=options)
        assert float(alone(found.weights[b], of, b)) <= best.fun + 1e-12
        # The bias is free to move alike for all classes.
        expected, got = torch.from_numpy(best.x).view(C, D + 1), found.weights[b]
        torch.testing.assert_close(got[:, :-1], expected[:, :-1], atol=1e-6, rtol=0)


def test_a_batch_and_each_problem_alone_have_the_same_minimum() -> None:
    inputs, labels = data()
    together = minimise(problem(seeds=[5, 6]), Coefficients.of(VALUES))
    for r in range(R):
        one = SoftmaxRegression(inputs[r], labels[r], classes=C, seeds=[5 + r])
        for v in range(2):
            b = 2 * r + v
            found = minimise(one, Coefficients.of(VALUES[b : b + 1]))
            torch.testing.assert_close(found.weights[0], together.weights[b], atol=1e-8, rtol=0)
            assert found.iterations[0] == together.iterations[b]
    assert len(set(together.iterations.tolist())) > 1  # some were done before others


def test_a_warm_start_is_shorter_and_not_written_to() -> None:
    of = problem()
    first = minimise(of, Coefficients.of(VALUES), tolerance=1e-8)
    near = [{**v, "l1": 1.02 * v["l1"]} for v in VALUES]
    start = first.weights.clone()
    warm, cold = minimise(of, Coefficients.of(near), start), minimise(of, Coefficients.of(near))
    assert warm.iterations.sum() < 0.7 * cold.iterations.sum()
    assert torch.equal(start, first.weights)
    at_it = minimise(of, Coefficients.of(VALUES), start, tolerance=1e-7)
    assert torch.equal(at_it.weights, start) and at_it.iterations.sum() == 0


def test_float32() -> None:
    single = minimise(problem(dtype=torch.float32), Coefficients.of(VALUES), tolerance=1e-4)
    double = minimise(problem(), Coefficients.of(VALUES), tolerance=1e-4)
    assert single.weights.dtype == torch.float32 and single.gradient.max() <= 1e-4
    torch.testing.assert_close(single.weights.double(), double.weights, atol=5e-3, rtol=0)


def test_what_is_left_is_said() -> None:
    with pytest.warns(UserWarning, match=r"^minimise: .* must come to 1e-06, got up to .* in 4 of 4 losses"):
        found = minimise(problem(), Coefficients.of(VALUES), iterations=3)
    assert found.iterations.tolist() == [3] * 4
    with pytest.warns(UserWarning, match="or a larger tolerance"):
        minimise(problem(dtype=torch.float32), Coefficients.of(VALUES), tolerance=1e-12, iterations=300)


# ---- AdaGrad.


def by_hand(of: SoftmaxRegression, index: int, epochs: int, batch: int, shuffle: int) -> Tensor:
    """Adagrad of torch, without dropout; the penalty |w| as it is."""
    repetition = index // 2
    l1, first, second, uniform, _ = Coefficients.of(VALUES).vectors()[index]
    group = torch.where(torch.arange(D) * 2 < D, first, second)
    w = torch.zeros(C, D + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adagrad([w], 0.1, initial_accumulator_value=0.1, eps=0)
    order = np.random.default_rng([1, shuffle, of.seeds[repetition]])
    after = []
    for _ in range(epochs):
        for rows in torch.from_numpy(order.permutation(N)).split(batch):
            optimizer.zero_grad()
            logs = F.log_softmax(of.inputs[repetition, rows] @ w.T, -1)
            penalty = (l1 * w[:, :-1].abs() + group * w[:, :-1].square()).sum() / N
            (F.nll_loss(logs, of.labels[repetition, rows]) - uniform * logs.mean() + penalty).backward()
            optimizer.step()
        after.append(w.detach().clone())
    return torch.stack(after[epochs // 2 :]).mean(0)


@pytest.mark.parametrize(("batch", "epochs"), [(1, 4), (4, 5), (N, 1), (100, 2)])
def test_adagrad_is_that_of_torch(batch: int, epochs: int) -> None:
    plain = Coefficients.of([{**v, "dropout": 0.0} for v in VALUES])
    of = problem(seeds=[3, 9])
    found = adagrad(of, plain, epochs=epochs, batch=batch, shuffle=7)
    for b in range(len(VALUES)):
        torch.testing.assert_close(found[b], by_hand(of, b, epochs, batch, 7))


def test_a_batch_and_each_problem_alone_are_trained_alike() -> None:
    inputs, labels = data()
    together = adagrad(problem(seeds=[5, 6]), Coefficients.of(VALUES), epochs=3)
    for r in range(R):
        one = SoftmaxRegression(inputs[r], labels[r], classes=C, seeds=[5 + r])
        for v in range(2):
            b = 2 * r + v
            found = adagrad(one, Coefficients.of(VALUES[b : b + 1]), epochs=3)
            torch.testing.assert_close(found[0], together[b])


def test_dropout_on_average_gives_the_gradient_of_the_loss() -> None:
    """One step W - W' = rate g / sqrt(0.1 + g^2), over thousands of copies of two samples."""
    inputs = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.8, -1.0]], dtype=torch.float64).repeat(6000, 1)
    labels = torch.tensor([0, 2]).repeat(6000)
    of = SoftmaxRegression(inputs, labels, classes=C, masks=4)
    values = [{"l1": 0.5, "l2": 1.0, "uniform": 0.3, "dropout": d} for d in (0.0, 0.4, 1.5)]
    start = torch.randn(3, C, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coefficients = Coefficients.of(values)
    expected = Loss(of, start, Scales.of(of, coefficients)).gradient()[0]
    got = (start - adagrad(of, coefficients, start, epochs=1, batch=12000, rate=1.0)).clamp(-0.999, 0.999)
    got = got * (0.1 / (1 - got.square())).sqrt()  # g
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0)
    assert (expected[2] - expected[0]).abs().max() > 0.2


def test_adagrad_comes_near_the_minimum() -> None:
    of = SoftmaxRegression(*data(200), classes=C, masks=8)
    coefficients = Coefficients.of(VALUES)
    scales = Scales.of(of, coefficients)
    best = minimise(of, coefficients)
    found = adagrad(of, coefficients, epochs=60)
    values, least = (Loss(of, w, scales).values for w in (found, best.weights))
    assert bool((values - least < 5e-3).all())


# ---- Measurements.


def test_measurements_in_the_full_metric() -> None:
    of, w, valid = problem(), weights(), data(17, 8)
    coefficients = Coefficients.of(VALUES).vectors()
    for b, found in enumerate(measure(of, w, Coefficients.of(VALUES), valid, "full", 200)):
        x, y = valid[0][b // 2], valid[1][b // 2]
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)

        def error(v: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(x @ v.T, y)

        assert found.error == pytest.approx(float(error(w[b])))

        def features(v: Tensor, index: int = b) -> Tensor:
            task = alone(v, of, index, torch.zeros(5, dtype=torch.float64))
            unit = torch.eye(5, dtype=torch.float64)
            return torch.stack([task, *(alone(v, of, index, u) - task for u in unit)])

        np.testing.assert_allclose(found.features, features(w[b]))
        jacobian = torch.func.jacrev(features)(w[b]).flatten(1)[1:]
        hessian = torch.func.hessian(alone)(w[b], of, b, coefficients[b]).reshape(C * (D + 1), -1)
        # The bias that is alike for all classes has no curvature, and no gradient.
        moves = jacobian @ torch.linalg.pinv(hessian, hermitian=True, rtol=1e-10)
        g = torch.func.grad(error)(w[b]).flatten()
        second = torch.func.hessian(error)(w[b]).reshape(C * (D + 1), -1)
        np.testing.assert_allclose(found.slope, -(moves @ g).numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.curvature, (moves @ second @ moves.T).numpy(), rtol=1e-5, atol=1e-6)
    for found, few in zip(
        *(measure(of, w, Coefficients.of(VALUES), valid, "full", n) for n in (200, None)), strict=True
    ):
        np.testing.assert_allclose(few.slope, found.slope, atol=0.1 * np.abs(found.slope).max())


@pytest.mark.parametrize("metric", ["hyper", "diagonal"])
def test_measurements_in_cheaper_metrics(metric: str) -> None:
    of, w, valid = problem(), weights(), data(17, 8)
    grams = measure(of, w, Coefficients.of(VALUES), valid, "gram")
    loss = Loss(of, w, Scales.of(of, Coefficients.of(VALUES)))
    for b, found in enumerate(measure(of, w, Coefficients.of(VALUES), valid, metric)):
        x = torch.cat([valid[0][b // 2], torch.ones(17, 1, dtype=torch.float64)], 1)
        g = torch.func.grad(lambda v, x=x, y=valid[1][b // 2]: F.cross_entropy(x @ v.T, y))(w[b]).flatten()

        def features(v: Tensor, index: int = b) -> Tensor:
            zero_and_units = torch.cat([torch.zeros(1, 5), torch.eye(5)]).double()
            return torch.stack([alone(v, of, index, u) for u in zero_and_units])

        rows = torch.func.jacrev(features)(w[b]).flatten(1)
        jacobian = rows[1:] - rows[0]
        diagonal = loss.hessian_diagonal()[divmod(b, 2)].flatten()
        hessian = torch.func.hessian(alone)(w[b], of, b).reshape(C * (D + 1), -1)
        inverse = (
            torch.linalg.pinv(hessian, hermitian=True, rtol=1e-10) if metric == "hyper" else 1 / diagonal
        )
        x_g = inverse @ g if metric == "hyper" else inverse * g
        np.testing.assert_allclose(found.slope, -(jacobian @ x_g).numpy(), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.curvature, (jacobian / diagonal @ jacobian.T).numpy())
        columns = torch.cat([rows[:1], jacobian, g[None]])
        np.testing.assert_allclose(grams[b].gram, (columns @ columns.T).numpy(), atol=1e-12)
        assert grams[b].error == found.error
        np.testing.assert_array_equal(grams[b].features, found.features)


def test_slope_is_how_the_error_of_the_retrained_model_moves() -> None:
    of, valid = problem(), data(17, 8)
    trained = minimise(of, Coefficients.of(VALUES), tolerance=1e-10).weights
    found = measure(of, trained, Coefficients.of(VALUES), valid, "hyper")
    h = 1e-4
    for name, entry in (("l1", 0), ("uniform", 3), ("dropout", 4)):
        errors = []
        for sign in (1, -1):
            moved = Coefficients.of([{**v, name: v[name] + sign * h + (name != "l1") * h} for v in VALUES])
            errors.append(evaluate(minimise(of, moved, trained, tolerance=1e-10).weights, valid)[0].numpy())
        difference = (errors[0] - errors[1]) / (2 * h)
        np.testing.assert_allclose([m.slope[entry] for m in found], difference, rtol=0.05, atol=1e-4)


def test_evaluate() -> None:
    w, (inputs, labels) = weights(), data(17, 8)
    losses, wrong = evaluate(w, (inputs, labels))
    for b in range(len(VALUES)):
        outputs = inputs[b // 2] @ w[b, :, :-1].T + w[b, :, -1]
        assert losses[b].item() == pytest.approx(F.cross_entropy(outputs, labels[b // 2]).item())
        assert wrong[b].item() == pytest.approx((outputs.argmax(1) != labels[b // 2]).double().mean().item())
    one = evaluate(w, (inputs[0], labels[0]))  # one data set for all
    torch.testing.assert_close(one[0][:2], losses[:2])


# ---- What is refused.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "at least one loss"),
        ([{"l1": 1.0, "l2": 1.0, "uniform": 0.0}], "must be of l1, l2, uniform, dropout"),
        ([{"l2": 1.0, "l1": 1.0, "uniform": 0.0, "dropout": 0.0}], "in that order, got l2, l1"),
        ([{**VALUES[0], "l1": np.ones(2)}], "l1 must be a number in all losses"),
        ([VALUES[0], {**VALUES[1], "l2": 1.0}], "vector of one length"),
        ([{**VALUES[0], "l1": np.nan}], "l1 must be finite and at least 0, got nan"),
        ([{**VALUES[0], "l2": np.array([1.0, -2.0])}], "l2 must be finite and at least 0, got -2"),
    ],
)
def test_bad_coefficients(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Coefficients.of(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.randn(N)}, r"inputs must be \[R, n, d\]"),
        ({"labels": torch.zeros(R, N + 1, dtype=torch.int64)}, r"inputs must be \[R, n, d\]"),
        ({"labels": torch.zeros(R, N)}, "labels must be int64"),
        ({"labels": torch.full((R, N), C)}, r"labels must lie in \[0, 3\)"),
        ({"inputs": torch.full((R, N, D), torch.nan)}, "inputs must be finite"),
        ({"classes": 1}, "at least 2 classes"),
        ({"masks": -1}, "masks must be at least 0"),
        ({"seeds": [1]}, "seeds must be one for each of 2"),
        ({"dtype": torch.float16}, "dtype must be float64 or float32"),
    ],
)
def test_bad_problems(change: dict[str, Any], message: str) -> None:
    inputs, labels = data()
    with pytest.raises(ValueError, match=message):
        SoftmaxRegression(**{"inputs": inputs, "labels": labels, "classes": C, **change})


def test_bad_losses() -> None:
    of, coefficients = problem(), Coefficients.of(VALUES)
    with pytest.raises(ValueError, match="multiple of 2 repetitions, got 3"):
        minimise(of, Coefficients.of(VALUES[:3]))
    with pytest.raises(ValueError, match="at most 5 groups, got 6"):
        minimise(of, Coefficients.of([{**v, "l2": np.ones(6)} for v in VALUES]))
    with pytest.raises(ValueError, match="dropout must be 0 without masks"):
        minimise(problem(masks=0), coefficients)
    for train in (minimise, adagrad):
        with pytest.raises(ValueError, match=r"start must have shape \[4, 3, 6\], got \[2, 3, 6\]"):
            train(of, coefficients, torch.zeros(2, 3, 6))
        with pytest.raises(ValueError, match="start must be finite"):
            train(of, coefficients, torch.full((4, 3, 6), torch.inf))
    with pytest.raises(ValueError, match="tolerance must be positive"):
        minimise(of, coefficients, tolerance=0.0)
    for options in ({"epochs": 0}, {"batch": 0}, {"rate": 0.0}):
        with pytest.raises(ValueError, match=f"adagrad: {next(iter(options))} must be"):
            adagrad(of, coefficients, **options)
    with pytest.raises(ValueError, match="metric must be one of"):
        measure(of, weights(), coefficients, data(17, 8), "newton")
    with pytest.raises(ValueError, match="valid must be of 2 repetitions, got 1"):
        measure(of, weights(), coefficients, (torch.ones(4, D), torch.zeros(4, dtype=torch.int64)), "full")


def test_dropout_without_masks_is_for_adagrad() -> None:
    found, same = (adagrad(problem(masks=m), Coefficients.of(VALUES), epochs=1) for m in (0, 2))
    assert torch.equal(found, same)


def test_default_device_and_dtype_do_not_matter() -> None:
    (inputs, labels), valid = data(), data(17, 8)

    def results() -> list[Any]:
        of = SoftmaxRegression(inputs, labels, classes=C, dtype=torch.float32)
        coefficients = Coefficients.of(VALUES)
        found = minimise(of, coefficients, tolerance=1e-3).weights
        trained = adagrad(of, coefficients, epochs=1)
        told = [
            measure(of, found, coefficients, valid, m)[0].state_dict() for m in ("full", "diagonal", "gram")
        ]
        return [found, trained, *evaluate(found, valid), *(v for t in told for v in t.values())]

    expected = results()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = results()
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)
