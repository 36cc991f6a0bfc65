"""The passes of a meta-step are one function, or the step says that they are not."""

from __future__ import annotations

# ruff: noqa: NPY002  (NumPy's global numbers are what is tested)
import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_problems import batches, cnn, equal, mlp, relative_error, values
from torch import Tensor, nn
from torch.optim import SGD

from lossmeta.adalfl import BackendError, OnlineLearner, meta_gradient
from lossmeta.losses import LossNetwork

BACKENDS = ("double_backward", "jvp", "finite_difference")
Contexts = Callable[[], Any]


def found(model: nn.Module, loss: nn.Module, pair: Any, **options: Any) -> Any:
    return meta_gradient(model, SGD(model.parameters(), 0.1), loss, F.cross_entropy, *pair, **options)


# ---- Autocast contexts around the step.


class Narrow(nn.Module):
    """Computes in the weights' dtype outside autocast."""

    def __init__(self, disables: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.disables = nn.Linear(64, 32), nn.Linear(32, 3), disables

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1)).tanh()
        with torch.autocast("cpu", enabled=not self.disables and torch.is_autocast_enabled("cpu")):
            return self.last(h.float() if self.disables else h)


@pytest.mark.parametrize("disables", [False, True])
@pytest.mark.parametrize("nested", [1, 2])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_a_context_around_the_step_is_the_option_of_its_dtype(
    backend: str, nested: int, disables: bool
) -> None:
    model, loss = Narrow(disables), LossNetwork(8)
    results = []
    for outer in (0, nested):
        torch.manual_seed(1)
        net, phi = copy.deepcopy((model, loss))
        one = OnlineLearner(
            net, SGD(net.parameters(), 0.5), phi, F.cross_entropy, backend=backend,
            meta_optimizer=SGD(phi.parameters(), 1.0), autocast=None if outer else torch.bfloat16,
        )  # fmt: skip
        reports = []
        for _ in range(3):
            pair = batches(dtype=torch.float32)
            if outer == 0:
                reports.append(one.step(*pair))
                continue
            with (
                torch.autocast("cpu", dtype=torch.bfloat16),
                torch.autocast("cpu", enabled=True, dtype=torch.bfloat16),
            ):
                net(pair[0][0])  # fills the cache with casts of the weights before the step
                reports.append(one.step(*pair))
        results.append([*values(net), *values(phi), *(r.task_loss for r in reports)])
    assert equal(*results)


def test_a_context_that_is_disabled_around_the_step_changes_nothing() -> None:
    pair = batches(dtype=torch.float32)
    model, loss = Narrow(), LossNetwork(8)
    expected = found(copy.deepcopy(model), loss, pair).gradients
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        actual = found(copy.deepcopy(model), loss, pair).gradients
    assert equal(actual, expected)


def test_the_validation_loss_under_an_outer_context_is_that_after_the_step() -> None:
    model, loss = Narrow(), LossNetwork(8, residual="cross_entropy")
    train, valid = batches(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = found(model, loss, (train, valid))
    after = F.cross_entropy(model(valid[0]), valid[1])
    assert abs(report.task_loss - after) < 1e-2


def test_a_float16_context_around_the_step_is_refused() -> None:
    model = Narrow()
    before = values(model)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(ValueError, match=r"torch.autocast\('cpu'\) around the step must be torch.bfloat16"),
    ):
        found(model, LossNetwork(8), batches(dtype=torch.float32))
    assert equal(values(model), before)


# ---- Random numbers from anywhere.


class Drops(nn.Module):
    """Stochastic depth with numbers of one of many sources."""

    def __init__(self, source: str, act: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(64, 16), act(), nn.Linear(16, 3)
        self.own = {
            "torch generator": torch.Generator().manual_seed(0),
            "Python generator": random.Random(0),
            "NumPy generator": np.random.default_rng(0),
            "NumPy RandomState": np.random.RandomState(0),
        }.get(source)
        self.listed = [{"rng": random.Random(1)}] if source == "in a list" else []
        self.source = source

    def draw(self) -> float:
        source: Any = self.own
        return float(
            {
                "Python": random.random,
                "NumPy": np.random.rand,
                "NumPy normal": lambda: abs(np.random.normal()) / 2,
                "torch": lambda: torch.rand(()),
                "torch generator": lambda: torch.rand((), generator=source),
                "in a list": lambda: self.listed[0]["rng"].random(),
            }.get(self.source, lambda: source.random() if hasattr(source, "random") else source.rand())()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        return self.last(self.act(h) * self.draw() + h * self.draw())


SOURCES = (
    "Python", "NumPy", "NumPy normal", "torch", "torch generator", "Python generator", "NumPy generator",
    "NumPy RandomState", "in a list",
)  # fmt: skip


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("backend", ["jvp", "finite_difference", "auto"])
def test_random_numbers_are_drawn_again(backend: str, source: str, act: type[nn.Module]) -> None:
    model, loss = Drops(source, act).double(), LossNetwork(8).double()
    truth, ends = [], []
    for name in ("double_backward", backend):
        net, phi = copy.deepcopy((model, loss))
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        np.random.normal()  # leaves a second normal number in store
        one = OnlineLearner(
            net,
            SGD(net.parameters(), 0.1),
            phi,
            F.cross_entropy,
            meta_optimizer=SGD(phi.parameters(), 0.1),
            backend=name,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for pair in [batches() for _ in range(3)]:
                one.step(*pair)
        truth.append([a - b for a, b in zip(values(phi), values(loss), strict=True)])
        ends.append(
            (random.random(), np.random.rand(), np.random.normal(), torch.rand(()).item(), net.draw())
        )
    assert relative_error(truth[1], truth[0]) < 1e-3
    assert ends[0][:4] == ends[1][:4]  # as a plain step leaves them
    assert abs(ends[0][4] - ends[1][4]) < 1e-12


def test_numpy_numbers_that_begin_later() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = mlp(), False

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (float(np.random.rand()) if self.scale else 1.0)

    model, loss = Later(), LossNetwork(8).double()
    one = OnlineLearner(model, SGD(model.parameters(), 0.1), loss, F.cross_entropy)
    assert one.step(*batches()).skipped is None
    model.scale = True
    assert "NumPy's random numbers" in str(one.step(*batches()).skipped)
    assert one.step(*batches()).skipped is None


class Hidden(nn.Module):
    """Draws from where nobody looks."""

    generator = random.Random(0)

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), act(), nn.Linear(12, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * type(self).generator.random()


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
def test_what_cannot_be_replayed_is_said(act: type[nn.Module]) -> None:
    train, valid = batches()
    loss = LossNetwork(8).double()
    model = Hidden(act)
    one = OnlineLearner(model, SGD(model.parameters(), 0.1), loss, F.cross_entropy)
    with pytest.warns(
        RuntimeWarning, match="gives way to double_backward: a repeated training pass gave another"
    ):
        one.step(train, valid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.step(train, valid)
    assert one.backend.startswith("double_backward: a repeated training pass gave another prediction")
    for backend in ("jvp", "finite_difference"):
        model = Hidden(act)
        before = values(model)
        with pytest.raises(
            BackendError, match=f"with backend='{backend}' a repeated training pass gave another"
        ):
            found(model, loss, (train, valid), backend=backend)
        assert equal(values(model), before)


def test_a_check_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hidden(nn.Tanh)
    monkeypatch.setattr(Hidden, "generator", type("Fixed", (), {"random": lambda self: 0.5})())
    one = OnlineLearner(
        model, SGD(model.parameters(), 0.01), LossNetwork(8).double(), F.cross_entropy, backend="jvp"
    )
    one.step(*batches())
    monkeypatch.setattr(Hidden, "generator", random.Random(0))
    one._step.steps = 99
    one.step(*batches())  # not looked at
    with pytest.raises(BackendError):
        one.step(*batches())


# ---- A backward pass that is another function's.


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Clipped(torch.autograd.Function):
    """Forward the identity, backward half of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 0.5 * g


MISMATCHED: dict[str, Callable[[Tensor], Tensor]] = {
    "straight-through function": Through.apply,
    "another slope": Clipped.apply,
    "straight-through by detach": lambda x: x + ((x * 4).round() / 4 - x).detach(),
    "fake quantisation": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.25, 0, -128, 127),
    "detached branch": lambda x: x * x.detach().abs().sqrt(),
}


class Quantised(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor], act: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.act, self.last, self.change = nn.Linear(64, 16), act(), nn.Linear(16, 3), change

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.change(self.first(x.flatten(1)))))


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("name", MISMATCHED)
@pytest.mark.filterwarnings("ignore:AdaLFL:RuntimeWarning")
def test_auto_follows_the_backward_pass(name: str, act: type[nn.Module]) -> None:
    model, loss = Quantised(MISMATCHED[name], act), LossNetwork(8)
    pair = batches(dtype=torch.float32)
    expected = found(copy.deepcopy(model), loss, pair, backend="double_backward").gradients
    result = found(copy.deepcopy(model), loss, pair)
    assert relative_error(result.gradients, expected) < 2e-2
    assert result.backend != "finite_difference"
    with pytest.raises(
        BackendError, match="the derivative of the forward pass and the backward pass disagree"
    ):
        found(copy.deepcopy(model), loss, pair, backend="finite_difference")


class Undifferentiable(torch.autograd.Function):
    """A backward pass that autograd does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(g.detach().numpy() * 2)


def test_a_backward_pass_that_autograd_does_not_see() -> None:
    model, loss = Quantised(Undifferentiable.apply, nn.Tanh), LossNetwork(8)
    pair = batches(dtype=torch.float32)
    double = copy.deepcopy((model, loss))
    double[0].change = lambda x: x * 2
    expected = found(double[0].double(), double[1].double(), [(x.double(), y) for x, y in pair]).gradients
    result = found(copy.deepcopy(model), loss, pair)
    assert result.backend == "finite_difference"
    assert relative_error(result.gradients, [e.float() for e in expected]) < 1e-2
    with pytest.raises(
        BackendError, match="backward pass cannot be differentiated, though it does not say so"
    ):
        found(copy.deepcopy(model), loss, pair, backend="double_backward")


# ---- What a pass changes beside the weights. The state of before enters the prediction, not that of this batch: that
# would be a detached branch.


class Queue(nn.Module):
    """A buffer that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("q", torch.zeros(0, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        old = self.q.mean(0) if len(self.q) else 0
        self.q = torch.cat([self.q, h.detach()])[-20:]
        return h - old


class Lazy(Queue):
    """A buffer that is None until the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.q = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        mean = h.detach().mean(0)
        old = 0 if self.q is None else self.q
        self.q = 0.9 * old + 0.1 * mean
        return h - old


class Attribute(nn.Module):
    """A running mean that is no buffer, one that appears with the first pass, a count, and a list."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.inner, self.q, self.count, self.in_place = (
            mlp(),
            torch.zeros(3, dtype=torch.float64),
            0,
            in_place,
        )
        self.seen: list[Tensor] = []
        self.named: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        mean = h.detach().mean(0)
        out = h - self.q - 0.1 * getattr(self, "late", 0) - 0.01 * self.count - 0.1 * sum(self.seen)
        if self.in_place:
            self.q.mul_(0.9).add_(mean, alpha=0.1)
        else:
            self.q = 0.9 * self.q + 0.1 * mean
        self.late = getattr(self, "late", 0) + mean
        self.count += 1
        self.seen.append(mean)
        self.named["last"] = mean
        return out


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "queue": Queue,
    "lazy": Lazy,
    "attribute": Attribute,
    "in place": lambda: Attribute(in_place=True),
    "cnn": cnn,
}


def state(model: nn.Module) -> list[Tensor]:
    kept = [model.q] if hasattr(model, "q") else []
    if isinstance(model, Attribute):
        kept += [model.late, torch.tensor(model.count), *model.seen, model.named["last"]]
    return [*values(model), *(t.clone() for t in kept)]


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_step_leaves_what_a_plain_step_leaves(name: str, backend: str) -> None:
    model, loss = STATEFUL[name](), LossNetwork(8).double()
    plain = copy.deepcopy(model)
    one = OnlineLearner(
        model, SGD(model.parameters(), 0.1), loss, F.cross_entropy,
        meta_optimizer=SGD(loss.parameters(), 0.0), backend=backend,
    )  # fmt: skip
    optimizer = SGD(plain.parameters(), 0.1)
    for _ in range(3):
        pair = batches()
        before = torch.get_rng_state()
        assert one.step(*pair).skipped is None
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        optimizer.zero_grad()
        loss(plain(pair[0][0]), pair[0][1]).backward()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), after)
        torch.testing.assert_close(state(model), state(plain))


@pytest.mark.parametrize("name", STATEFUL)
def test_the_meta_gradient_of_a_model_with_state(name: str) -> None:
    model, loss = STATEFUL[name](), LossNetwork(8).double()
    pairs = [batches() for _ in range(2)]
    results = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        net, phi = copy.deepcopy((model, loss))
        one = OnlineLearner(
            net, SGD(net.parameters(), 0.1), phi, F.cross_entropy,
            meta_optimizer=SGD(phi.parameters(), 0.01), backend=backend,
        )  # fmt: skip
        for pair in pairs:
            one.step(*pair)
        results.append([a - b for a, b in zip(values(phi), values(loss), strict=True)])
    for result in results[1:]:
        assert relative_error(result, results[0]) < 1e-4


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_failing_step_brings_all_of_it_back(name: str, backend: str) -> None:
    model, loss = STATEFUL[name](), LossNetwork(8).double()
    fails = False

    def task_loss(prediction: Tensor, target: Tensor) -> Tensor:
        if fails:
            raise KeyboardInterrupt
        return F.cross_entropy(prediction, target)

    one = OnlineLearner(model, SGD(model.parameters(), 0.1), loss, task_loss, backend=backend)
    for step in range(2):
        fails = True
        before = state(model) if step else values(model)
        attributes = sorted(model.__dict__)
        with pytest.raises(KeyboardInterrupt):
            one.step(*batches())
        torch.testing.assert_close(state(model) if step else values(model), before, rtol=0, atol=0)
        assert sorted(model.__dict__) == attributes
        fails = False
        one.step(*batches())


def test_a_forward_pass_that_changes_weights_is_refused() -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.inner[1].weight.clamp_(-0.1, 0.1)
            return self.inner(x)

    for backend in ("jvp", "finite_difference"):
        model = Clamped()
        before = values(model)
        with pytest.raises(
            ValueError, match=r"leave its trainable parameters as they are, .* changes inner\.1\.weight"
        ):
            found(model, LossNetwork(8).double(), batches(), backend=backend)
        assert equal(values(model), before)
