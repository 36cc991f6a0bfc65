"""Surfaces: the same losses as by hand, and nothing changed by looking."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surface_models import Observer, by_hand, cnn, images, mlp, samples
from torch import Tensor, nn

from lossmeta.landscape import exact_curvature, line, loss_surface, random_directions

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


def test_buffers_that_move_are_refused() -> None:
    model = Observer()
    with pytest.raises(
        ValueError, match=r"the loss must depend on the weights alone, got .* before and .* after"
    ):
        loss_surface(model, F.cross_entropy, samples(), span=5.0, points=5)
    assert float(model.largest) == 1


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


def test_weights_that_are_no_numbers_are_not_taken_for_merged_ones() -> None:
    model = nn.Sequential(Merging(4, 3), nn.Linear(3, 3)).double().eval().train()
    with torch.no_grad():
        model[1].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"eval\(\) must leave the weights as they are"):
        loss_surface(model, F.cross_entropy, samples(), points=3)
    Kind = type("Kind", (nn.Linear,), {"train": lambda self, mode=True: nn.Linear.train(self, mode)})
    model = nn.Sequential(Kind(4, 3)).double()
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    with pytest.warns(RuntimeWarning, match="got 9 points of 9 at which it is not"):
        loss_surface(model, F.cross_entropy, samples(), points=3)


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


@pytest.mark.parametrize("own", [None, torch.bfloat16])
def test_within_a_context_of_autocast(own: torch.dtype | None) -> None:
    """It keeps cast weights as long as it lasts, which are those of one point."""
    model, (x, y) = mlp().float(), samples()
    pair = (x.float(), y)
    expected = loss_surface(model, F.cross_entropy, pair, points=5, autocast=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(pair[0])
        found = loss_surface(model, F.cross_entropy, pair, points=5, autocast=own)
        assert torch.equal(model(pair[0]), before)
    torch.testing.assert_close(found.losses, expected.losses, rtol=2e-2, atol=2e-2)


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
