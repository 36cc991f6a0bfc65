"""What trained softmax regressions say of their losses, in closed form: TuneLoss's statistics for B models at once."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmeta._batches import Batch
from lossmeta._checks import choice
from lossmeta.recipes._softmax_regression import (
    Coefficients,
    SoftmaxRegression,
    checked,
    group_of_feature,
    outputs_of,
    starting_weights,
    with_bias,
)
from lossmeta.recipes._softmax_regression_loss import MU, Loss, Scales, inner
from lossmeta.tuneloss import Measurement

METRICS = {"full": 10, "hyper": 30, "diagonal": 0, "gram": 0}  # iterations of conjugate gradients


@torch.no_grad()
def measure(
    problem: SoftmaxRegression,
    weights: Tensor,
    coefficients: Coefficients,
    valid: Batch,
    metric: str,
    iterations: int | None = None,
) -> list[Measurement]:
    """A measurement of each of B models, as :func:`lossmeta.tuneloss.measure` makes one.

    The Hessian of the training loss is the exact one. The validation error is the log loss.

    Args:
        problem: R repetitions.
        weights: [B, C, D], B = R V, trained.
        coefficients: of the losses that they were trained with.
        valid: inputs [R, m, d] and labels [R, m], or [m, d] and [m].
        metric: ``"full"``, ``"hyper"``, ``"diagonal"`` or ``"gram"``.
        iterations: of conjugate gradients; by default 10 for full and 30 for hyper.

    Raises:
        ValueError: for an unknown metric and shapes that do not fit.
    """
    usual = choice("measure", "metric", metric, METRICS)
    count = usual if iterations is None else iterations
    weights = starting_weights(problem, coefficients, weights)
    valid_inputs, valid_labels = checked(*valid, problem.classes)
    valid_inputs = with_bias(valid_inputs.to(problem.inputs))
    if len(valid_inputs) != problem.repetitions:
        raise ValueError(
            f"measure: valid must be of {problem.repetitions} repetitions, got {len(valid_inputs)}"
        )
    loss = Loss(problem, weights, Scales.of(problem, coefficients))
    features, task, jacobian = _features(loss, coefficients.l2.shape[1])
    error, gradient, probabilities = _validation(weights.flatten(0, 1), valid_inputs, valid_labels)
    gradient = gradient.view_as(loss.weights)
    found: dict[str, Tensor] = {}
    if metric == "gram":
        found["features"] = features
        columns = torch.cat([task[:, :, None], jacobian, gradient[:, :, None]], 2).flatten(3)
        found["gram"] = _symmetric(columns @ columns.mT)
    else:
        found["features"] = features
        diagonal = loss.hessian_diagonal()
        if metric == "full":
            moves = conjugate_gradients(loss, jacobian, diagonal, count)
            found["slope"] = -inner(moves, gradient[:, :, None])[..., 0, 0]
            found["curvature"] = _validation_curvature(moves, valid_inputs, probabilities)
        else:
            preconditioned = jacobian / diagonal[:, :, None]
            x = gradient / diagonal
            if metric == "hyper":
                x = conjugate_gradients(loss, gradient[:, :, None], diagonal, count)[:, :, 0]
            found["slope"] = -inner(jacobian, x[:, :, None])[..., 0, 0]
            found["curvature"] = _symmetric(preconditioned.flatten(3) @ jacobian.flatten(3).mT)
    arrays = {name: value.flatten(0, 1).double().cpu().numpy() for name, value in found.items()}
    return [
        Measurement(e, **{name: array[i] for name, array in arrays.items()})
        for i, e in enumerate(error.tolist())
    ]


def _features(loss: Loss, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values [R, V, 1 + k] and gradients [R, V, C, D] and [R, V, k, C, D]; the task's log loss is apart, and first."""
    problem, weights = loss.problem, loss.weights
    n, masks = problem.count, problem.masks
    device = weights.device
    share = weights.new_full((1, problem.inputs.shape[1], 1), 1 / n)
    share[:, n:] = 1 / (max(masks, 1) * n)
    slope = loss.probabilities.clone()
    slope.scatter_add_(-1, loss.labels, -torch.ones_like(slope))
    slope *= share[..., None]
    plain, dropped, alike = (torch.zeros_like(slope) for _ in range(3))
    plain[:, :n], dropped[:, n:] = slope[:, :n], slope[:, n:]
    alike[:, :n] = (loss.probabilities[:, :n] - 1 / problem.classes) / n
    task, uniform, dropout = loss.back(torch.stack([plain, alike, dropped], 3)).unbind(2)
    penalised = torch.ones(problem.width, dtype=weights.dtype, device=device)
    penalised[-1] = 0
    member = torch.nn.functional.one_hot(group_of_feature(problem.width, groups).to(device), groups).T.to(
        weights
    )
    member = member * penalised
    l1 = penalised * weights / loss.magnitude / n
    l2 = 2 * member[:, None] * weights[:, :, None] / n
    values = [
        (loss.of_label * share)[:, :n].sum(1)[..., None],
        (penalised * (loss.magnitude - MU)).sum((2, 3))[..., None] / n,
        weights.square().sum(2) @ member.T / n,
        loss.of_uniform[:, :n].mean(1)[..., None],
        (loss.of_label * share)[:, n:].sum(1)[..., None],
    ]
    jacobian = torch.cat([l1[:, :, None], l2, uniform[:, :, None], dropout[:, :, None]], 2)
    return torch.cat(values, -1), task, jacobian


def _validation(weights: Tensor, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log loss [B], its gradient [R, V C, D] and the probabilities [R, m, V, C]."""
    logs = outputs_of(weights, inputs).log_softmax(-1)
    index = labels[:, :, None, None].expand(*logs.shape[:3], 1)
    error = -logs.gather(-1, index)[..., 0].mean(1).flatten()
    probabilities = logs.exp()
    slope = probabilities.scatter_add(-1, index, -torch.ones_like(logs)) / inputs.shape[1]
    return error, slope.flatten(2).mT @ inputs, probabilities


def _validation_curvature(moves: Tensor, inputs: Tensor, probabilities: Tensor) -> Tensor:
    """[R, V, k, k], moves of the weights [R, V, k, C, D] times the validation Hessian times moves."""
    repetitions, losses, k, classes, width = moves.shape
    moved = (inputs @ moves.reshape(repetitions, -1, width).mT).view(*inputs.shape[:2], losses, k, classes)
    p = probabilities[:, :, :, None]
    centred = (moved - (p * moved).sum(-1, keepdim=True)) * p.sqrt()
    rows = centred.permute(0, 2, 3, 1, 4).reshape(repetitions, losses, k, -1)
    return _symmetric(rows @ rows.mT) / inputs.shape[1]


def conjugate_gradients(loss: Loss, rows: Tensor, diagonal: Tensor, iterations: int) -> Tensor:
    """H^-1 times rows [R, V, S, C, D], preconditioned by a diagonal [R, V, C, D]."""
    inverse = 1 / diagonal[:, :, None]
    tiny = torch.finfo(rows.dtype).tiny
    found, residual = torch.zeros_like(rows), rows
    z = inverse * residual
    direction, norm = z, inner(residual, z)
    for _ in range(iterations):
        product = loss.hessian_product(direction)
        curvature = inner(direction, product)
        length = torch.where((norm > tiny) & (curvature > tiny), norm / curvature.clamp(min=tiny), 0)
        found, residual = found + length * direction, residual - length * product
        z = inverse * residual
        new = inner(residual, z)
        direction, norm = z + torch.where(norm > tiny, new / norm.clamp(min=tiny), 0) * direction, new
    return found


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2
