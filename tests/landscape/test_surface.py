"""Surfaces: the same losses as by hand, nothing changed by looking, and nothing wrong drawn."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta.landscape import (
    LossSurface,
    _surface_file,
    exact_curvature,
    line,
    loss_surface,
    random_directions,
)


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def cnn() -> nn.Module:
    torch.manual_seed(1)
    layers = (
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    model = nn.Sequential(*layers).double()
    model(torch.randn(16, 2, 6, 6).double())  # running statistics that are not those of the start
    return model


def samples(count: int = 20) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(count, 4).double(), torch.randint(3, (count,))


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(12, 2, 6, 6).double(), torch.randint(3, (12,))


def by_hand(model: nn.Module, data: Any, directions: Any, a: float, b: float) -> float:
    """A copy that is moved and called."""
    moved = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, p in moved.named_parameters():
            for c, d in zip((a, b), directions, strict=False):
                p += c * d[name]
        return float(F.cross_entropy(moved(data[0]), data[1]))


MODELS: list[tuple[Callable[[], nn.Module], Callable[[], Any]]] = [(mlp, samples), (cnn, images)]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("make", "data"), MODELS, ids=["mlp", "cnn"])
def test_losses_are_those_by_hand(make: Any, data: Any, together: bool) -> None:
    model, pair = make(), data()
    directions = random_directions(model, seed=5)
    surface = loss_surface(
        model,
        F.cross_entropy,
        pair,
        directions=directions,
        span=((-1, 2), (-0.5, 0.5)),
        points=(4, 3),
        together=together,
    )
    assert (
        surface.x.tolist() == [-1, 0, 1, 2] and surface.y is not None and surface.y.tolist() == [-0.5, 0, 0.5]
    )
    assert surface.samples == len(pair[1]) and bool(surface.evaluated.all()) and surface.error == 0
    for i, a in enumerate(surface.x.tolist()):
        for j, b in enumerate(surface.y.tolist()):
            assert float(surface.losses[i, j]) == pytest.approx(
                by_hand(model, pair, directions, a, b), rel=1e-12
            )


def test_batches_of_unequal_size_are_one_mean() -> None:
    (x, y), model = samples(), mlp()
    whole = loss_surface(model, F.cross_entropy, (x, y), points=3)
    parts = loss_surface(model, F.cross_entropy, [(x[:3], y[:3]), (x[3:], y[3:])], points=3)
    once = loss_surface(model, F.cross_entropy, iter([(x[:3], y[:3]), (x[3:], y[3:])]), points=3)
    torch.testing.assert_close(whole.losses, parts.losses, rtol=1e-12, atol=0)
    assert torch.equal(parts.losses, once.losses)


def test_a_line_between_two_models() -> None:
    torch.manual_seed(0)
    one, other, pair = mlp(), mlp(), samples()
    with torch.no_grad():
        for p in other.parameters():
            p += torch.randn_like(p)
    surface = loss_surface(
        one, F.cross_entropy, pair, directions=[line(one, other)], span=(0.0, 1.0), points=5
    )
    assert surface.y is None and surface.losses.shape == (5,)
    assert float(surface.losses[-1]) == pytest.approx(
        F.cross_entropy(other(pair[0]), pair[1]).item(), rel=1e-12
    )


class Mapped(nn.Module):
    """Takes and gives mappings, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.inner(x)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


@pytest.mark.parametrize(
    "loss_fn", [None, lambda output, batch: F.cross_entropy(output.logits, batch["labels"])]
)
def test_batches_that_are_mappings(loss_fn: Any) -> None:
    x, y = samples()
    surface = loss_surface(Mapped(), loss_fn, [{"x": x, "labels": y}], points=3)
    one = loss_surface(Mapped(), loss_fn, {"x": x, "labels": y}, points=3)
    plain = loss_surface(mlp(), F.cross_entropy, (x, y), points=3)
    torch.testing.assert_close(surface.losses, plain.losses, rtol=1e-12, atol=0)
    assert torch.equal(surface.losses, one.losses)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("together", [False, True])
def test_tied_weights_move_together(together: bool) -> None:
    model, pair = Tied().double(), samples()
    directions = random_directions(model)
    surface = loss_surface(model, F.cross_entropy, pair, directions=directions, points=3, together=together)
    assert float(surface.losses[2, 0]) == pytest.approx(by_hand(model, pair, directions, 1, -1), rel=1e-12)


def test_frozen_weights_stay() -> None:
    model, pair = mlp(), samples()
    model[0].requires_grad_(False)
    directions = random_directions(model)
    assert set(directions[0]) == {"2.weight", "2.bias"}
    surface = loss_surface(model, F.cross_entropy, pair, directions=directions, points=3)
    full = [
        {**d, "0.weight": torch.zeros(6, 4).double(), "0.bias": torch.zeros(6).double()} for d in directions
    ]
    assert float(surface.losses[0, 2]) == pytest.approx(by_hand(model, pair, full, -1, 1), rel=1e-12)


class Copied(nn.Linear):
    """Its copies are itself."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def closed_over() -> nn.Module:
    """Its forward is a function that keeps the module's own."""
    model = mlp()
    before = model.forward
    model.forward = lambda x: 2 * before(x)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("make", [closed_over, lambda: nn.Sequential(Copied(4, 3).double())])
def test_models_that_keep_themselves(make: Any) -> None:
    model, pair = make(), samples()
    before = [p.clone() for p in model.parameters()]
    directions = random_directions(model, seed=1)
    surface = loss_surface(model, F.cross_entropy, pair, directions=directions, points=3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += directions[0][name] - directions[1][name]
        assert float(surface.losses[2, 0]) == pytest.approx(
            float(F.cross_entropy(model(pair[0]), pair[1])), rel=1e-12
        )


def test_a_penalty_on_the_weights_moves_with_them() -> None:
    model, (x, y) = mlp(), samples()

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target) + sum(p.square().sum() for p in model.parameters())

    directions = random_directions(model)
    surface = loss_surface(model, loss, (x, y), directions=directions, points=3)
    moved = [p.detach() + directions[0][n] + directions[1][n] for n, p in model.named_parameters()]
    expected = by_hand(model, (x, y), directions, 1, 1) + sum(float(p.square().sum()) for p in moved)
    assert float(surface.losses[2, 2]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(
        ValueError, match="with together=True the loss must come from the model's parameters alone"
    ):
        loss_surface(model, loss, (x, y), points=3, together=True)
    plain, whole = (exact_curvature(model, f, (x, y), directions) for f in (F.cross_entropy, loss))
    square = [sum(float((directions[i][n] * directions[i][n]).sum()) for n in directions[0]) for i in (0, 1)]
    for i in (0, 1):
        difference = float(whole.hessian[0, i, i] - plain.hessian[0, i, i])
        assert difference == pytest.approx(2 * square[i], rel=1e-9)


class Observer(nn.Module):
    """Remembers the largest output that it has seen, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("largest", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        self.largest = torch.maximum(self.largest, found.detach().abs().max())
        return found / self.largest


def test_buffers_that_move_are_refused() -> None:
    model = Observer()
    with pytest.raises(
        ValueError, match=r"the loss must depend on the weights alone, got .* before and .* after"
    ):
        loss_surface(model, F.cross_entropy, samples(), span=5.0, points=5)
    assert float(model.largest) == 1


def test_what_was_refused_is_not_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "surface.safetensors"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the loss must depend on the weights alone"):
            loss_surface(Observer(), F.cross_entropy, samples(), span=5.0, points=5, path=path)


class Merging(nn.Linear):
    """Merges in evaluation mode, as low-rank adapters do."""

    def train(self, mode: bool = True) -> Any:
        if self.training and not mode:
            self.weight.data += 1
        if mode and not self.training:
            self.weight.data -= 1
        return super().train(mode)


def test_a_model_that_merges_its_weights_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Merging(4, 3)).double()
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"eval\(\) must leave the weights as they are"):
        loss_surface(model, F.cross_entropy, samples(), points=3)
    torch.testing.assert_close(model[0].weight, before)
    assert model.training and model[0].training
    model.eval()
    assert len(loss_surface(model, F.cross_entropy, samples(), points=3).losses.unique()) > 3


def test_a_data_loader_draws_no_random_numbers() -> None:
    x, y = samples()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    model = mlp()
    before = torch.get_rng_state()
    loss_surface(model, F.cross_entropy, loader, points=3)
    assert torch.equal(before, torch.get_rng_state())


class Counting(nn.Module):
    """A loss with a buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(prediction, target)


def test_a_loss_is_as_before_too() -> None:
    loss = Counting().train()
    loss_surface(mlp(), loss, samples(), points=3)
    assert float(loss.calls) == 0 and loss.training


def state(model: nn.Module) -> list[Any]:
    values = [t.clone() for t in (*model.parameters(), *model.buffers())]
    return [*values, [m.training for m in model.modules()], torch.get_rng_state()]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("together", [False, True])
def test_everything_is_as_before(
    error: type[BaseException] | None, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pair, calls = cnn().train(), images(), 0
    model[3].eval()
    before, tensors = state(model), [p.data_ptr() for p in model.parameters()]

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if not together:  # vmap refuses random numbers
            torch.rand(1)
        if error is not None and calls == 4:
            raise error("stop")
        return F.cross_entropy(prediction, target)

    monkeypatch.setattr("lossmeta.landscape._points.MOST", 2)
    with pytest.raises(error) if error else nullcontext():
        loss_surface(model, loss, pair, points=3, together=together)
    assert same(state(model), before)
    assert [p.data_ptr() for p in model.parameters()] == tensors
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_autocast() -> None:
    model, (x, y) = mlp().float(), samples()
    pair = (x.float(), y)
    half = loss_surface(model, F.cross_entropy, pair, points=3, autocast=torch.bfloat16)
    full = loss_surface(model, F.cross_entropy, pair, points=3)
    assert not torch.equal(half.losses, full.losses)
    torch.testing.assert_close(half.losses, full.losses, rtol=2e-2, atol=2e-2)


# ---- Curvature.


class Graph(nn.Module):
    """Its prediction is a function of two weights."""

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.weight[0, 0], self.weight[1, 0]).expand(len(x))


def axes() -> list[dict[str, Tensor]]:
    return [{"weight": torch.tensor(v, dtype=torch.float64)} for v in ([[1.0], [0.0]], [[0.0], [1.0]])]


GRAPHS = {
    "plane": (lambda a, b: 2 * a - b + 1, lambda a, b: 0 * a),
    "paraboloid": (lambda a, b: (a**2 + b**2) / 2, lambda a, b: 1 / (1 + a**2 + b**2) ** 2),
    "saddle": (lambda a, b: a * b, lambda a, b: -1 / (1 + a**2 + b**2) ** 2),
    "sphere": (lambda a, b: (4 - a**2 - b**2).sqrt(), lambda a, b: 0.25 + 0 * a),
    "monge": (
        lambda a, b: a**3 - 3 * a * b**2,
        lambda a, b: -36 * (a**2 + b**2) / (1 + 9 * (a**2 + b**2) ** 2) ** 2,
    ),
}


def graph_surface(name: str, points: int) -> LossSurface:
    pair = torch.zeros(1, 1), torch.zeros(1)
    return loss_surface(
        Graph(GRAPHS[name][0]), lambda f, y: f.mean(), pair, directions=axes(), span=0.4, points=points
    )


@pytest.mark.parametrize("name", GRAPHS)
def test_curvature_of_known_surfaces(name: str) -> None:
    errors = []
    for points in (41, 81):
        surface = graph_surface(name, points)
        a, b = surface.x[1:-1, None], surface.y[None, 1:-1]  # type: ignore[index]
        errors.append(float((surface.curvature() - GRAPHS[name][1](a, b)).abs().max()))
    assert errors[1] < 1e-9 or errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # of second order
    assert surface.nonconvexity() == pytest.approx(float(surface.curvature().mean()))
    assert surface.mean_absolute_curvature() == pytest.approx(float(surface.curvature().abs().mean()))
    assert surface.saddle_share() == pytest.approx(float((surface.curvature() < 0).double().mean()))


@pytest.mark.parametrize("name", GRAPHS)
def test_exact_curvature_of_known_surfaces(name: str) -> None:
    at = torch.tensor([[0.0, 0.0], [0.3, -0.2], [0.1, 0.4]])
    pair = torch.zeros(1, 1), torch.zeros(1)
    found = exact_curvature(Graph(GRAPHS[name][0]), lambda f, y: f.mean(), pair, axes(), at)
    expected = GRAPHS[name][1](at[:, 0].double(), at[:, 1].double())
    torch.testing.assert_close(found.gaussian, expected, atol=1e-12, rtol=1e-12)


def test_exact_derivatives_are_those_of_autograd() -> None:
    model, pair = mlp(), samples()
    directions = random_directions(model, seed=4)
    names = dict(model.named_parameters())

    def f(c: Tensor) -> Tensor:
        weights = {
            n: p.detach() + c[0] * directions[0][n] + c[1] * directions[1][n] for n, p in names.items()
        }
        return F.cross_entropy(torch.func.functional_call(model, weights, (pair[0],)), pair[1])

    at = torch.tensor([[0.0, 0.0], [0.5, -0.7]], dtype=torch.float64)
    found = exact_curvature(model, F.cross_entropy, pair, directions, at)
    for i, c in enumerate(at):
        torch.testing.assert_close(found.loss[i], f(c).detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.gradient[i], torch.func.grad(f)(c), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found.hessian[i], torch.func.hessian(f)(c), rtol=1e-8, atol=1e-12)
    batches = [(pair[0][:3], pair[1][:3]), (pair[0][3:], pair[1][3:])]
    torch.testing.assert_close(
        exact_curvature(model, F.cross_entropy, batches, directions, at).gaussian, found.gaussian
    )


def test_a_line_has_no_curvature() -> None:
    model = mlp()
    surface = loss_surface(
        model, F.cross_entropy, samples(), directions=random_directions(model, 1), points=5
    )
    with pytest.raises(ValueError, match=r"curvature needs a plane of at least 3 × 3 points, got \[5\]"):
        surface.curvature()
    with pytest.raises(ValueError, match=r"got \[2, 2\]"):
        loss_surface(model, F.cross_entropy, samples(), points=2).nonconvexity()


# ---- Coarse to fine.


@pytest.mark.parametrize("points", [17, 51, (20, 33)])
def test_refining_evaluates_less_and_is_off_by_less_than_asked(points: Any) -> None:
    model, pair = mlp(), samples(100)
    whole = loss_surface(model, F.cross_entropy, pair, points=points, span=2.0)
    fine = loss_surface(model, F.cross_entropy, pair, points=points, span=2.0, refine=0.01)
    spread = float(whole.losses.max() - whole.losses.min())
    off = float((whole.losses - fine.losses).abs().max())
    assert off <= fine.error <= 0.01 * spread
    assert torch.equal(whole.losses[fine.evaluated], fine.losses[fine.evaluated])
    if points == 51:
        assert float(fine.evaluated.double().mean()) <= 0.25


def test_refining_finds_what_is_steep() -> None:
    """A ridge that bends in a few places alone."""
    pair = torch.zeros(1, 1), torch.zeros(1)
    model = Graph(lambda a, b: torch.sigmoid(60 * (a + 0.5 * b)))
    whole, fine = (
        loss_surface(model, lambda f, y: f.mean(), pair, directions=axes(), points=49, refine=r)
        for r in (None, 0.02)
    )
    assert float((whole.losses - fine.losses).abs().max()) < 0.02
    assert 0.1 < float(fine.evaluated.double().mean()) < 0.9


def test_refining_sees_by_chance_what_the_coarse_grid_misses() -> None:
    """A basin between the first points, which is flat outside."""
    pair = torch.zeros(1, 1), torch.zeros(1)
    model = Graph(lambda a, b: -torch.exp(-((a - 0.12) ** 2 + (b - 0.12) ** 2) / 0.02))
    whole, fine = (
        loss_surface(model, lambda f, y: f.mean(), pair, directions=axes(), points=51, refine=r)
        for r in (None, 0.01)
    )
    off = float((whole.losses - fine.losses).abs().max())
    assert off <= fine.error + 1e-12 or bool(fine.evaluated.all())


def test_refining_predicts_nothing_outside_the_range() -> None:
    pair = torch.zeros(1, 1), torch.zeros(1)
    model = Graph(
        lambda a, b: (
            torch.nn.functional.softplus(40 * (a - 0.03)) + torch.nn.functional.softplus(40 * (b - 0.1))
        )
    )
    fine = loss_surface(
        model, lambda f, y: f.mean(), pair, directions=axes(), span=3.0, points=51, refine=0.02
    )
    assert float(fine.losses.min()) >= 0


def test_refining_on_a_line_and_on_few_points() -> None:
    model = mlp()
    options: Any = {"directions": random_directions(model, 1), "points": 41}
    fine = loss_surface(model, F.cross_entropy, samples(), refine=0.01, **options)
    whole = loss_surface(model, F.cross_entropy, samples(), **options)
    assert float((whole.losses - fine.losses).abs().max()) < 0.01 * float(
        whole.losses.max() - whole.losses.min()
    )
    assert float(fine.evaluated.double().mean()) < 0.6
    few = loss_surface(model, F.cross_entropy, samples(), points=3, refine=0.01)
    assert bool(few.evaluated[::2, ::2].all())


# ---- Holes.


def holey(prediction: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(prediction, target)
    return torch.where(loss > 1.5, torch.nan, loss)


@pytest.mark.parametrize("refine", [None, 0.01])
def test_losses_that_are_not_finite_are_kept_and_counted(refine: float | None) -> None:
    with pytest.warns(
        RuntimeWarning, match=r"loss must be finite to be drawn, got \d+ points of 81 at which"
    ):
        surface = loss_surface(mlp(), holey, samples(), points=9, span=3.0, refine=refine)
    whole = loss_surface(mlp(), F.cross_entropy, samples(), points=9, span=3.0)
    high = whole.losses > 1.5
    assert 0 < surface.holes == int(high.sum()) < 81
    assert torch.equal(surface.losses.isnan(), high)
    assert bool(surface.evaluated.all())
    curvature = surface.curvature()
    assert 0 < int(curvature.isnan().sum()) < curvature.numel() and np.isfinite(surface.nonconvexity())


def test_infinite_losses_make_no_curvature() -> None:
    losses = torch.zeros(3, 3, dtype=torch.float64)
    losses[0, 0] = torch.inf
    line = torch.arange(3.0, dtype=torch.float64)
    surface = LossSurface(losses, line, line, losses.isfinite(), 1)
    assert surface.holes == 1 and bool(surface.curvature().isnan().all())
    assert np.isnan(surface.saddle_share())


# ---- Files.


def test_a_surface_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "surface.safetensors"
    surface = loss_surface(mlp(), F.cross_entropy, samples(), points=9, refine=0.2)
    surface.save(path)
    again = LossSurface.load(path)
    for name in ("losses", "x", "y", "evaluated"):
        assert torch.equal(getattr(again, name), getattr(surface, name))
    assert (again.error, again.samples) == (surface.error, surface.samples)


def interrupted(after: int) -> Callable[[Tensor, Tensor], Tensor]:
    calls = 0

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return F.cross_entropy(prediction, target)

    return loss


@pytest.mark.parametrize("refine", [None, 0.01])
def test_a_surface_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refine: float | None
) -> None:
    monkeypatch.setattr("lossmeta.landscape._points.MOST", 8)
    path = tmp_path / "surface.safetensors"
    options: Any = {"points": 21, "refine": refine, "path": path}
    with pytest.raises(KeyboardInterrupt):
        loss_surface(mlp(), interrupted(32), samples(), **options)
    with pytest.raises(ValueError, match="must be finished, got one that was stopped"):
        LossSurface.load(path)
    calls = 0

    def counted(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(prediction, target)

    whole = loss_surface(mlp(), F.cross_entropy, samples(), points=21, refine=refine)
    again = loss_surface(mlp(), counted, samples(), **options)
    assert torch.equal(again.losses, whole.losses) and torch.equal(again.evaluated, whole.evaluated)
    assert again.error == whole.error
    assert (
        3 < calls <= int(whole.evaluated.sum()) + 3 - 29
    )  # those that were finished, but for the centre's two
    assert torch.equal(LossSurface.load(path).losses, whole.losses)
    calls = 0
    loss_surface(mlp(), counted, samples(), **options)
    assert calls == 3  # at the centre, before and after


def test_a_line_of_another_direction_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "line.safetensors", mlp()
    for seed in (0, 1):
        options: Any = {"directions": random_directions(model, 1, seed=seed), "points": 3, "path": path}
        with pytest.raises(ValueError, match="differs in directions") if seed else nullcontext():
            loss_surface(model, F.cross_entropy, samples(), **options)


def test_a_path_that_cannot_be_written_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(prediction, target)

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"surface|file"):
        loss_surface(mlp(), counted, samples(), points=3, path=tmp_path / "file" / "surface")
    assert calls == 2
    write, count = _surface_file.write, 0

    def full(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(_surface_file, "write", full)
    with pytest.warns(
        RuntimeWarning, match="could not be written .*No space left.* the surface is returned all the same"
    ):
        surface = loss_surface(mlp(), F.cross_entropy, samples(), points=3, path=tmp_path / "surface")
    assert bool(surface.evaluated.all())


def test_a_file_of_another_surface_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "surface.safetensors", mlp()
    loss_surface(model, F.cross_entropy, samples(), points=3, path=path)
    kept = path.read_bytes()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight *= 2
    for changed, what in (
        ({"model": other}, "loss, weights"),
        ({"points": 5}, "axes"),
        ({"span": 0.5}, "axes"),
        ({"seed": 3}, "directions"),
        ({"data": samples(10)}, "samples"),
        ({"refine": 0.1}, "refine"),
    ):
        options: Any = {"model": model, "loss_fn": F.cross_entropy, "data": samples(), "points": 3, **changed}
        with pytest.raises(ValueError, match=f"must hold the same surface, got one that differs in .*{what}"):
            loss_surface(path=path, **options)
    assert path.read_bytes() == kept


def test_files_that_are_no_surfaces(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        LossSurface.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="got one that cannot be read"):
        LossSurface.load(path)
    with pytest.raises(ValueError, match="got one that cannot be read"):
        loss_surface(mlp(), F.cross_entropy, samples(), points=3, path=path)
    path.unlink()
    loss_surface(mlp(), F.cross_entropy, samples(), points=3, path=path)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole.replace(b'format\\": 1', b'format\\": 9')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot be read|must have format 1, got 9"):
            LossSurface.load(path)


# ---- What is refused.


class Drawing(nn.Module):
    """Draws random numbers in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.dropout(x, 0.5, training=True))


def cases() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    x, y = samples()
    directions = random_directions(mlp())
    empty, sparse, frozen, whole = nn.ReLU(), nn.Module(), mlp().requires_grad_(False), nn.Linear(4, 3)
    sparse.weight = nn.Parameter(torch.eye(3).to_sparse())
    complex_ = nn.Linear(4, 3, dtype=torch.complex64)
    nan = [{n: t * torch.nan for n, t in directions[0].items()}]
    zero = [{n: t * 0 for n, t in directions[0].items()}]
    part = [{"0.weight": directions[0]["0.weight"]}]
    yield (
        "no parameters",
        {"model": empty},
        ValueError,
        "must have parameters that require a gradient, got 0 frozen",
    )
    yield "frozen", {"model": frozen}, ValueError, "got 4 frozen ones and no other; call requires_grad_"
    yield "sparse", {"model": sparse}, ValueError, "dense and real, got weight, which is sparse_coo float32"
    yield "complex", {"model": complex_}, ValueError, "got weight, which is strided complex64"
    yield "meta", {"model": nn.Linear(4, 3, device="meta")}, ValueError, "got weight, which is meta"
    yield (
        "no loss",
        {"loss_fn": None},
        ValueError,
        "loss_fn must be given where the model's output has no loss",
    )
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[0].weight.data = shared[1].weight.data
    yield (
        "shared",
        {"model": shared},
        ValueError,
        "memory of their own, got 0.weight and 1.weight in the same",
    )
    yield "lazy", {"model": nn.LazyLinear(3)}, ValueError, "parameters must be initialised, got weight"
    yield "no batch", {"data": []}, ValueError, "data must hold at least one batch, got none"
    yield "no sample", {"data": (x[:0], y[:0])}, ValueError, "must hold at least one sample"
    yield "a tensor", {"data": x}, TypeError, r"data must be a pair \(inputs, target\) or batches.*got Tensor"
    yield "a number", {"data": 3}, TypeError, "got int"
    yield "no mean", {"loss_fn": nn.CrossEntropyLoss(reduction="none")}, ValueError, r"reduction='mean'"
    yield (
        "random",
        {"model": Drawing()},
        ValueError,
        "must be the same whenever it is evaluated, got .* random numbers",
    )
    yield "three", {"directions": directions * 2}, ValueError, "directions must be one or two, got 4"
    yield (
        "of another",
        {"directions": random_directions(whole)},
        ValueError,
        r"with others \['weight', 'bias'\]",
    )
    yield "a part", {"directions": part}, ValueError, r"\['0.bias', '2.weight', '2.bias'\] is missing"
    yield "nan", {"directions": nan}, ValueError, "directions must be finite, got direction 0"
    yield "zero", {"directions": zero}, ValueError, "must lead somewhere, got direction 0, which is 0"
    yield "points", {"points": 0}, ValueError, "points must be at least 1, got 0"
    yield "many points", {"points": (3, 3, 3)}, ValueError, "points must be one number or 2, got 3"
    yield (
        "span",
        {"span": 0.0},
        ValueError,
        "span must lead from a smaller to a larger finite number, got -0.0, 0.0",
    )
    yield (
        "spans",
        {"span": ((0, 1),) * 3},
        ValueError,
        "span must be a number, a pair, or a pair for each direction",
    )
    yield "infinite", {"span": float("inf")}, ValueError, "finite number"
    yield "refine", {"refine": 1.0}, ValueError, r"refine must lie in \(0, 1\), got 1.0"


CASES = list(cases())


@pytest.mark.parametrize(("given", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input(given: dict[str, Any], error: type[Exception], message: str) -> None:
    options: Any = {"model": mlp(), "loss_fn": F.cross_entropy, "data": samples(), "points": 3, **given}
    with pytest.raises(error, match=message):
        loss_surface(**options)


def test_bad_input_of_exact_curvature() -> None:
    model, pair = mlp(), samples()
    with pytest.raises(ValueError, match="exact_curvature: directions must be two, got 1"):
        exact_curvature(model, F.cross_entropy, pair, random_directions(model, 1))
    with pytest.raises(ValueError, match=r"at must have shape \[K, 2\], got \[2\]"):
        exact_curvature(model, F.cross_entropy, pair, random_directions(model), torch.zeros(2))
    with pytest.raises(ValueError, match="exact_curvature: directions must have a tensor like each"):
        exact_curvature(model, F.cross_entropy, pair, random_directions(nn.Linear(2, 2)))


def test_large_models_are_moved_without_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pair = mlp(), samples()
    chunked = loss_surface(model, F.cross_entropy, pair, points=3)
    monkeypatch.setattr("lossmeta.landscape._points.BYTES", 1)
    single = loss_surface(model, F.cross_entropy, pair, points=3)
    torch.testing.assert_close(chunked.losses, single.losses, rtol=1e-12, atol=0)


def test_progress_is_shown_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.progress

    seen: list[float] = []
    advance = rich.progress.Progress.advance
    monkeypatch.setattr(
        rich.progress.Progress, "advance", lambda self, task, n=1: (seen.append(n), advance(self, task, n))
    )
    loss_surface(mlp(), F.cross_entropy, samples(), points=3)
    assert seen == []
    loss_surface(mlp(), F.cross_entropy, samples(), points=3, progress=True)
    assert sum(seen) == 9


def test_no_warning_without_holes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_surface(mlp(), F.cross_entropy, samples(), points=3)
