"""The meta-gradient against full unrolling of the model and of the optimizer."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_problems import MODELS, OPTIMIZERS, batches, mlp, problem, relative_error, unrolled
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam

from lossmeta.adalfl import DivergedError, OnlineLearner, meta_gradient
from lossmeta.adalfl.differentiable_step import DifferentiableStep
from lossmeta.adalfl.records import StepOptions
from lossmeta.losses import LossNetwork

pytestmark = pytest.mark.filterwarnings("ignore:AdaLFL. the first step")

EXACT = ["double_backward", "jvp"]


# Unrolling a first adaptive step gives NaN where a gradient is 0, as dropout leaves some of the CNN.
CASES = [
    (model, optimizer, history)
    for model in MODELS
    for optimizer in OPTIMIZERS
    for history in (0, 3)
    if model == "mlp" or history or optimizer.startswith("sgd")
]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(("model", "optimizer", "history"), CASES)
def test_equals_full_unrolling(model: str, optimizer: str, history: int, backend: str) -> None:
    network, made, loss = problem(model, optimizer, history)
    train, valid = batches()
    random = torch.get_rng_state()
    expected = unrolled(network, made, loss, train, valid)
    torch.set_rng_state(random)
    result = meta_gradient(network, made, loss, F.cross_entropy, train, valid, backend=backend)
    assert result.backend == backend
    assert relative_error(result.gradients, expected) < 1e-10


def test_dropout_and_batch_norm_matter() -> None:
    # The equality above says something only if another mask would be noticed.
    network, made, loss = problem("cnn", "sgd", 0)
    train, valid = batches()
    expected = unrolled(network, made, loss, train, valid)
    result = meta_gradient(network, made, loss, F.cross_entropy, train, valid, backend="jvp")
    assert relative_error(result.gradients, expected) > 1e-3


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(
    "options",
    [{"clip_norm": 1e-3}, {"clip_norm": 1e3}, {"clip_value": 1e-3}, {"clip_norm": 1e-3, "clip_value": 1e-3}],
)
def test_clipping(options: dict[str, float], backend: str) -> None:
    network, _, loss = problem("mlp", "sgd", 0)
    # The optimizer's order is not the model's.
    made = SGD(list(network.parameters())[::-1], 0.1, momentum=0.9, nesterov=True)
    train, valid = batches()

    def change(g: Any) -> Any:
        if "clip_value" in options:
            g = [x.clamp(-options["clip_value"], options["clip_value"]) for x in g]
        if "clip_norm" in options:
            norm = torch.stack([x.square().sum() for x in g]).sum().sqrt()
            g = [x * (options["clip_norm"] / (norm + 1e-6)).clamp(max=1) for x in g]
        return g

    expected = unrolled(network, made, loss, train, valid, change)
    result = meta_gradient(network, made, loss, F.cross_entropy, train, valid, backend=backend, **options)
    assert relative_error(result.gradients, expected) < 1e-9


@pytest.mark.parametrize(("model", "bound"), [("mlp", 1e-3), ("cnn", 2e-2)])
@pytest.mark.parametrize("optimizer", ["sgd, nesterov", "adam"])
def test_finite_differences_in_float32(model: str, bound: float, optimizer: str) -> None:
    network, made, loss = problem(model, optimizer, 3)
    history = made.state_dict()
    network.float()
    loss.float()
    made = OPTIMIZERS[optimizer](network.parameters())
    made.load_state_dict(history)
    train, valid = batches(dtype=torch.float32)
    double = copy.deepcopy((network, made, loss))
    for module in (double[0], double[2]):
        module.double()
    state = {k: {n: v.double() if v.dim() else v for n, v in s.items()} for k, s in double[1].state.items()}
    double[1].state.update(state)
    random = torch.get_rng_state()
    expected = meta_gradient(
        *double, F.cross_entropy, *((x.double(), y) for x, y in (train, valid)), backend="jvp"
    ).gradients
    torch.set_rng_state(random)
    actual = meta_gradient(
        network, made, loss, F.cross_entropy, train, valid, backend="finite_difference"
    ).gradients
    assert relative_error(actual, [e.float() for e in expected]) < bound


class Subclass(LossNetwork):
    """The same loss, by a call and autograd."""


@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"exact": True}], ids=str)
@pytest.mark.parametrize("samples", [7, 400])  # 400: from a table
def test_a_loss_without_autograd_is_the_same(samples: int, options: dict[str, Any]) -> None:
    train, valid = ((torch.randn(samples, 64), torch.randint(3, (samples,))) for _ in range(2))
    model, loss = nn.Linear(64, 3), LossNetwork(8, **options)
    other = Subclass(8, **options)
    other.load_state_dict(loss.state_dict())
    assert loss.with_mixed_derivative(model(train[0]), train[1]) is not None
    results = []
    for module in (loss, other):
        net = copy.deepcopy(model)
        results.append(
            meta_gradient(
                net, SGD(net.parameters(), 0.1), module, F.cross_entropy, train, valid, backend="jvp"
            )
        )
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-6, atol=0)
    assert relative_error(results[0].gradients, results[1].gradients) < 1e-5  # type: ignore[arg-type]
    assert other.with_mixed_derivative(model(train[0]), train[1]) is None
    loss.register_forward_hook(lambda *_: None)
    assert loss.with_mixed_derivative(model(train[0]), train[1]) is None


# ---- Finite differences.


def spatial(*tail: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), *tail, nn.Linear(36, 3)
    )


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


@pytest.mark.parametrize(
    ("tail", "relaid"),
    [((nn.Flatten(),), True), ((View(),), False), ((nn.Dropout(0.3), nn.Flatten()), False)],
    ids=["flatten", "view", "dropout"],
)
def test_channels_last_where_the_model_allows_it(tail: tuple[nn.Module, ...], relaid: bool) -> None:
    network, loss = spatial(*tail), LossNetwork(8)
    train, valid = batches(dtype=torch.float32)
    layouts: list[bool] = []
    network[0].register_forward_hook(
        lambda m, i, o: layouts.append(
            o.is_contiguous(memory_format=torch.channels_last) and not o.is_contiguous()
        )
    )
    double = copy.deepcopy((network, loss))
    for module in double:
        module.double()
    step = DifferentiableStep(network, SGD(network.parameters(), 0.1), loss, F.cross_entropy)
    random = torch.get_rng_state()
    actual = step([train], valid).gradients
    # Training; validation, and push-forward at two distances or three; check.
    assert layouts[-1] is False and layouts[-4:-1] == [relaid] * 3
    assert False in layouts[-6:-4]
    torch.set_rng_state(random)
    expected = meta_gradient(
        double[0], SGD(double[0].parameters(), 0.1), double[1], F.cross_entropy,
        *((x.double(), y) for x, y in (train, valid)), backend="jvp",
    ).gradients  # fmt: skip
    assert relative_error(actual, [e.float() for e in expected]) < 5e-3  # type: ignore[union-attr]


def test_dropout_that_begins_later_keeps_its_masks() -> None:
    network, loss = spatial(nn.Dropout(0.3), nn.Flatten()).double(), LossNetwork(8).double()
    step = DifferentiableStep(network, SGD(network.parameters(), 0.1), loss, F.cross_entropy)
    train, valid = batches()
    network.eval()
    step([train], valid)
    network.train()
    other = copy.deepcopy(network)
    random = torch.get_rng_state()
    actual = step([train], valid).gradients
    torch.set_rng_state(random)
    optimizer = SGD(other.parameters(), 0.1)
    expected = meta_gradient(other, optimizer, loss, F.cross_entropy, train, valid, backend="jvp").gradients
    assert relative_error(actual, expected) < 1e-5  # type: ignore[arg-type]


def test_parameters_wherever_the_model_keeps_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(8, 5, batch_first=True)
            self.first = nn.Linear(5, 5)
            self.tied = nn.Linear(5, 5)
            self.tied.weight = self.first.weight
            self.last = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
            self.same = nn.Parameter(torch.zeros(7, 3))
            self.again = nn.Parameter(torch.zeros(7, 3))  # autograd gives both one gradient

        def forward(self, x: Tensor) -> Tensor:
            h = self.tied(self.first(self.recurrent(x.squeeze(1))[0][:, -1]).tanh())
            return self.last(h) + self.same + self.again

    network, loss = Model().double(), LossNetwork(8, dtype=torch.float64)
    weight = network.first.weight
    address, values = weight.data_ptr(), [p.clone() for p in network.parameters()]
    both = batches()
    results = []
    for backend in ("finite_difference", "double_backward"):
        model = network if backend == "finite_difference" else copy.deepcopy(network)
        with torch.no_grad():
            for p, value in zip(model.parameters(), values, strict=True):
                p.copy_(value)
        optimizer = SGD(model.parameters(), 0.1)
        results.append(
            meta_gradient(model, optimizer, loss, F.cross_entropy, *both, backend=backend).gradients
        )
    assert relative_error(results[0], results[1]) < 1e-6  # type: ignore[arg-type]
    assert weight.data_ptr() == address
    assert network.tied.weight is weight


def test_weights_and_gradients_of_zero() -> None:
    network, loss = nn.Linear(4, 3), LossNetwork(8)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    batch = torch.randn(5, 4), torch.randint(3, (5,))
    other = copy.deepcopy(network)
    results = [
        meta_gradient(
            n, SGD(n.parameters(), 0.1), loss, F.cross_entropy, batch, batch, backend=backend
        ).gradients
        for n, backend in ((network, "finite_difference"), (other, "jvp"))
    ]
    assert relative_error(results[0], results[1]) < 1e-3  # type: ignore[arg-type]
    flat = meta_gradient(
        network, SGD(network.parameters(), 0.1), loss, lambda x, y: 0 * x.sum(), batch, batch,
        backend="finite_difference",
    ).gradients  # fmt: skip
    assert all(bool((g == 0).all()) for g in flat)  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", [*EXACT, "finite_difference"])
@pytest.mark.parametrize("optimizer", ["sgd", "sgd, nesterov", "adam", "rmsprop"])
@pytest.mark.parametrize("model", MODELS)
def test_all_else_is_as_after_a_plain_step(model: str, optimizer: str, backend: str) -> None:
    network, made, loss = problem(model, optimizer, 2)
    train, valid = batches()
    plain, plain_made = copy.deepcopy((network, made))
    random = torch.get_rng_state()
    plain_made.zero_grad()
    loss(plain(train[0]), train[1]).backward()
    plain_made.step()
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    meta_gradient(network, made, loss, F.cross_entropy, train, valid, backend=backend)
    assert torch.equal(torch.get_rng_state(), after)
    for actual, expected in zip(network.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-16)
    assert len(made.state) == len(plain_made.state)
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        for name, value in made.state[p].items():
            torch.testing.assert_close(value, plain_made.state[q][name], rtol=1e-13, atol=1e-18)


def test_learning_rates() -> None:
    network, _, loss = problem("mlp", "sgd", 0)
    (w1, b1), (w2, b2) = ((m.weight, m.bias) for m in (network[1], network[3]))  # type: ignore[index]
    made = SGD([{"params": [w1, b1]}, {"params": [w2, b2], "lr": 0.3, "momentum": 0.9}], lr=0.1)
    train, valid = batches()

    def after(first: float, second: float) -> Tensor:
        net, opt = copy.deepcopy((network, made))
        opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = first, second
        loss(net(train[0]), train[1]).backward()
        opt.step()
        return F.cross_entropy(net(valid[0]), valid[1])

    h = 1e-5
    expected = [
        (after(0.1 + h, 0.3) - after(0.1 - h, 0.3)) / (2 * h),
        (after(0.1, 0.3 + h) - after(0.1, 0.3 - h)) / (2 * h),
    ]
    result = meta_gradient(network, made, loss, F.cross_entropy, train, valid, learning_rates=True)
    torch.testing.assert_close(result.learning_rate_gradients, expected, rtol=1e-6, atol=0)


# ---- What fails leaves everything as it was.


class Fails(nn.Module):
    """A task loss, or a model, that fails on a batch of another size."""

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("backend", [*EXACT, "finite_difference"])
@pytest.mark.parametrize("optimizer", ["sgd, nesterov", "adam"])
def test_a_failing_validation_undoes_the_step(optimizer: str, backend: str) -> None:
    network, made, loss = problem("cnn", optimizer, 2)
    before = copy.deepcopy((network.state_dict(), made.state_dict()))
    both = batches()
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        meta_gradient(network, made, loss, Fails(), *both, backend=backend)
    assert torch.equal(torch.get_rng_state(), random)
    for actual, expected in zip(network.state_dict().values(), before[0].values(), strict=True):
        assert torch.equal(actual, expected)
    for i, state in made.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, before[1]["state"][i][name])


def test_bad_input() -> None:
    network, made, loss = problem("mlp", "sgd", 0)
    train, valid = batches()

    def attempt(**changes: Any) -> None:
        arguments = {
            "model": network, "optimizer": made, "loss": loss, "task_loss": F.cross_entropy,
            "train_batch": train, "valid_batch": valid, **changes,
        }  # fmt: skip
        meta_gradient(**arguments)

    parameters = list(network.parameters())
    with pytest.raises(ValueError, match=r"but 3\.bias is missing; add it, or freeze it"):
        attempt(optimizer=SGD(parameters[:-1], 0.1))
    with pytest.raises(ValueError, match="of the model only, got another one of shape"):
        attempt(optimizer=SGD([*parameters, *loss.parameters()], 0.1))
    both = nn.ModuleDict({"network": network, "loss": loss})
    for held in (parameters, list(both.parameters())):
        with pytest.raises(
            ValueError,
            match=r"model must not hold parameters of the learned loss, got \['loss\.input_weight', .*alone",
        ):
            attempt(model=both, optimizer=SGD(held, 0.1))
    with pytest.raises(
        TypeError, match="must move every weight by its own gradient, and smoothly, got LBFGS"
    ):
        attempt(optimizer=torch.optim.LBFGS(parameters))
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'exact'"):
        attempt(backend="exact")
    with pytest.raises(ValueError, match=r"loss must reduce to a scalar .*, got \[7\]"):
        attempt(loss=LossNetwork(8, reduction="none", dtype=torch.float64))
    with pytest.raises(ValueError, match=r"task_loss must reduce to a scalar, got \[7\]"):
        attempt(task_loss=lambda x, y: F.cross_entropy(x, y, reduction="none"))
    with pytest.raises(ValueError, match="got none"):
        attempt(model=nn.Flatten(), optimizer=SGD([torch.zeros(1)], 0.1))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor) -> Any:
            return self.inner(x), x

    with pytest.raises(TypeError, match="the model must return a tensor, or output must say what of a tuple"):
        attempt(model=Pair())
    diverged = LossNetwork(8, dtype=torch.float64)
    with torch.no_grad():
        diverged.output_weight.fill_(float("nan"))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(
        DivergedError, match=r"the learned loss is nan on this batch, its slope .*; the step was not taken"
    ):
        attempt(loss=diverged)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "sgd, nesterov", "adam"])
def test_an_interruption_after_earlier_steps_undoes_the_whole_step(optimizer: str) -> None:
    network, made, loss = problem("mlp", optimizer, 0)
    step = DifferentiableStep(network, made, loss, F.cross_entropy)
    train, valid = batches()
    step([train], valid)
    before = copy.deepcopy((network.state_dict(), made.state_dict()))

    def interrupt(pred: Tensor, target: Tensor) -> Tensor:
        raise KeyboardInterrupt

    step.task_loss = interrupt
    with pytest.raises(KeyboardInterrupt):
        step([train], valid)
    torch.testing.assert_close(network.state_dict(), before[0], rtol=0, atol=0)
    torch.testing.assert_close(made.state_dict()["state"], before[1]["state"], rtol=0, atol=0)


def test_models_with_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.linear(x) * scale

    network, loss = Two(), LossNetwork(8)
    x, scale, y = torch.randn(5, 4), torch.randn(5, 1), torch.randint(3, (5,))
    results = []
    for inputs in ((x, scale), {"x": x, "scale": scale}):
        model = copy.deepcopy(network)
        optimizer = SGD(model.parameters(), 0.1)
        results.append(
            meta_gradient(model, optimizer, loss, F.cross_entropy, (inputs, y), (inputs, y)).gradients
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_first_adaptive_step_warns_where_it_is_the_only_one() -> None:
    model, loss = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), LossNetwork()
    train, valid = batches(2, torch.float32)
    optimizer = Adam(model.parameters())
    with pytest.warns(UserWarning, match="AdaLFL: the first step of Adam"):
        meta_gradient(model, optimizer, loss, F.cross_entropy, train, valid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meta_gradient(model, optimizer, loss, F.cross_entropy, train, valid)
        model.zero_grad()
        learner = OnlineLearner(model, Adam(model.parameters()), loss, F.cross_entropy)
        learner.step(train, valid)


BACKENDS = ("double_backward", "jvp", "finite_difference")


class Sum(nn.Module):
    """Autograd gives both parameters one tensor, or an expanded one."""

    def __init__(self, expanded: bool) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.rand(3, dtype=torch.float64)) for _ in range(2))
        self.expanded = expanded

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.expanded:
            return self.a.sum() * F.cross_entropy(pred, target)
        return F.cross_entropy((self.a + self.b) * pred, target)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_share_a_gradient(backend: str, expanded: bool) -> None:
    model, loss = mlp().double(), Sum(expanded)
    train, valid = batches()
    theta = dict(model.named_parameters())
    g = torch.autograd.grad(loss(model(train[0]), train[1]), list(theta.values()), create_graph=True)
    after = {name: p - 0.1 * d for (name, p), d in zip(theta.items(), g, strict=True)}
    value = F.cross_entropy(functional_call(model, after, (valid[0],)), valid[1])
    expected = torch.autograd.grad(value, list(loss.parameters()), allow_unused=True)
    optimizer = SGD(model.parameters(), 0.1)
    actual = meta_gradient(model, optimizer, loss, F.cross_entropy, train, valid, backend=backend).gradients
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12)


class Root(nn.Module):
    """Finite where its slope is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.a * (pred - pred.detach()).abs().sqrt().sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slope_that_is_not_finite_is_refused(backend: str) -> None:
    model = mlp().double()
    before = [p.clone() for p in model.parameters()]
    train, valid = batches()
    with pytest.raises(DivergedError, match="its slope not finite; the step was not taken"):
        meta_gradient(
            model, SGD(model.parameters(), 0.1), Root(), F.cross_entropy, train, valid, backend=backend
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.a + pred.sum()


def test_a_loss_whose_slope_no_parameter_changes() -> None:
    model = mlp().double()
    train, valid = batches()
    for backend in BACKENDS[1:]:
        optimizer = SGD(model.parameters(), 0.1)
        result = meta_gradient(model, optimizer, Constant(), F.cross_entropy, train, valid, backend=backend)
        assert result.gradients == [None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_hooks_and_changed_parameters_are_refused(backend: str) -> None:
    model, loss = mlp().double(), LossNetwork(8).double()
    train, valid = batches()
    last = list(model.parameters())[-1]
    step = DifferentiableStep(
        model, SGD(model.parameters(), 0.1), loss, F.cross_entropy, StepOptions(backend)
    )
    before = [p.clone() for p in model.parameters()]
    hook = last.register_hook(lambda g: g.clamp(-1, 1))
    for take in (lambda: step([train], valid), lambda: step.plain_step([train])):
        with pytest.raises(ValueError, match=r"must have no gradient hooks.*; to clip, use clip_norm"):
            take()
    hook.remove()
    last.requires_grad_(False)
    with pytest.raises(ValueError, match=r"must stay the same, got one of shape \[3\] that was frozen"):
        step([train], valid)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step = DifferentiableStep(
        model, SGD(model.parameters(), 0.1), loss, F.cross_entropy, StepOptions(backend)
    )
    step([train], valid)
    last.requires_grad_(True)
    with pytest.raises(ValueError, match="that was unfrozen since; make a new learner"):
        step([train], valid)


class Averaging(nn.Module):
    """Puts a new buffer in the place of the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp().double()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y - self.mean


def test_buffers_that_the_model_replaces() -> None:
    start, loss = Averaging(), LossNetwork(8).double()
    train, valid = batches()
    ends = []
    for backend in BACKENDS:
        model = copy.deepcopy(start)
        step = DifferentiableStep(
            model, SGD(model.parameters(), 0.1), loss, F.cross_entropy, StepOptions(backend)
        )
        step([train], valid)
        ends.append(model.mean)
    plain = copy.deepcopy(start)
    plain(train[0])
    for end in ends:
        torch.testing.assert_close(end, plain.mean)
        assert end.abs().max() > 0


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("option", ["clip_norm", "clip_value"])
def test_bounds_of_clipping(option: str, bound: float) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=f"AdaLFL: {option} must be positive, got"):
        DifferentiableStep(
            model,
            SGD(model.parameters(), 0.1),
            LossNetwork(),
            F.cross_entropy,
            StepOptions(**{option: bound}),
        )


class Upcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = [nn.Linear(512, 512), nn.ReLU()]
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), *wide, nn.Linear(512, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).float()


def test_finite_differences_of_a_model_that_computes_in_bfloat16() -> None:
    start, loss = Upcast(), LossNetwork(8)
    train, valid = ((torch.randn(64, 1, 8, 8), torch.randint(3, (64,))) for _ in range(2))
    found = []
    for backend, autocast in (("jvp", None), ("finite_difference", torch.bfloat16)):
        model = copy.deepcopy(start)
        step = DifferentiableStep(
            model,
            SGD(model.parameters(), 0.1),
            loss,
            F.cross_entropy,
            StepOptions(backend, autocast=autocast),
        )
        found.append(step([train], valid).gradients)
    assert relative_error(found[1], found[0]) < 0.03  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "of_loss"), [(torch.float64, torch.float32), (torch.float32, torch.float64)]
)
def test_a_loss_of_another_precision_than_the_model(dtype: torch.dtype, of_loss: torch.dtype) -> None:
    model, loss = mlp(), LossNetwork(8).double()
    train, valid = batches()
    expected = unrolled(model, SGD(model.parameters(), 0.1), loss, train, valid)
    model, loss = model.to(dtype), loss.to(of_loss)
    train, valid = [(x.to(dtype), y) for x, y in (train, valid)]
    optimizer = SGD(model.parameters(), 0.1)
    result = meta_gradient(model, optimizer, loss, F.cross_entropy, train, valid, backend="jvp")
    assert [g.dtype for g in result.gradients if g is not None] == [of_loss] * 3
    assert relative_error(result.gradients, expected) < 1e-4
