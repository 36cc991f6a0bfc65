"""What a surface cannot be made of is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surface_models import mlp, samples
from torch import Tensor, nn

from lossmeta.landscape import loss_surface, random_directions


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
    yield (
        "frozen",
        {"model": frozen},
        ValueError,
        "got 4 frozen or empty ones and no other; call requires_grad_",
    )
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
