"""Directions in which to leave a model's weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lossmeta._checks import check_at_least_one, choice

Direction = dict[str, Tensor]
"""A tensor for each trainable parameter, by its name."""

NORMALIZATIONS = {"filter": "filter", "layer": "layer", "none": "none"}


def inside(model: nn.Module) -> nn.Module:
    """Of ``DistributedDataParallel`` the module that it wraps, else the model."""
    found: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return found


def trainable(where: str, model: nn.Module) -> dict[str, Tensor]:
    """The parameters with ``requires_grad`` that have elements, by name, tied ones once.

    Args:
        where: who asks, for errors.
        model: of ``DistributedDataParallel`` the module inside counts.

    Raises:
        ValueError: where there are none, and where some are not initialised yet.
    """
    named = dict(inside(model).named_parameters())
    for name, p in named.items():
        if p.requires_grad and isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{where}: parameters must be initialised, got {name}, which is not yet; call the model once"
            )
    found: dict[str, Tensor] = {n: p for n, p in named.items() if p.requires_grad and p.numel()}
    if not found:
        raise ValueError(
            f"{where}: model must have parameters that require a gradient, got {len(named)} frozen or empty ones and "
            "no other; call requires_grad_() on what is to move"
        )
    return found


def _weights(where: str, model: nn.Module) -> Direction:
    return {name: p.detach() for name, p in trainable(where, model).items()}


def check_directions(where: str, parameters: Mapping[str, Tensor], directions: Sequence[Direction]) -> None:
    """That each has finite tensors of the shapes of the parameters, and is not 0."""
    for i, direction in enumerate(directions):
        wrong = [n for n, p in parameters.items() if n not in direction or direction[n].shape != p.shape]
        others = [n for n in direction if n not in parameters]
        if wrong or others:
            raise ValueError(
                f"{where}: directions must have a tensor like each trainable parameter, got direction {i}, in which "
                f"{wrong[:3]} is missing or has another shape, and with others {others[:3]}; make it of this model"
            )
        if not all(bool(t.isfinite().all()) for t in direction.values()):
            raise ValueError(f"{where}: directions must be finite, got direction {i}, which is not")
        if not any(bool(t.any()) for t in direction.values()):
            raise ValueError(f"{where}: directions must lead somewhere, got direction {i}, which is 0")


def random_directions(
    model: nn.Module,
    count: int = 2,
    *,
    normalization: str = "filter",
    biases: bool = False,
    seed: int = 0,
) -> list[Direction]:
    r"""Normal random directions, scaled so that models of different scale can be compared.

    With ``"filter"`` every filter :math:`d_{ij}` of a direction gets the norm of the filter of the weights,

    .. math:: d_{ij} \leftarrow \frac{d_{ij}}{\lVert d_{ij} \rVert} \lVert \theta_{ij} \rVert

    A filter is what one output depends on: a row of a matrix, a slice of a convolution. With ``"layer"`` the same is
    done with whole parameters. A filter of zeros has a direction of zeros.

    Args:
        model: only its trainable parameters get a direction.
        count: how many.
        normalization: ``"filter"``, ``"layer"`` or ``"none"``.
        biases: whether parameters with fewer than two dimensions move too, as biases and those of BatchNorm; they are
            scaled as one layer each. Li et al. leave them where they are.
        seed: of the numbers, which are the same on every device.

    Raises:
        ValueError: for options outside the values above and a model without trainable parameters.

    Source:
        Li, Xu, Taylor, Studer and Goldstein, "Visualizing the Loss Landscape of Neural Nets" (2018).

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> one, two = random_directions(model)
        >>> torch.testing.assert_close(one["weight"].norm(dim=1), model.weight.norm(dim=1))
        >>> one["bias"].tolist()
        [0.0, 0.0, 0.0]
    """
    where = "random_directions"
    check_at_least_one(where, "count", count)
    choice(where, "normalization", normalization, NORMALIZATIONS)
    weights = _weights(where, model)
    generator = torch.Generator("cpu").manual_seed(seed)
    found = []
    for _ in range(count):
        direction = {}
        for name, w in weights.items():
            # In float32 on the CPU, so that they depend on neither.
            drawn = torch.randn(w.shape, generator=generator, dtype=torch.float32, device="cpu")
            drawn = drawn.to(w.device, torch.promote_types(w.dtype, torch.float32))
            if w.dim() < 2 and not biases:
                drawn.zero_()
            elif normalization != "none":
                over = list(range(1, w.dim())) if normalization == "filter" and w.dim() > 1 else None
                drawn = drawn * _norm(w, over) / _norm(drawn, over).clamp_min(torch.finfo(torch.float32).tiny)
            direction[name] = drawn.to(w.dtype)
        found.append(direction)
    return found


def _norm(t: Tensor, over: list[int] | None) -> Tensor:
    t = t.to(torch.promote_types(t.dtype, torch.float32))  # squares of half precision leave its range
    if over is None:
        return t.norm()
    return t.square().sum(over, keepdim=True).sqrt()


def line(model: nn.Module, other: nn.Module | Mapping[str, Tensor]) -> Direction:
    """From a model to another of the same kind: at 0 it is the first one, at 1 the other.

    Only trainable parameters move. Where the other has other buffers, as BatchNorm's statistics, or frozen parameters,
    a warning says that the line does not end at it.

    Args:
        model: where the line begins.
        other: a model, or its state dict.

    Raises:
        ValueError: for another whose parameters have other names or shapes.

    Example:
        >>> one, other = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> torch.testing.assert_close(one.weight + line(one, other)["weight"], other.weight)
    """
    weights = _weights("line", model)
    state = other.state_dict() if isinstance(other, nn.Module) else other
    still = [
        name
        for name, t in inside(model).state_dict().items()
        if name not in weights and name in state and not torch.equal(t.cpu(), state[name].cpu())
    ]
    if still:
        warnings.warn(
            "line: the models must differ in trainable parameters alone for the line to end at the other, got other "
            f"{still[:3]}, which stay as they are",
            RuntimeWarning,
            stacklevel=2,
        )
    return {name: w - weights[name] for name, w in _of_state("line", weights, other).items()}


def _of_state(where: str, weights: Direction, other: nn.Module | Mapping[str, Tensor]) -> Direction:
    state = dict(inside(other).named_parameters()) if isinstance(other, nn.Module) else other
    wrong = [n for n, w in weights.items() if n not in state or state[n].shape != w.shape]
    if wrong:
        raise ValueError(
            f"{where}: the models must have the same parameters, got one in which {wrong[:3]} is missing or has "
            "another shape"
        )
    return {name: state[name].detach().to(w) for name, w in weights.items()}


@dataclass(frozen=True)
class Trajectory:
    """What :func:`pca_directions` finds.

    Attributes:
        directions: orthogonal, of Euclidean norm 1.
        coordinates: ``[T, count]`` of the checkpoints along them, from the model on; float64.
        explained: ``[count]``, the share of the variance in each.
    """

    directions: list[Direction]
    coordinates: Tensor
    explained: Tensor


def pca_directions(
    model: nn.Module, checkpoints: Sequence[nn.Module | Mapping[str, Tensor]], count: int = 2
) -> Trajectory:
    r"""The directions in which a training moved most: principal components of its weights about the model's.

    The components are those of the differences :math:`\theta_t - \theta`, not of differences from their mean: the plane
    goes through the model, as in Li et al., section 7.

    Args:
        model: usually the last.
        checkpoints: models or state dicts, T of them.
        count: of directions, at most T and the rank of the differences.

    Raises:
        ValueError: for fewer checkpoints than directions, for some that differ in parameters, and where the differences
            do not span as many directions.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> states = [{"weight": torch.tensor([[a, 0.0]]), "bias": torch.zeros(1)} for a in (1.0, 2.0, 4.0)]
        >>> path = pca_directions(model, states, count=2)
        >>> path.coordinates.shape
        torch.Size([3, 2])
    """
    where = "pca_directions"
    check_at_least_one(where, "count", count)
    if len(checkpoints) < count:
        raise ValueError(
            f"{where}: checkpoints must be at least count, got {len(checkpoints)} of them and count {count}"
        )
    weights = _weights(where, model)
    states = [_of_state(where, weights, c) for c in checkpoints]
    gram = torch.zeros(len(states), len(states), dtype=torch.float64, device="cpu")
    for name, w in weights.items():
        rows = torch.stack([(s[name] - w).flatten() for s in states]).double()
        gram += (rows @ rows.T).cpu()
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if not values[count - 1] > 1e-12 * values[0] or not values[0] > 0:
        rank = int((values > 1e-12 * values[0]).sum()) if values[0] > 0 else 0
        raise ValueError(
            f"{where}: the checkpoints must move in at least {count} directions, got {rank}; give more of them or a "
            "smaller count"
        )
    lengths = values[:count].sqrt()
    directions = []
    for k in range(count):
        along = vectors[:, k] / lengths[k]
        # The sign of an eigenvector is arbitrary: the first checkpoint lies on the negative side.
        along = -along if vectors[0, k] > 0 else along
        directions.append(
            {
                name: sum(
                    (a * (s[name] - w) for a, s in zip(along.tolist(), states, strict=True)),
                    torch.zeros_like(w),
                )
                for name, w in weights.items()
            }
        )
    signs = -torch.sign(vectors[0, :count])
    coordinates = vectors[:, :count] * lengths * torch.where(signs == 0, 1.0, signs)
    return Trajectory(directions, coordinates, values[:count] / values.sum())
