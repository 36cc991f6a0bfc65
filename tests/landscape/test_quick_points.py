"""Work that points are spared: the losses are those without it, and layers that do not qualify are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surface_models import samples
from torch import Tensor, nn

from lossmeta.landscape import _affine_layers, _points, loss_surface, random_directions
from lossmeta.landscape._affine_layers import AffineLayers

DTYPES = {torch.float32: 1e-6, torch.float64: 1e-12}
Found = list[AffineLayers | None]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Found:
    """What every surface has found."""
    kept: Found = []
    before = _points.Points._found_affine

    def noted(self: Any, coefficients: Tensor) -> AffineLayers | None:
        kept.append(before(self, coefficients))
        return kept[-1]

    monkeypatch.setattr(_points.Points, "_found_affine", noted)
    return kept


def layers(found: Found) -> list[nn.Module]:
    """Of the last surface, whose furthest point had nothing against them."""
    assert found[-1] is not None
    return [layer.module for layer in found[-1].layers]


def both(model: nn.Module, data: Any, loss: Any = F.cross_entropy, **options: Any) -> tuple[Tensor, Tensor]:
    """The losses without and with what is spared."""
    options = {"points": (5, 6), "directions": random_directions(model, biases=True), **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_points, "WORTH", 10**9)
        plain = loss_surface(model, loss, data, **options).losses
    return plain, loss_surface(model, loss, data, **options).losses


def close(pair: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(pair[1], pair[0], rtol=DTYPES[dtype], atol=0)


def wide(count: int = 20, inputs: int = 12, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(count, inputs).double(), torch.randint(classes, (count,))


def volume(dimensions: int, **options: Any) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    first = kind(2, 4, 3, padding=1, **options)
    return nn.Sequential(first, nn.ReLU(inplace=True), kind(4, 4, 3), nn.Flatten(), nn.LazyLinear(3))


class Derived(nn.Module):
    """Its first layer is given what the model makes of the inputs anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first((x - 0.5) / 2).tanh())


class Twice(nn.Module):
    """A layer that is called on inputs, on others, and on what depends on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(
            self.layer(x).tanh() + self.layer(x[:, :1].expand(-1, 12)) + self.layer(self.layer(x))
        )


class Tied(nn.Module):
    """The weight of its layer has another use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(12, 12, bias=False), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.layer(x).tanh(), self.layer.weight))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(inplace=True), nn.Linear(16, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (mlp, (12,), 1),
    "one layer": (lambda: nn.Linear(12, 3, bias=False), (12,), 1),
    "1-d": (lambda: volume(1, padding_mode="circular"), (2, 6), 1),
    "2-d": (lambda: volume(2, stride=2), (2, 8, 8), 1),
    "3-d": (lambda: volume(3), (2, 5, 5, 5), 1),
    "derived": (Derived, (12,), 1),
    "twice": (Twice, (12,), 1),
    "tied": (Tied, (12,), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_products(name: str, dtype: torch.dtype, found: Found) -> None:
    make, shape, count = MODELS[name]
    model, inputs = make().to(dtype), torch.randn(70, *shape, dtype=dtype)
    model(inputs)  # lazy layers
    target = torch.randint(3, (70,))
    close(both(model, (inputs, target), span=0.8), dtype)
    assert len(layers(found)) == count
    batches = [(inputs[:30], target[:30]), (inputs[30:], target[30:])]
    close(both(model, batches, span=0.8), dtype)
    assert [len([k for k in layer.kept if k]) for layer in found[-1].layers] == [6 if name == "twice" else 2]
    close(both(model, batches, directions=random_directions(model, 1), points=20), dtype)
    assert "forward" not in model.__dict__ and not any("forward" in m.__dict__ for m in model.modules())


def test_which_products_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = mlp().double(), wide()
    seen: list[int] = []
    linear = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(len(weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    loss_surface(model, F.cross_entropy, data, points=10)
    assert seen.count(3) > 100
    assert seen.count(16) <= 8  # the centre three times, the furthest point, and one for each term


def test_frozen_layers_and_directions_without_them(found: Found) -> None:
    model, data = mlp().double(), wide()
    model[0].requires_grad_(False)
    hook = model[0].register_forward_hook(lambda module, inputs, output: output.add_(0.1))
    close(both(model, data))
    hook.remove()
    assert layers(found) == [model[0]] and not found[-1].layers[0].kept[0].along  # type: ignore[union-attr]
    model.requires_grad_(True)[0].bias.requires_grad_(False)
    directions = random_directions(model)
    directions[0]["0.weight"].zero_()
    close(both(model, data, directions=directions))
    assert [k for k, _ in found[-1].layers[0].kept[0].along] == [1]  # type: ignore[union-attr]


class Hidden(nn.Module):
    """What its second layer is given depends on the weights, and no derivative says so."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(12, 40), nn.Linear(40, 3), how

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.how(self.first(x)))


@pytest.mark.parametrize("how", [Tensor.detach, torch.sign, lambda h: F.one_hot(h.argmax(1), 40).to(h)])
def test_what_is_detached_or_discrete_is_no_constant(how: Callable[[Tensor], Tensor], found: Found) -> None:
    model = Hidden(how).double()
    close(both(model, wide()))
    assert layers(found) == [model.first]


class Switching(nn.Module):
    """Its layer has the same input at the centre and the corners of a surface, and another between them."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.layer = nn.Parameter(torch.zeros(2, 2)), nn.Linear(12, 40)

    def forward(self, x: Tensor) -> Tensor:
        away = float(self.at.detach().abs().max())
        return self.layer(x * (2.0 if 0.1 < away < 0.5 else 1.0))


def test_every_point_compares_the_input(found: Found) -> None:
    model = Switching().double()
    directions = random_directions(model)
    for direction in directions:
        direction["at"] = torch.eye(2, dtype=torch.float64)
    directions[1]["at"] = directions[1]["at"].flip(0)
    pair = both(model, wide(), directions=directions, points=7)
    close(pair)
    assert layers(found) == [model.layer]


class Writing(nn.Module):
    """Its layer is given a buffer that is written anew, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(1, 1)), nn.Linear(12, 40)
        self.register_buffer("x", torch.zeros(20, 12))

    def forward(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.x.mul_((self.scale.detach() > 1.4).to(x) + 1)
        return self.layer(self.x)


def test_memory_that_is_written_again_is_another_input() -> None:
    model = Writing().double()
    directions = random_directions(model)
    directions[0]["scale"] = directions[1]["scale"] = torch.ones(1, 1).double()
    close(both(model, wide(), directions=directions, span=(-1.0, 0.45)))


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def closed_over() -> nn.Module:
    layer = nn.Linear(12, 3)
    before = layer.forward
    layer.forward = lambda x: 2 * before(x)  # type: ignore[method-assign]
    return layer


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(12, 3))


class Differentiating(nn.Module):
    """Its output is a derivative in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(12, 40), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.layer(x).tanh().sum(), x)
        return self.last(slope)


class Mapping(nn.Module):
    """It has its layer under ``vmap``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 40)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.layer)(x)


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(Own(12, 3)), closed_over, parametrized, Differentiating, Mapping]
)
def test_layers_that_do_not_qualify(make: Callable[[], nn.Module], found: Found) -> None:
    close(both(make().double(), wide()))
    assert not layers(found)


def test_lower_precision_has_products(found: Found) -> None:
    """Whose weights are rounded at every point."""
    x, y = wide()
    pair = both(mlp(), (x.float(), y), autocast=torch.bfloat16)
    assert torch.equal(*pair) and not layers(found)
    pair = both(mlp().bfloat16(), (x.bfloat16(), y))
    assert torch.equal(*pair) and found[-1] is None

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(x).float()

    pair = both(Inside(), (x.float(), y))
    assert torch.equal(*pair) and not layers(found)


def test_hooks_see_what_they_would_see(found: Found) -> None:
    model, data, seen = mlp().double(), wide(), []
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    model[0].register_forward_pre_hook(lambda module, inputs: (seen.append(1), inputs[0] * 3)[1])
    assert _affine_layers.FEWEST_OUTPUTS > 16
    close(both(model, data))
    assert len(seen) >= 60 and not layers(found)  # the input is made anew, for few outputs


def test_a_penalty_on_a_layer_moves_with_it(found: Found) -> None:
    model, data = mlp().double(), wide()

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target) + model[0].weight.square().sum()

    close(both(model, data, loss))
    assert layers(found) == [model[0]]


def test_points_that_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch, found: Found) -> None:
    """As those of large models."""
    model, data = mlp().double(), wide(80)
    whole = both(model, data)[0]
    monkeypatch.setattr(_points, "BYTES", 1)
    pair = both(model, data)
    close(pair)
    close((whole, pair[1]))
    assert layers(found) == [model[0]]


@pytest.mark.parametrize("refine", [None, 0.02])
def test_a_surface_that_goes_on_is_the_same(tmp_path: Path, refine: float | None) -> None:
    model, data, calls = mlp().double(), wide(80), 0
    options: Any = {"points": 33, "refine": refine, "directions": random_directions(model)}
    whole = both(model, data, **options)
    torch.testing.assert_close(*whole, rtol=1e-12, atol=1e-12)

    def once(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 70:
            raise KeyboardInterrupt
        return F.cross_entropy(prediction, target)

    path = tmp_path / "surface.safetensors"
    with pytest.raises(KeyboardInterrupt):
        loss_surface(model, once, data, path=path, **options)
    again = loss_surface(model, F.cross_entropy, data, path=path, **options)
    torch.testing.assert_close(again.losses, whole[1], rtol=1e-12, atol=1e-12)


def test_losses_without_a_derivative(found: Found) -> None:
    model, data = mlp().double(), wide(60)
    pair = both(model, data, lambda f, y: (f.argmax(1) != y).double().mean())
    assert torch.equal(*pair) and layers(found)


def test_terms_are_kept_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch, found: Found) -> None:
    x, y = wide(30)
    batches = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 30, 10)]
    model = mlp().double()
    monkeypatch.setattr(_affine_layers, "KEPT", 2 * 4 * 10 * 16 * 8)
    close(both(model, batches))
    assert [k is not None for k in found[-1].layers[0].kept] == [True, True, False]  # type: ignore[union-attr]
    monkeypatch.setattr(_affine_layers, "KEPT", 1000)
    close(both(model, batches))
    assert not layers(found)


def test_terms_that_are_not_finite_are_not_kept(found: Found) -> None:
    """An infinite input has a sign in the product, and none in the sum."""
    x, y = wide()
    x[0, 0] = torch.inf

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction[1:], target[1:]) + torch.tanh(prediction[0]).nan_to_num(9.0).sum()

    model = nn.Linear(12, 3).double()
    close(both(model, (x, y), loss))
    assert not layers(found)


def test_what_is_wrong_at_the_furthest_point_is_not_used(
    monkeypatch: pytest.MonkeyPatch, found: Found
) -> None:
    right = _affine_layers._Terms.sum
    monkeypatch.setattr(_affine_layers._Terms, "sum", lambda self, point: right(self, point) + 0.01)
    close(both(mlp().double(), wide()))
    assert found == [None]


class Contiguous(nn.Module):
    """It asks how the outputs of its layers lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(-1).view(len(x), 3)


def test_a_model_that_asks_how_tensors_lie_in_memory(found: Found) -> None:
    close(both(Contiguous().double(), wide(100)))
    assert found == [None]


def test_forward_comes_back_after_an_interrupt() -> None:
    model, calls = mlp().double(), 0

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return F.cross_entropy(prediction, target)

    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        loss_surface(model, loss, wide(), points=6)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(torch.equal(kept[n], t) for n, t in model.state_dict().items())


WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
LOSSES: dict[str, Any] = {
    "function": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2, weight=WEIGHT),
    "ignored": nn.CrossEntropyLoss(ignore_index=1),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "partial": partial(F.cross_entropy, label_smoothing=0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_class_by_class(name: str, found: Found) -> None:
    x, y = wide(90)
    close(both(mlp().double(), (x, y), LOSSES[name]))
    if name != "ignored":
        close(both(mlp().double(), (x, torch.rand(90, 3).double()), LOSSES[name]))
    batches = [(x[:80], y[:80]), (x[80:], y[80:])]
    close(both(mlp().double(), batches, LOSSES[name]))
    assert None not in found


@pytest.mark.parametrize("together", [False, True])
def test_points_that_do_not_fit_into_memory_are_halved(
    together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, sizes = mlp().double(), samples(), []
    model[0] = nn.Linear(4, 16).double()
    expected = loss_surface(model, F.cross_entropy, data, points=9).losses
    before, most = _points.Points._losses_together, 5

    def scarce(self: Any, made: Any, count: int) -> Tensor:
        sizes.append(count)
        if count > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return before(self, made, count)

    monkeypatch.setattr(_points.Points, "_losses_together", scarce)
    found = loss_surface(model, F.cross_entropy, data, points=9, together=together).losses
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert sizes[1:4] == ([64, 32, 16] if together else [])
    most = 0
    with pytest.raises(torch.OutOfMemoryError) if together else nullcontext():
        loss_surface(model, F.cross_entropy, data, points=9, together=together)


def test_a_model_that_is_sure_is_the_same_between_points(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its loss is as small as the rounding of its logits, which is another one class by class."""
    monkeypatch.setattr("lossmeta.landscape._surface_file.EVERY", 0)
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
        inputs = torch.randn(128, 20)
        labels = model(inputs).argmax(1)
        with torch.no_grad():
            for p in model[2].parameters():
                p.mul_(400)
        assert 0 < F.cross_entropy(model(inputs), labels) < 0.1
        directions = random_directions(model)
        loss_surface(
            model,
            F.cross_entropy,
            (inputs, labels),
            points=(5, 6),
            directions=directions,
            path=tmp_path / f"{seed}.safetensors",
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_alone(found: Found, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    data = torch.randn(128, 20, dtype=dtype), torch.randint(10, (128,))
    plain, quick = both(model, data)
    assert torch.equal(plain, quick)
    assert found[-1] is None
