"""One online step of AdaLFL (training step, meta-gradient, Adam on the loss) against a plain training step, against
unrolling as a user would write it, and against TorchOpt and higher where they are installed; on a GPU also as a CUDA
graph, against a plain step that is one.

Everybody trains the same model on the same batches of 128 with plain SGD, and learns the same loss network.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lossmeta.adalfl import OnlineLearner
from lossmeta.losses import LossNetwork

RATE, META_RATE = 0.01, 1e-5


def mlp(classes: int) -> nn.Module:
    sizes = [784, 256, 256, classes]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def cnn(classes: int, channels_last: bool = False) -> nn.Module:
    channels = [1, 16, 32, 64]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(channels):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, classes))
    return model.to(memory_format=torch.channels_last) if channels_last else model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "three convolutions, 10 classes": lambda: cnn(10),
    "the same in channels-last layout": lambda: cnn(10, channels_last=True),
    "784-256-256-10": lambda: mlp(10),
    "784-256-256-100": lambda: mlp(100),
}


class EagerNetwork(nn.Module):
    """The loss network in plain PyTorch."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.weights = nn.ParameterList(p.detach().clone() for p in LossNetwork().parameters())

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        def activation(x: Tensor) -> Tensor:
            return 0.99 * F.softplus(x, 10.0) + 0.01 * x

        y = F.one_hot(target, self.classes).to(pred.dtype)
        h = torch.stack([y, pred.softmax(1)], -1)
        w1, w2, w3 = self.weights
        return (activation(activation(h @ w1.mT) @ w2.mT) @ w3.mT).squeeze(-1).mean(1).mean()


def plain(device: Any, model: nn.Module, classes: int, train: Any, valid: Any) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()

    return step


def captured_plain(device: Any, model: nn.Module, classes: int, train: Any, valid: Any) -> Callable[[], None]:
    """The plain step as a CUDA graph, which reads the batches where it was captured."""
    inputs = [t.clone() for t in train]
    replay = device.captured(plain(device, model, classes, inputs, valid))

    def step() -> None:
        torch._foreach_copy_(inputs, list(train))
        replay()

    return step


def learned(device: Any, model: nn.Module, classes: int, train: Any, valid: Any) -> Callable[[], None]:
    """The learned loss without meta-updates."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    loss = LossNetwork().requires_grad_(False)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(train[0]), train[1]).backward()
        optimizer.step()

    return step


def unrolling(device: Any, model: nn.Module, classes: int, train: Any, valid: Any) -> Callable[[], None]:
    loss = EagerNetwork(classes)
    phi = list(loss.parameters())
    meta = torch.optim.Adam(phi, META_RATE)
    named = dict(model.named_parameters())

    def step() -> None:
        parameters = list(named.values())
        g = torch.autograd.grad(loss(model(train[0]), train[1]), parameters, create_graph=True)
        after = {name: p - RATE * d for (name, p), d in zip(named.items(), g, strict=True)}
        value = F.cross_entropy(functional_call(model, after, (valid[0],)), valid[1])
        for p, d in zip(phi, torch.autograd.grad(value, phi), strict=True):
            p.grad = d
        meta.step()
        with torch.no_grad():
            for p, a in zip(parameters, after.values(), strict=True):
                p.copy_(a)

    return step


def higher(device: Any, model: nn.Module, classes: int, train: Any, valid: Any) -> Callable[[], None]:
    library = pytest.importorskip("higher")
    loss = EagerNetwork(classes)
    meta = torch.optim.Adam(loss.parameters(), META_RATE)
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def step() -> None:
        meta.zero_grad()
        with library.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (inner, differentiable):
            differentiable.step(loss(inner(train[0]), train[1]))
            F.cross_entropy(inner(valid[0]), valid[1]).backward(inputs=list(loss.parameters()))
            with torch.no_grad():
                for p, a in zip(model.parameters(), inner.parameters(), strict=True):
                    p.copy_(a)
        meta.step()

    return step


def torchopt(device: Any, model: nn.Module, classes: int, train: Any, valid: Any) -> Callable[[], None]:
    library = pytest.importorskip("torchopt")
    loss = EagerNetwork(classes)
    meta = torch.optim.Adam(loss.parameters(), META_RATE)
    optimizer = library.MetaSGD(model, lr=RATE)

    def step() -> None:
        meta.zero_grad()
        optimizer.step(loss(model(train[0]), train[1]))
        F.cross_entropy(model(valid[0]), valid[1]).backward(inputs=list(loss.parameters()))
        meta.step()
        library.stop_gradient(model)
        library.stop_gradient(optimizer)

    return step


def online(
    device: Any, model: nn.Module, classes: int, train: Any, valid: Any, capture: bool = False
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    learner = OnlineLearner(model, optimizer, LossNetwork(), F.cross_entropy, capture=capture)

    def step() -> None:
        learner.step(train, valid)

    return step


def captured_online(
    device: Any, model: nn.Module, classes: int, train: Any, valid: Any
) -> Callable[[], None]:
    return online(device, model, classes, train, valid, capture=device.captures)


CANDIDATES = {
    "plain step": plain,
    "plain step with the learned loss": learned,
    "unrolling": unrolling,
    "higher": higher,
    "TorchOpt": torchopt,
    "lossmeta": online,
    "captured plain step": captured_plain,
    "lossmeta captured": captured_online,
}
EAGER = [name for name in CANDIDATES if "captured" not in name]
GPU_CANDIDATES = ["plain step", "captured plain step", "lossmeta", "lossmeta captured", *EAGER[1:-1]]
BY_DEVICE = {"cpu": EAGER, "cuda": GPU_CANDIDATES, "dry": GPU_CANDIDATES}
GPU_MODELS = ["784-256-256-10", "three convolutions, 10 classes"]
NAMES = {"cpu": list(MODELS), "cuda": GPU_MODELS, "dry": GPU_MODELS}
SAMPLES = {"cpu": [128], "cuda": [128], "dry": [8]}
NO_GRAPH = {
    "lossmeta": "the host looks at the losses",
    "lossmeta captured": "it is one already",
    "captured plain step": "it is one already",
}


@pytest.mark.by_device("candidate", BY_DEVICE)
@pytest.mark.by_device("name", NAMES)
@pytest.mark.by_device("samples", SAMPLES)
def test_online_step(name: str, candidate: str, samples: int, device: Any, measure: Any) -> None:
    def make() -> Callable[[], None]:
        torch.manual_seed(0)
        classes = 100 if name.endswith("100") else 10
        train, valid = (
            (torch.randn(samples, 1, 28, 28), torch.randint(classes, (samples,))) for _ in range(2)
        )
        return CANDIDATES[candidate](device, MODELS[name](), classes, train, valid)

    # The parameters are read by three passes over each batch, and their gradients and the step written.
    moved = 4 * sum(p.numel() for p in MODELS[name]().parameters()) * 8
    measure(
        lambda step: step(),
        lambda: (make(),),
        operator="online step of AdaLFL",
        size=name,
        candidate=candidate,
        bytes_moved=moved,
        no_graph=NO_GRAPH.get(candidate),
        peak_bytes=device.peak_memory(make),
    )
