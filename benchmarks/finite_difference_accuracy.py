"""How far the meta-gradient by finite differences is from the exact one, per kind of model.

    python benchmarks/finite_difference_accuracy.py

In float32, of the second step, whose distance the first one has found; the exact one is in float64. Ten seeds and three
learning rates. The recorded table is docs/results/finite-differences.md.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD

from lossmeta.adalfl.differentiable_step import DifferentiableStep
from lossmeta.adalfl.records import StepOptions
from lossmeta.losses import LossNetwork

SEEDS, RATES = range(10), (0.1, 0.01, 0.001)


class Transformer(nn.Module):
    """Two layers over four patches; its fused attention has no forward-mode derivative."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
        self.patches, self.last = nn.Conv2d(1, 16, 7, 7), nn.Linear(16, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        # The fused one has no second derivative either.
        with sdpa_kernel(SDPBackend.MATH) if x.dtype == torch.float64 else nullcontext():
            h: Tensor = self.encoder(self.patches(x).flatten(2).transpose(1, 2))
        return self.last(h.mean(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent, self.last = kind(14, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(x[:, 0])[0][:, -1])  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def convolution(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b))

        self.first, self.second, self.third = convolution(1, 16), convolution(16, 16), convolution(16, 16)
        self.relu, self.last = nn.ReLU(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        h = self.relu(h + self.third(self.relu(self.second(h))))
        return self.last(h.mean((2, 3)))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP, ReLU": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5)
    ),
    "convolutions, ReLU, max-pooling": lambda: nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 5),
    ),
    "residual, BatchNorm, ReLU": Residual,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "transformer, fused attention": Transformer,
    "MLP, tanh": lambda: nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.Tanh(), nn.Linear(64, 5)),
    "convolution, BatchNorm, SiLU": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(1152, 5)
    ),
    "convolution, GELU, LayerNorm": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.GELU(), nn.Flatten(), nn.LayerNorm(1152), nn.Linear(1152, 5)
    ),
}


def error(make: Callable[[], nn.Module], rate: float, seed: int) -> float:
    """Relative, of all gradients together."""
    torch.manual_seed(seed)
    model, loss = make(), LossNetwork(residual="cross_entropy")
    batches = [(torch.rand(32, 1, 14, 14), torch.randint(5, (32,))) for _ in range(4)]

    def step(net: nn.Module, learned: nn.Module, backend: str) -> DifferentiableStep:
        return DifferentiableStep(
            net, SGD(net.parameters(), rate), learned, F.cross_entropy, StepOptions(backend)
        )

    differences = step(model, loss, "finite_difference")
    differences([batches[0]], batches[1])
    exact = step(copy.deepcopy(model).double(), copy.deepcopy(loss).double(), "double_backward")
    wide = [(x.double(), y) for x, y in batches[2:]]
    found = differences([batches[2]], batches[3]).gradients
    expected = exact([wide[0]], wide[1]).gradients
    a, b = (torch.cat([g.double().flatten() for g in gs if g is not None]) for gs in (found, expected))
    return float((a - b).norm() / b.norm())


def main() -> None:
    torch.set_num_threads(1)
    print("| model | passes | " + " | ".join(f"lr {rate:g}: median, worst" for rate in RATES) + " |")
    print("| --- | --: |" + " --: |" * len(RATES))
    for name, make in MODELS.items():
        cells = []
        for rate in RATES:
            errors = [error(make, rate, seed) for seed in SEEDS]
            cells.append(f"{statistics.median(errors):.0e}, {max(errors):.0e}")
        print(f"| {name} | {1 if 'ReLU' in name else 2} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
