"""What a trained model says of its loss: the validation error, and how it moves with the loss's parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossmeta._batches import Batch
from lossmeta._checks import check_at_least_one, choice
from lossmeta._model_state import ModelState, RandomState, evaluating, refuse_shards
from lossmeta.tuneloss._box import Array, Values
from lossmeta.tuneloss._data_set import DataSet
from lossmeta.tuneloss._hessian import (
    Data,
    Linearised,
    NegativeCurvature,
    TrainingHessian,
    Weights,
    conjugate_gradients,
)
from lossmeta.tuneloss.features import uses_data
from lossmeta.tuneloss.loss import TunedLoss
from lossmeta.tuneloss.measurement import Measurement

METRICS = {name: name for name in ("auto", "full", "hyper", "diagonal", "gram")}
FULL_UP_TO = 20  # parameters, of which each costs a solve


def measure(
    model: nn.Module,
    loss: TunedLoss,
    values: Mapping[str, Any],
    train: Batch | Iterable[Batch],
    valid: Batch | Iterable[Batch],
    *,
    metric: str = "auto",
    iterations: int | None = None,
    damping: float = 0.01,
    hessian: str = "gauss_newton",
) -> Measurement:
    r"""What a model says that has been trained with a tuned loss, for :class:`TuneLoss`.

    Retraining with other parameters moves the weights by :math:`-H^{-1} J^\top d`, where d is the change of the
    parameters, :math:`J` [k, n] has the features' gradients and H is the Hessian of the training loss. With the
    gradient g and the Gauss-Newton curvature :math:`H_v` of the validation error, the error of the retrained model is
    near :math:`\tilde e + c^\top d + d^\top B d / 2`:

    * ``"full"``: :math:`R = J H^{-1}` by k solves in step, :math:`c = -R g`, :math:`B = R H_v R^\top`;
    * ``"hyper"``: one solve :math:`x = H^{-1} g`, :math:`c = -J x`, :math:`B = J D^{-1} J^\top`;
    * ``"diagonal"``: none, :math:`c = -J D^{-1} g`, :math:`B = J D^{-1} J^\top`;
    * ``"gram"``: neither; the Gram matrix of the gradients, for ``method="paper"``;
    * ``"auto"``: full up to 20 parameters, hyper above.

    D is an estimate of H's diagonal from 16 random probes, which preconditions the conjugate gradients, too. The
    validation error is the task's loss: its coefficient is 1 on both sides. J takes k n numbers of memory.

    The model is in evaluation mode: its dropout is off, and its normalisation layers have the statistics that they
    have kept. All passes see the same random numbers. Mode, buffers, random numbers and ``.grad`` are as before
    afterwards, whatever raises.

    Args:
        model: trained; frozen parameters count as constants.
        loss: that it was trained with; the values that it holds do not matter.
        values: of the loss's parameters that it was trained with, in the order of :meth:`TuneLoss.ask`, which the
            entries of the measurement have.
        train: a batch (inputs, target), or batches that start again where they end. They are weighted by their sizes.
        valid: the same.
        metric: see above.
        iterations: of conjugate gradients at most; by default 10 for full and 30 for hyper.
        damping: added to H's diagonal, as a share of the mean of D; 0 is H itself. Where H is not positive definite it
            is raised tenfold, to 1e-3 at least, until it is; a warning says so.
        hessian: ``"gauss_newton"`` products through the predictions of the task's loss and of each
            :class:`PredictionFeature`, or ``"exact"``. Both are the same where predictions are linear in the weights.
            Other features always count exactly.

    Returns:
        A :class:`Measurement` with error and features, and slope and curvature or the Gram matrix. Where the error or a
        gradient is not finite it has the error alone; with a finite error a warning says so.

    Raises:
        TypeError: for arguments of another type, and batches that are no pairs.
        ValueError: for options out of range, a model without trainable parameters, other names of values than the
            features', empty data, an iterator, and features of another shape than their values.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), has the matching of gradients. Its metric is
        another one.

    Example:
        >>> from lossmeta.tuneloss import SquaredL2, TunedLoss, measure
        >>> model = torch.nn.Linear(4, 3)
        >>> train, valid = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
        >>> loss = TunedLoss(torch.nn.functional.cross_entropy, {"l2": SquaredL2()})
        >>> found = measure(model, loss, {"l2": 0.1}, train, valid)
        >>> found.slope.shape, found.curvature.shape
        ((1,), (1, 1))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"measure: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(loss, TunedLoss):
        raise TypeError(f"measure: loss must be a TunedLoss, got {type(loss).__name__}")
    refuse_shards("measure", model, "gather them on one device first")
    checked_values = loss.checked(values)
    metric = choice("measure", "metric", metric, METRICS)
    exact = choice("measure", "hessian", hessian, {"gauss_newton": False, "exact": True})
    if iterations is not None:
        check_at_least_one("measure", "iterations", iterations)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"measure: damping must be at least 0 and finite, got {damping}")
    weights = Weights(model)
    if not weights.tensors:
        raise ValueError(
            "measure: model must have a trainable parameter, got none; set requires_grad of those that were trained"
        )
    size = sum(int(np.size(v)) for v in checked_values.values())
    if metric == "auto":
        metric = "full" if size <= FULL_UP_TO else "hyper"
    training = DataSet("measure", "train", train, shared=False)
    validation = DataSet("measure", "valid", valid, shared=False)
    with _as_before(model, weights.device) as replay:
        gradients = _Gradients(
            loss, model, checked_values, Data(training, replay), Data(validation, replay), weights
        )
        if not gradients.finite:
            if np.isfinite(gradients.error):
                warnings.warn(
                    "measure: gradients must be finite, got NaN or infinity; the measurement has the error alone",
                    stacklevel=2,
                )
            return Measurement(gradients.error, names=tuple(checked_values))
        if metric == "gram":
            rows = torch.cat([gradients.task[None], gradients.jacobian, gradients.valid[None]])
            gram = _numbers(rows @ rows.T)
            found = Measurement(
                gradients.error, gradients.features, (gram + gram.T) / 2, names=tuple(checked_values)
            )
        else:
            curvature = TrainingHessian(
                loss, model, checked_values, Data(training, replay), weights, exact=exact
            )
            count = iterations or (10 if metric == "full" else 30)
            slope, second, used = _quadratic(gradients, curvature, metric, count, damping)
            if used > damping:
                warnings.warn(
                    f"measure: the training loss must have positive curvature, got a direction without; damping was "
                    f"raised from {damping:g} to {used:g}",
                    stacklevel=2,
                )
            found = Measurement(
                gradients.error,
                gradients.features,
                slope=slope,
                curvature=second,
                names=tuple(checked_values),
            )
    return found


class _Gradients:
    """First derivatives at the model.

    Attributes:
        error: of the validation data.
        features: [1 + k], the task's loss first.
        task: its gradient on the training data, [n].
        jacobian: the features' gradients, [k, n].
        valid: the validation error's gradient, [n].
    """

    def __init__(
        self, loss: TunedLoss, model: nn.Module, values: Values, train: Data, valid: Data, weights: Weights
    ) -> None:
        self.loss, self.model, self.data, self.weights = loss, model, valid, weights
        size = sum(int(np.size(v)) for v in values.values())
        rows = torch.zeros(1 + size, weights.size, dtype=weights.dtype, device=weights.device)
        self.features, self.error = np.zeros(1 + size), 0.0
        self.valid, count = torch.zeros_like(rows[0]), 0
        for (inputs, target), number in valid:
            task, _ = loss.terms(model, inputs, target, [])
            self.error += number * _number(task)
            self.valid += number * weights.flat(weights.gradient(task))
            count += number
        self.valid /= count
        self.error /= count
        self.finite = bool(np.isfinite(self.error))
        if not self.finite:
            return
        count, first = 0, True
        for (inputs, target), number in train:
            # Features of the weights alone are the same in every batch.
            names = [n for n in values if first or uses_data(loss.features[n])]
            task, found = loss.terms(model, inputs, target, names)
            loss.total(task, found, values)  # refuses other shapes
            terms: list[tuple[int, Tensor, int]] = [(0, task, number)]
            at = 1
            for name, value in values.items():
                width = int(np.size(value))
                if name in found:
                    weight = number if uses_data(loss.features[name]) else 1
                    terms += [(at + i, v, weight) for i, v in enumerate(found[name].reshape(-1))]
                at += width
            for i, term, weight in terms:
                self.features[i] += weight * _number(term)
                rows[i] += weight * weights.flat(weights.gradient(term))
            count, first = count + number, False
        mean = np.array(
            [True, *(uses_data(loss.features[n]) for n, v in values.items() for _ in range(int(np.size(v))))]
        )
        self.features[mean] /= count
        rows[torch.from_numpy(mean).to(rows.device)] /= count
        self.task, self.jacobian = rows[0], rows[1:]
        self.finite = bool(
            np.isfinite(self.features).all() and rows.isfinite().all() and self.valid.isfinite().all()
        )

    def curvature(self, rows: Tensor) -> Tensor:
        """[r, r], rows times the Gauss-Newton curvature of the validation error times rows."""
        total, count = torch.zeros(len(rows), len(rows), dtype=rows.dtype, device=rows.device), 0
        for (inputs, target), number in self.data:
            outputs, _ = self.loss.predictions(self.model, inputs, [])
            linear = Linearised(self.weights, outputs, partial(self._task, target))
            if linear.outputs:
                moved = torch.stack([linear.push(row)[0].reshape(-1) for row in rows])
                curved = torch.stack(
                    [linear.curve([m.view_as(linear.outputs[0])])[0].reshape(-1) for m in moved]
                )
                total += number * (moved @ curved.T).to(total.device, total.dtype)
            count += number
        return total / count

    def _task(self, target: Tensor, outputs: list[Tensor]) -> Tensor:
        return self.loss.task_loss(outputs[0], target)


def _quadratic(
    gradients: _Gradients, hessian: TrainingHessian, metric: str, iterations: int, damping: float
) -> tuple[Array, Array, float]:
    """Slope [k] and curvature [k, k] of the validation error in the parameters, and the damping that it took."""
    diagonal = hessian.diagonal()
    scale = float(diagonal.mean())
    jacobian, g = gradients.jacobian, gradients.valid
    if metric == "full":
        moves, used = _solve(hessian, jacobian, diagonal, scale, iterations, damping)
        second = gradients.curvature(moves)
        slope = -moves @ g
    else:
        preconditioned = jacobian / (diagonal + damping * scale)
        second, used = preconditioned @ jacobian.T, damping
        if metric == "hyper":
            x, used = _solve(hessian, g[None], diagonal, scale, iterations, damping)
            slope = -jacobian @ x[0]
        else:
            slope = -preconditioned @ g
    symmetric = _numbers(second)
    return _numbers(slope), (symmetric + symmetric.T) / 2, used


def _solve(
    hessian: TrainingHessian, rows: Tensor, diagonal: Tensor, scale: float, iterations: int, damping: float
) -> tuple[Tensor, float]:
    """(H + damping scale)^-1 times rows, with the least damping that makes it positive definite where it looks."""
    while True:
        shift = damping * scale
        damped = partial(_damped, hessian, shift)
        try:
            found = conjugate_gradients(damped, rows, diagonal + shift, iterations)
        except NegativeCurvature:
            if damping > 1e6:
                raise ValueError(
                    "measure: the training loss must have finite curvature, got none that damping could make positive"
                ) from None
            damping = max(10 * damping, 1e-3)
        else:
            return found, damping


def _damped(hessian: TrainingHessian, shift: float, rows: Tensor) -> Tensor:
    return hessian.products(rows) + shift * rows


@contextmanager
def _as_before(model: nn.Module, device: torch.device) -> Iterator[Any]:
    """The model evaluates, and afterwards all is as before; gives what brings random numbers to the same start."""
    state = ModelState(model, device)
    # Neither cuDNN's recurrent layers nor fused attention can be differentiated twice.
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    try:
        with (
            evaluating(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            cudnn,
        ):
            start = RandomState(device)
            yield start.bring_back
    finally:
        state.bring_back()


def _number(tensor: Tensor) -> float:
    return float(tensor.detach().double())


def _numbers(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()
