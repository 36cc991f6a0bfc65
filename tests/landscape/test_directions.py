"""Directions: their norms, their names, and the planes that a training spans."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lossmeta.landscape import line, pca_directions, random_directions


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    ).double()


def flat(direction: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in direction.values()])


def test_filters_have_the_norms_of_the_weights() -> None:
    """Beside a loop over filters."""
    model = cnn()
    with torch.no_grad():
        model[0].weight[2] = 0
    one, two = random_directions(model, seed=3)
    assert not torch.equal(flat(one), flat(two))
    for direction in (one, two):
        for name, p in model.named_parameters():
            if p.dim() < 2:
                assert not direction[name].any()
                continue
            for filter, weight in zip(direction[name], p, strict=True):
                assert filter.norm().item() == pytest.approx(weight.norm().item(), rel=1e-12)


def test_layers_and_biases() -> None:
    model = cnn()
    (direction,) = random_directions(model, 1, normalization="layer", biases=True)
    for name, p in model.named_parameters():
        assert direction[name].norm().item() == pytest.approx(p.norm().item(), rel=1e-12)
    (raw,) = random_directions(model, 1, normalization="none", biases=True)
    assert flat(raw).std().item() == pytest.approx(1.0, abs=0.1)
    (filtered,) = random_directions(model, 1, biases=True)
    assert filtered["0.bias"].norm().item() == pytest.approx(model[0].bias.norm().item(), rel=1e-12)


def test_the_seed_alone_decides() -> None:
    before = torch.get_rng_state()
    a, b, c = (
        flat(random_directions(nn.Linear(3, 2), 1, normalization="none", seed=s)[0]) for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    model = nn.Linear(3, 2)
    before = torch.get_rng_state()
    random_directions(model)
    assert torch.equal(before, torch.get_rng_state())


def test_frozen_parameters_have_no_direction() -> None:
    model = cnn()
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in random_directions(model)[0]
    with pytest.raises(
        ValueError, match="model must have parameters that require a gradient, got 6 frozen or empty"
    ):
        random_directions(model.requires_grad_(False))
    with pytest.raises(ValueError, match="random_directions: parameters must be initialised, got weight"):
        random_directions(nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"normalization": "model"}, "normalization must be one of .*, got 'model'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"random_directions: {message}"):
        random_directions(nn.Linear(2, 2), **options)


def test_half_precision_moves_every_filter() -> None:
    model = nn.Linear(64, 8).half()
    with torch.no_grad():
        model.weight[:4] *= 1e-3  # whose squares are 0
    (direction,) = random_directions(model, 1)
    torch.testing.assert_close(
        direction["weight"].float().norm(dim=1), model.weight.float().norm(dim=1), rtol=2e-2, atol=0
    )
    (wide,) = random_directions(nn.Linear(70_000, 2).half(), 1)
    assert bool((wide["weight"] != 0).any(1).all())


def test_a_line_that_does_not_end_at_the_other() -> None:
    one, other = cnn(), cnn()
    other[1].running_mean += 1
    with pytest.warns(
        RuntimeWarning, match=r"differ in trainable parameters alone .* \['1.running_mean'\], which stay"
    ):
        line(one, other)


def test_line() -> None:
    one, other = cnn(), cnn()
    direction = line(one, other)
    assert torch.equal(flat(direction), flat(line(one, other.state_dict())))
    for name, p in one.named_parameters():
        torch.testing.assert_close(p + direction[name], other.get_parameter(name))
    with pytest.raises(ValueError, match=r"line: the models must have the same parameters, .*'0.weight'"):
        line(one, nn.Linear(2, 2))


def test_principal_components() -> None:
    """Beside the singular values of the differences."""
    model = cnn()
    torch.manual_seed(0)
    states = []
    for _ in range(6):
        state = copy.deepcopy(model.state_dict())
        for name, _ in model.named_parameters():
            state[name] += torch.randn_like(state[name])
        states.append(state)
    found = pca_directions(model, states, 3)
    names = [n for n, _ in model.named_parameters()]
    rows = torch.stack([flat({n: s[n] - model.state_dict()[n] for n in names}) for s in states])
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(found.explained, values[:3] ** 2 / (values**2).sum())
    basis = torch.stack([flat(d) for d in found.directions])
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(
        (basis @ right[:3].T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-8, rtol=0
    )
    torch.testing.assert_close(found.coordinates, rows @ basis.T, atol=1e-9, rtol=0)
    assert bool((found.coordinates[0] <= 0).all())


def test_checkpoints_that_do_not_span_a_plane() -> None:
    model = nn.Linear(2, 1)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.weight += 1
    with pytest.raises(ValueError, match="checkpoints must be at least count, got 1 of them and count 2"):
        pca_directions(model, [moved])
    with pytest.raises(ValueError, match="must move in at least 2 directions, got 1"):
        pca_directions(model, [moved, moved, model])
    with pytest.raises(ValueError, match="must move in at least 1 directions, got 0"):
        pca_directions(model, [model, model], 1)
    with pytest.raises(ValueError, match="pca_directions: the models must have the same parameters"):
        pca_directions(model, [nn.Linear(3, 1), moved])
