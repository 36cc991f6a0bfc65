from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from contract import (
    assert_close,
    check_compiles,
    check_gradients,
    check_half,
    check_opcheck,
    check_strides,
    check_threads,
    check_transforms,
    with_gradients,
)
from hypothesis import given
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lossmeta.ops import loss_network
from lossmeta.ops.loss_network import LINKS as NUMBERS
from lossmeta.ops.loss_network import _operator, _tables

# (N, C, H): one of everything; primes; few classes; rows longer than a tile (512) and odd widths.
SHAPES = [(1, 1, 1), (5, 3, 7), (33, 10, 40), (6, 100, 33), (2, 1300, 8)]
ACTIVATIONS = [("smooth_leaky_relu", "linear"), ("relu", "softplus"), ("smooth_leaky_relu", "softplus")]
LINKS = ["identity", "softmax", "sigmoid"]
SOFTMAX, SIGMOID = NUMBERS["softmax"], NUMBERS["sigmoid"]
TABLE = (300, 20)  # N·C above 4·2·(512 + 3)


def formula(
    pred: Tensor, target: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, link: str = "identity", leak: float = 0.01,
    smoothness: float = 10.0, hidden: str = "smooth_leaky_relu", output: str = "linear", ignore_index: int = -100,
    exact: bool = True, table_size: int = 512,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """AdaLFL Eq. 3 and 4, element by element of the hidden layers; the slope by autograd."""
    on_their_own = link == "sigmoid"
    kept = torch.ones(pred.shape, dtype=torch.bool)
    if not target.dtype.is_floating_point:
        kept = (target if on_their_own else target[:, None]).expand_as(pred) != ignore_index
        target = (target == 1 if on_their_own else target[:, None] == torch.arange(pred.shape[1])).to(
            pred.dtype
        )
    pred = torch.where(kept, pred, 0)

    def activation(x: Tensor) -> Tensor:
        if hidden == "relu":
            return torch.maximum(x, x * 0)
        return (1 - leak) / smoothness * torch.logaddexp(smoothness * x, torch.zeros_like(x)) + leak * x

    def loss(x: Tensor) -> Tensor:
        f = x.exp() / x.exp().sum(1, keepdim=True) if link == "softmax" else x
        f = 1 / (1 + (-x).exp()) if on_their_own else f
        first = [activation(w[0] * target + w[1] * f) for w in w1]
        second = [activation(sum(w * h for w, h in zip(row, first, strict=True))) for row in w2]  # type: ignore[arg-type]
        z = sum(w * h for w, h in zip(w3[0], second, strict=True))
        value: Any = torch.logaddexp(z, z * 0) if output == "softplus" else z  # type: ignore[call-overload]
        return (
            torch.where(kept, value, 0)
            if on_their_own
            else torch.where(kept, value, 0).sum(1) / pred.shape[1]
        )

    needs = pred.requires_grad
    x = pred if needs else pred.detach().requires_grad_()
    value = loss(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return value, torch.where(kept, slope, 0)


def weights(width: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    shapes = [(width, 2), (width, width), (1, width)]
    return [(scale * torch.randn(s, dtype=dtype) / s[1] ** 0.5).requires_grad_() for s in shapes]


def inputs(
    samples: int,
    classes: int,
    width: int,
    kind: str,
    dtype: torch.dtype = torch.float64,
    link: str = "softmax",
) -> Any:
    pred = (2 * torch.randn(samples, classes, dtype=dtype)).requires_grad_()
    target = torch.randn(samples, classes, dtype=dtype)
    if kind != "dense":
        link = "sigmoid" if kind == "labels" else link
        target = (
            torch.randint(2, (samples, classes)) if link == "sigmoid" else torch.randint(classes, (samples,))
        )
    return pred, target, weights(width, dtype)


@pytest.mark.parametrize(("hidden", "output"), ACTIVATIONS)
@pytest.mark.parametrize("kind", ["indices", "dense"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape: tuple[int, int, int], link: str, kind: str, hidden: str, output: str) -> None:
    pred, target, w = inputs(*shape, kind, link=link)
    if kind == "indices" and shape[0] > 1:
        target[1] = 7777
    options: Any = {"link": link, "hidden": hidden, "output": output, "ignore_index": 7777, "exact": True}
    actual = with_gradients(lambda x, *w: loss_network(x, target, *w, **options), pred, *w)
    expected = with_gradients(lambda x, *w: formula(x, target, *w, **options), pred, *w)
    assert_close(actual, expected, rtol=1e-10, atol=1e-13)
    single = with_gradients(
        lambda x, *w: loss_network(x, target if kind == "indices" else target.float(), *w, **options),
        *(t.detach().float().requires_grad_() for t in (pred, *w)),
    )
    for s, e in zip(single, expected, strict=True):
        assert_close(s, e.float(), rtol=1e-3, atol=1e-5 + 2e-5 * e.abs().max().item())


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("wanted", ["pred", "weights", "all"])
def test_each_gradient_alone(link: str, wanted: str) -> None:
    pred, target, w = inputs(9, 4, 8, "indices", link=link)
    variables = {"pred": [pred], "weights": w, "all": [pred, *w]}[wanted]
    u = torch.randn((9, 4) if link == "sigmoid" else 9, dtype=torch.float64)
    v = torch.randn(9, 4, dtype=torch.float64)
    for use in ((True, False), (False, True), (True, True)):
        results = []
        for function in (loss_network, formula):
            outputs = [o for o, used in zip(function(pred, target, *w, link=link), use, strict=True) if used]
            grads = [g for g, used in zip((u, v), use, strict=True) if used]
            results.append(torch.autograd.grad(outputs, variables, grads))
        assert_close(*results)


@pytest.mark.parametrize(("hidden", "output"), ACTIVATIONS)
@pytest.mark.parametrize("link", LINKS)
def test_derivatives(link: str, hidden: str, output: str) -> None:
    pred, target, w = inputs(3, 4, 5, "indices", link=link)
    options: Any = {"link": link, "hidden": hidden, "output": output}
    check_gradients(lambda x, *w: loss_network(x, target, *w, **options), pred, *w)


def test_second_derivative_runs_the_kernel() -> None:
    calls: list[tuple[str, list[bool]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "lossmeta" in str(f):
                calls.append((str(f), [a for a in args if isinstance(a, bool)][-4:]))
            return f(*args, **(kwargs or {}))

    pred, target, w = inputs(5, 3, 4, "indices")
    parameter = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    with Record():
        loss, _ = loss_network(pred @ parameter, target, *w, link="softmax")
        (g,) = torch.autograd.grad(loss.sum(), parameter, create_graph=True)
        assert len(calls) == 1  # the slope is the gradient
        actual = torch.autograd.grad(g.square().sum(), w)
    backward = "lossmeta.loss_network_backward.default"
    assert calls[1:] == [(backward, [False, True, True, True])]
    loss, _ = formula(pred @ parameter, target, *w, link="softmax")
    (g,) = torch.autograd.grad(loss.sum(), parameter, create_graph=True)
    assert_close(actual, torch.autograd.grad(g.square().sum(), w))


# ---- The table.


def table_of(pred: Tensor, target: Tensor, w: list[Tensor], table_size: int = 512) -> Tensor:
    link = SIGMOID if target.shape == pred.shape else SOFTMAX
    arguments = (pred, target, *w, None, link, True, 0.01, 10.0, False, -100, table_size)
    return torch.ops.lossmeta.loss_network(*arguments)[2].detach()


def is_accepted(table: Tensor) -> bool:
    return bool(table.numel()) and bool(table[-1] == 1)


@pytest.mark.parametrize("shape", [TABLE, (3, 2000), (700, 6), (4120, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_table_agrees_with_the_network(shape: tuple[int, int], dtype: torch.dtype, link: str) -> None:
    pred, target, w = inputs(*shape, 40, "indices", dtype, link)
    target[1] = -100
    assert is_accepted(table_of(pred, target, w))

    def run(exact: bool) -> Callable[..., Any]:
        return lambda x, *w: loss_network(x, target, *w, link=link, exact=exact)

    actual, expected = with_gradients(run(False), pred, *w), with_gradients(run(True), pred, *w)
    assert not all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    # loss, slope, gradient of pred (from both: through the curvature), of the weights
    bounds = (
        [1e-9, 1e-7, 1e-4, 1e-6, 1e-6, 1e-6]
        if dtype == torch.float64
        else [2e-6, 1e-5, 1e-3, 1e-4, 1e-4, 1e-4]
    )
    for a, e, bound in zip(actual, expected, bounds, strict=True):
        # A loss may cancel to little, and with one class every slope does to nothing.
        assert (a - e).abs().max() <= bound * e.abs().max() + (1e-12 if dtype == torch.float64 else 1e-6)


@given(scale=st.floats(0.1, 12), seed=st.integers(0, 1000), table_size=st.sampled_from([16, 100, 512]))
def test_table_keeps_its_bound_or_is_refused(scale: float, seed: int, table_size: int) -> None:
    torch.manual_seed(seed)
    w = weights(12, scale=scale)
    # One logit against zero: probabilities over all of [0, 1].
    p = torch.linspace(1e-6, 1 - 1e-6, 4120, dtype=torch.float64)
    pred = torch.stack([(p / (1 - p)).log(), torch.zeros_like(p)], 1)
    target = torch.arange(4120) % 2
    table = table_of(pred, target, w, table_size)
    _, tabulated = loss_network(pred, target, *w, link="softmax", table_size=table_size)
    _, exact = loss_network(pred, target, *w, link="softmax", exact=True)
    if not is_accepted(table):
        assert torch.equal(tabulated, exact)
        return
    # slope = p (1-p) (l'_1 - l'_2) / 2: each l' is within the bound of the largest.
    largest = 0.0
    for y in (0.0, 1.0):
        f = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]
        largest = max(largest, loss_network(f, torch.full_like(f, y), *w)[1].abs().max().item())
    error = ((tabulated - exact)[:, 0] / (p * (1 - p))).abs().max().item()
    assert error <= 2 * 1e-3 * largest


@pytest.mark.parametrize("factor", [1.0, 1.2, 1.4])
def test_derivatives_of_the_table_of_a_network_that_has_grown(factor: float) -> None:
    pred, target, _ = inputs(600, 10, 4, "indices")
    w = [factor * p.detach() for p in weights(40, scale=2**0.5)]
    w = [p.requires_grad_() for p in w]
    u = torch.randn_like(pred)
    found = []
    for exact in (False, True):
        _, slope = loss_network(pred, target, *w, link="softmax", table_size=256, exact=exact)
        found.append([slope, *torch.autograd.grad(slope, [pred, *w], u)])
    assert is_accepted(table_of(pred, target, w, 256))
    for (a, e), bound in zip(zip(*found, strict=True), (1e-3, 2e-2, 1e-2, 1e-2, 1e-2), strict=True):
        assert not torch.equal(a, e)
        assert (a - e).abs().max() <= bound * e.abs().max()


def test_table_is_refused_for_rough_networks_and_used_for_usual_ones() -> None:
    pred, target, _ = inputs(*TABLE, 4, "indices")
    for _ in range(5):  # Kaiming-normal: gain sqrt(2)
        assert is_accepted(table_of(pred, target, weights(40, scale=2**0.5)))
    for bad in (30.0, float("inf"), float("nan")):
        assert not is_accepted(table_of(pred, target, weights(40, scale=bad)))
    nan = weights(40, scale=float("nan"))
    assert all(o.isnan().all() for o in loss_network(pred, target, *nan, link="softmax"))


@pytest.mark.parametrize("samples", [8, 400])  # 400: from a table
def test_denormal_numbers_count_as_zero_inside_only(samples: int) -> None:
    # One operation on a denormal number costs a hundred others, and a confident softmax is full of them.
    pred, target, w = inputs(samples, 6, 40, "indices", torch.float32)
    tiny = 1e-39 * torch.randn_like(pred)
    _, slope = loss_network(pred, target, *w, link="softmax")
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(slope, w, tiny))
    assert bool((tiny * 0.5 != 0).all())


def test_where_there_is_no_table() -> None:
    pred, target, w = inputs(*TABLE, 8, "indices")
    dense = torch.nn.functional.one_hot(target, TABLE[1]).double()
    base = (SOFTMAX, True, 0.01, 10.0, False, -100, 512)  # link, smooth, ...
    for x, y, options in (
        (pred, dense, base),
        (pred, target, (NUMBERS["identity"], *base[1:])),
        (pred, dense, (SIGMOID, *base[1:])),
        (pred, target, (SOFTMAX, False, *base[2:])),
        (pred, target, (*base[:-1], 0)),
        (pred[:50], target[:50], base),
    ):
        assert torch.ops.lossmeta.loss_network(x, y, *w, None, *options)[2].numel() == 0
    assert table_of(pred, target, w).numel() == 5121
    assert_close(
        loss_network(pred, dense, *w, link="softmax"), loss_network(pred, target, *w, link="softmax")
    )


@pytest.mark.parametrize(
    ("outputs", "most", "intervals"),
    [
        *((599, 512, 0), (600, 512, 256), (1036, 512, 256), (1280, 512, 317), (9000, 512, 512)),
        *((600, 64, 64), (40, 16, 0), (76, 16, 16)),
    ],
)
def test_how_fine_the_table_is(outputs: int, most: int, intervals: int) -> None:
    pred, target, w = inputs(outputs, 1, 4, "indices", link="sigmoid")
    taken: list[int] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "lossmeta" in str(f):
                taken.append(args[-1])
            return f(*args, **(kwargs or {}))

    with Record(), torch.no_grad():
        loss_network(pred, target, *w, link="sigmoid", table_size=most)
    assert taken == [intervals]


def is_kept(w: list[Tensor]) -> bool:
    return w[0] in _tables and _tables[w[0]][2] is not None


def test_table_of_a_network_that_does_not_learn_is_kept_until_it_changes() -> None:
    pred, target, w = inputs(*TABLE, 8, "indices")
    w = [p.detach() for p in w]

    def run() -> list[Tensor]:
        return with_gradients(lambda x: loss_network(x, target, *w, link="softmax"), pred)

    first = run()
    assert not is_kept(w)  # it may be another network in every call
    for _ in range(2):
        assert all(map(torch.equal, run(), first))
        assert is_kept(w)
    for i in range(3):
        w[i].mul_(0.9)
        changed = run()
        assert not is_kept(w)
        fresh = [p.clone() for p in w]
        expected = with_gradients(lambda x, w=fresh: loss_network(x, target, *w, link="softmax"), pred)
        run()
        assert is_kept(w)
        assert all(map(torch.equal, changed, expected))
        assert all(map(torch.equal, run(), expected))
    # Of other weights, options, precision or size it is another one.
    table = _tables[w[0]][2]
    other = [w[0], w[1], 0.5 * w[2]]
    for x, weights_, options in (
        (pred, other, {}),
        (pred, w, {"leak": 0.2}),
        (pred, w, {"output": "softplus"}),
        (pred, w, {"table_size": 300}),
        (pred.detach().float(), w, {}),
    ):
        for _ in range(3):
            loss, _ = loss_network(x, target, *weights_, link="softmax", **options)
        exact, _ = loss_network(x, target, *weights_, link="softmax", exact=True, **options)
        assert_close(loss, exact, rtol=1e-4, atol=1e-6)
        assert _tables[w[0]][2] is not table


def test_changes_that_torch_does_not_count_are_seen() -> None:
    pred, target, w = inputs(*TABLE, 8, "indices", torch.float32)
    pred, w = pred.detach(), [p.detach() for p in w]

    def check() -> None:
        for _ in range(3):
            loss, _ = loss_network(pred, target, *w, link="softmax")
        assert is_kept(w)
        assert torch.equal(loss, loss_network(pred, target, *(p.clone() for p in w), link="softmax")[0])

    check()
    optimizer = torch.optim.Adam(w, 0.1, fused=True)
    versions = [p._version for p in w]
    for p in w:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert versions == [p._version for p in w]
    check()
    for p in w:
        p.data.mul_(0.9)
    check()
    for _ in range(20):  # the same memory again and again, with other values
        for p in w:
            p.data = p + 0.1 * torch.randn_like(p)
        check()


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_by_make_fx(mode: str) -> None:
    pred, target, w = inputs(*TABLE, 8, "indices")
    arguments = (pred.detach(), target, *(p.detach() for p in w))

    def run(x: Tensor, y: Tensor, *w: Tensor) -> Tensor:
        return loss_network(x, y, *w, link="softmax")[0]

    expected = [run(*arguments) for _ in range(3)][-1]
    assert_close(make_fx(run, tracing_mode=mode)(*arguments)(*arguments), expected)


def test_table_of_a_refused_network_is_kept_as_refused() -> None:
    pred, target, _ = inputs(*TABLE, 4, "indices")
    w = [p.detach() for p in weights(40, scale=30.0)]
    exact = loss_network(pred, target, *w, link="softmax", exact=True)
    for _ in range(3):
        assert all(map(torch.equal, loss_network(pred, target, *w, link="softmax"), exact))
    assert is_kept(w)
    assert not is_accepted(_tables[w[0]][2])


def test_where_no_table_is_kept() -> None:
    pred, target, w = inputs(*TABLE, 8, "indices")
    pred = pred.detach()
    frozen = [p.detach() for p in w]
    calls: list[Callable[[], Any]] = [
        lambda: loss_network(pred, target, *w, link="softmax"),  # it learns
        lambda: loss_network(pred, target, *frozen, link="softmax", exact=True),
        lambda: torch.func.grad(lambda x: loss_network(x, target, *frozen, link="softmax")[0].sum())(pred),
    ]
    for call in calls:
        for _ in range(3):
            call()
    with torch.inference_mode():
        for _ in range(3):
            loss_network(pred, target, *frozen, link="softmax")
    assert not is_kept(w)
    assert not is_kept(frozen)


def test_a_kept_table_that_does_not_fit_is_refused() -> None:
    pred, target, w = inputs(*TABLE, 8, "indices")
    options = (SOFTMAX, True, 0.01, 10.0, False, -100, 512)
    table = table_of(pred, target, w)
    for bad in (table[:-1], table.float(), table[None]):
        with pytest.raises(
            RuntimeError, match="loss_network: kept_table must be the one that the forward returned"
        ):
            torch.ops.lossmeta.loss_network(pred, target, *w, bad, *options)


def test_loss_of_the_table_has_the_slope_that_is_returned() -> None:
    pred, target, _ = inputs(*TABLE, 8, "indices")
    w, direction, step = weights(8, scale=0.3), torch.randn_like(pred), 1e-5
    assert is_accepted(table_of(pred, target, w, 32))

    def run(x: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        return loss_network(x, target, *w, link="softmax", table_size=32, exact=exact)

    difference = (run(pred + step * direction)[0] - run(pred - step * direction)[0]) / (2 * step)
    # Few intervals: the network's own slope is further away than the table's. (The median: the value is continuous
    # at the nodes only up to its error.)
    errors = [
        (difference - (run(pred, exact)[1] * direction).sum(1)).abs().median() for exact in (False, True)
    ]
    assert 3 * errors[0] < errors[1]


def test_gradients_of_the_table_are_those_of_what_it_returns() -> None:
    pred, target, _ = inputs(*TABLE, 8, "indices")
    w, step = weights(8, scale=0.3), 1e-5
    u, v = torch.randn(TABLE[0], dtype=torch.float64), torch.randn_like(pred)

    def objective(*w: Tensor, exact: bool = False) -> Tensor:
        loss, slope = loss_network(pred, target, *w, link="softmax", table_size=32, exact=exact)
        return loss @ u + (slope * v).sum()

    sums = [0.0, 0.0]
    for i in [0, 1, 2] * 4:
        direction = torch.randn_like(w[i])
        ends = [[p + s * direction if k == i else p for k, p in enumerate(w)] for s in (step, -step)]
        assert all(is_accepted(table_of(pred, target, end, 32)) for end in ends)
        with torch.no_grad():
            difference = (objective(*ends[0]) - objective(*ends[1])) / (2 * step)
        for k, exact in enumerate((False, True)):
            gradient = torch.autograd.grad(objective(*w, exact=exact), w[i])[0]
            sums[k] += (difference - (gradient * direction).sum()).abs().item()
    assert 3 * sums[0] < sums[1]


# ---- Values that are not ordinary.


def test_reference_ignores_what_it_is_told_to_and_shows_bad_labels() -> None:
    torch.manual_seed(0)
    pred, w = torch.randn(4, 3, dtype=torch.float64), weights(8)
    target = torch.tensor([0, 1, -100, 2])
    options = (SOFTMAX, True, 0.01, 10.0, False, 1, 0)
    loss, slope = _operator.reference(pred, target, *w, None, *options)
    assert loss.isnan().tolist() == [False, False, True, False]
    assert loss[1] == 0
    assert not slope[1:3].any()
    kernel, kernel_slope = loss_network(
        pred[[0, 1, 3]], target[[0, 1, 3]], *w, link="softmax", ignore_index=1, exact=True
    )
    assert_close((loss[[0, 1, 3]], slope[[0, 1, 3]]), (kernel, kernel_slope))


def test_empty() -> None:
    for target in (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5)):
        pred, w = torch.zeros(0, 5, requires_grad=True), weights(3, torch.float32)
        loss, slope = loss_network(pred, target, *w, link="softmax")
        assert loss.shape == (0,)
        assert slope.shape == (0, 5)
        for grad, t in zip(
            torch.autograd.grad([loss.sum(), slope.sum()], [pred, *w]), [pred, *w], strict=True
        ):
            assert_close(grad, torch.zeros_like(t))


@pytest.mark.parametrize("rows", [1, 100])  # without and with the table
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_and_nan_logits(dtype: torch.dtype, rows: int) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.randn(9, 50, dtype=dtype)
    x[0, 1] = -inf
    x[1, 0] = -inf  # the label's own logit
    x[2, 1] = inf
    x[3, 0] = inf
    x[4, 2] = nan
    x[5] = -inf
    x[6] = 1e4 * torch.randn(50, dtype=dtype)
    x[7] += 1e5
    x[8] = nan  # ignored
    target = torch.zeros(9, dtype=torch.int64)
    target[8] = -100
    w = weights(8, dtype)
    x, target = x.repeat(rows, 1), target.repeat(rows)
    assert is_accepted(table_of(x, target, w)) == (rows > 1)
    actual = loss_network(x, target, *w, link="softmax")
    reference = _operator.reference(x, target, *w, None, SOFTMAX, True, 0.01, 10.0, False, -100, 512)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5
    assert_close(actual, reference, rtol=tolerance, atol=tolerance)
    # An ignored row keeps its NaN out of the weights' gradients.
    grads = torch.autograd.grad(loss_network(x[6:9], target[6:9], *w, link="softmax")[1].sum(), w)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(("hidden", "output"), ACTIVATIONS)
def test_infinite_and_nan_predictions(hidden: str, output: str) -> None:
    pred = torch.tensor(
        [[float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 0.0]], dtype=torch.float64
    ).mT
    pred = pred.contiguous()
    for width in (5, 8):
        w = weights(width)
        options = (
            NUMBERS["identity"],
            hidden == "smooth_leaky_relu",
            0.01,
            10.0,
            output == "softplus",
            -100,
            512,
        )
        actual = loss_network(pred, torch.ones_like(pred), *w, hidden=hidden, output=output)
        assert_close(actual, _operator.reference(pred, torch.ones_like(pred), *w, None, *options))


# ---- What every operator promises.

CASES = [("indices", (6, 5)), ("dense", (6, 5)), ("indices", TABLE), ("labels", (6, 5)), ("labels", TABLE)]


def link_of(kind: str) -> str:
    return "sigmoid" if kind == "labels" else "softmax"


def function_of(target: Tensor, kind: str) -> Callable[..., Any]:
    return lambda x, *w: loss_network(x, target.to(x.device), *w, link=link_of(kind))


@pytest.mark.parametrize(("kind", "shape"), CASES, ids=str)
def test_contract(kind: str, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.float64):
        pred, target, w = inputs(*shape, 7, kind, dtype)
        tolerances = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
        check_strides(function_of(target, kind), pred, *w, **tolerances)
        check_compiles(function_of(target, kind), pred, *w, **tolerances)
        check_opcheck(
            _operator, pred, target, *w, None, NUMBERS[link_of(kind)], True, 0.01, 10.0, False, -100, 512
        )


def test_threads() -> None:
    for shape, link, exact in itertools.product([(2500, 3), (40, 700), (600, 40)], LINKS, (True, False)):
        pred, target, w = inputs(*shape, 9, "indices", torch.float32, link)
        check_threads(
            lambda x, *w, t=target, k=link, e=exact: loss_network(x, t, *w, link=k, exact=e), pred, *w
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "shape"), CASES, ids=str)
def test_half_precision(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    pred, target, w = inputs(*shape, 7, kind)
    link = link_of(kind)
    options = (NUMBERS[link], True, 0.01, 10.0, False, -100, 0)

    def composition(x: Tensor, y: Tensor, *w: Tensor) -> Any:
        return _half_composition(x, y, *w, link=link)

    check_half(lambda x, y, *w: loss_network(x, y, *w, link=link), composition, dtype, pred, target, *w)
    loss, slope = loss_network(pred.detach().to(dtype), target, *w, link=link)
    assert loss.dtype == slope.dtype == torch.float32
    exact = _operator.reference(pred.detach().to(dtype).double(), target, *w, None, *options)
    assert_close((loss, slope), [e.float() for e in exact], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_of_logits_is_rounded_once(dtype: torch.dtype) -> None:
    """Also for several cotangents at once, by either vmap."""
    pred, labels, weights = inputs(6, 4, 8, "indices")
    x, w = pred.detach().to(dtype).requires_grad_(), [p.detach().float() for p in weights]
    loss, slope = loss_network(x, labels, *w, link="softmax")
    cotangents = torch.randn(3, 6)
    expected = (cotangents[:, :, None] * slope).to(dtype)
    for k, g in enumerate(cotangents):
        (one,) = torch.autograd.grad(loss, x, g, retain_graph=True)
        assert one.dtype == dtype and torch.equal(one, expected[k])
    (legacy,) = torch.autograd.grad(loss, x, cotangents, is_grads_batched=True, retain_graph=True)
    (new,) = torch.func.vmap(lambda g: torch.autograd.grad(loss, x, g, retain_graph=True))(cotangents)
    assert torch.equal(legacy, expected) and torch.equal(new, expected)


def _half_composition(x: Tensor, y: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, link: str) -> Any:
    """As PyTorch would compute it in the dtype of ``x``."""
    f = x.softmax(1) if link == "softmax" else x.sigmoid()
    if not y.dtype.is_floating_point:
        y = (torch.nn.functional.one_hot(y, x.shape[1]) if link == "softmax" else y).to(x.dtype)

    def activation(a: Tensor) -> tuple[Tensor, Tensor]:
        return 0.99 * torch.nn.functional.softplus(a, 10.0, 40.0) + 0.01 * a, 0.99 * (10 * a).sigmoid() + 0.01

    h1, d1 = activation(torch.stack([y, f], -1) @ w1.mT)
    h2, d2 = activation(h1 @ w2.mT)
    value, slope = (h2 @ w3.mT).squeeze(-1), ((d2 * ((d1 * w1[:, 1]) @ w2.mT)) @ w3.mT).squeeze(-1)
    if link == "sigmoid":
        return value, slope * f * (1 - f)
    slope = slope / x.shape[1]
    return value.mean(1), f * (slope - (f * slope).sum(1, keepdim=True))


@pytest.mark.parametrize("output", [0, 1])
def test_transforms(output: int) -> None:
    _, target, w = inputs(4, 3, 5, "dense")
    w = [p.detach() for p in w]
    x = torch.randn(4, 3, dtype=torch.float64)
    options = (SOFTMAX, True, 0.01, 10.0, False, -100, 0)
    check_transforms(
        lambda x: loss_network(x, target, *w, link="softmax")[output].square().sum(),
        lambda x: _operator.reference(x, target, *w, None, *options)[output].square().sum(),
        x,
    )


def test_autocast() -> None:
    pred, target, w = inputs(6, 5, 7, "indices", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, slope = loss_network(pred, target, *w, link="softmax")
    assert_close((loss, slope), loss_network(pred, target, *w, link="softmax"))


def test_bad_input() -> None:
    pred, w = torch.randn(4, 3), weights(5, torch.float32)
    labels, dense = torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((torch.randn(4), labels, *w), r"pred must be \[N, C\] with at least one column, got \[4\]"),
        ((torch.randn(4, 0), labels, *w), r"with at least one column, got \[4, 0\]"),
        ((pred.long(), labels, *w), "pred must be float32, float64, bfloat16 or float16, got int64"),
        ((pred, labels[:3], *w), r"class indices must be \[4\], got \[3\]"),
        ((pred, labels.int(), *w), r"target must be class indices \(int64\) or floating-point, got int32"),
        ((pred, dense[:, :2], *w), r"a dense target must have the shape of pred, \[4, 3\], got \[4, 2\]"),
        ((pred, torch.tensor([0, 3, 0, 0]), *w), r"labels must lie in \[0, 3\), got 3 at index 1"),
        ((pred, torch.tensor([0, 0, -1, 0]), *w), r"labels must lie in \[0, 3\), got -1 at index 2"),
        ((pred, labels, w[0].mT, w[1], w[2]), r"input_weight must be \[H, 2\], got \[2, 5\]"),
        ((pred, labels, torch.zeros(0, 2), w[1], w[2]), r"input_weight must be \[H, 2\], got \[0, 2\]"),
        ((pred, labels, w[0], w[1][:4], w[2]), r"hidden_weight must be \[H, H\] with H = 5, got \[4, 5\]"),
        ((pred, labels, w[0], w[1], w[2][0]), r"output_weight must be \[1, H\] with H = 5, got \[5\]"),
        ((pred, labels, w[0].long(), w[1], w[2]), "input_weight must be float32.*, got int64"),
        ((pred, dense.clone().requires_grad_(), *w), "target must not require a gradient"),
        ((pred, labels, *(p.detach().to("meta") for p in w)), "must be on the same device"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=f"loss_network: .*{message}"):
            loss_network(*arguments)
    options: list[tuple[dict[str, Any], str]] = [
        ({"link": "probit"}, "link must be one of 'identity', 'softmax', 'sigmoid', got 'probit'"),
        ({"hidden": "tanh"}, "hidden must be one of 'smooth_leaky_relu', 'relu', got 'tanh'"),
        ({"output": "relu"}, "output must be one of 'linear', 'softplus', got 'relu'"),
        ({"leak": 1.5}, r"leak must lie in \[0, 1\], got 1.5"),
        ({"leak": float("nan")}, r"leak must lie in \[0, 1\], got nan"),
        ({"smoothness": 0.0}, "smoothness must be positive and finite, got 0.0"),
        ({"table_size": 8}, r"table_size must lie in \[16, 1024\], got 8"),
    ]
    for option, message in options:
        with pytest.raises(ValueError, match=f"loss_network: {message}"):
            loss_network(pred, labels, *w, **option)
    several: list[tuple[Tensor, str]] = [
        (labels, r"labels must have the shape of pred, \[4, 3\], got \[4\]"),
        (torch.full((4, 3), 2), r"labels must lie in \[0, 2\), got 2 at index 0"),
    ]
    for target, message in several:
        with pytest.raises(ValueError, match=f"loss_network: {message}"):
            loss_network(pred, target, *w, link="sigmoid")
    with pytest.raises(RuntimeError, match="loss_network: link must be 0, 1 or 2, got 3"):
        torch.ops.lossmeta.loss_network(pred, labels, *w, None, 3, True, 0.01, 10.0, False, -100, 0)
    with pytest.raises(RuntimeError, match=r"loss_network: table_size must lie in \[16, 1024\], got 5"):
        torch.ops.lossmeta.loss_network(pred, labels, *w, None, SOFTMAX, True, 0.01, 10.0, False, -100, 5)


@given(
    samples=st.integers(1, 6),
    classes=st.integers(1, 40),
    width=st.integers(1, 20),
    leak=st.floats(0, 1),
    smoothness=st.floats(0.1, 30),
    link=st.sampled_from(LINKS),
    seed=st.integers(0, 1000),
)
def test_any_input(
    samples: int, classes: int, width: int, leak: float, smoothness: float, link: str, seed: int
) -> None:
    torch.manual_seed(seed)
    pred, target, w = inputs(samples, classes, width, "dense")
    actual = with_gradients(
        lambda x, *w: loss_network(x, target, *w, link=link, leak=leak, smoothness=smoothness), pred, *w
    )
    options = (NUMBERS[link], True, leak, smoothness, False, -100, 512)
    expected = with_gradients(lambda x, *w: _operator.reference(x, target, *w, None, *options), pred, *w)
    assert_close(actual, expected, rtol=1e-9, atol=1e-11)
