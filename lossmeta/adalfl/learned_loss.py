"""The loss that is learned, as a training step sees it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta._checks import check_scalar
from lossmeta._model_state import is_capturing
from lossmeta.losses import LossNetwork
from lossmeta.losses._parameters import mark_learned

PAPER_META_RATE = 1e-5
"""Adam's, of the AdaLFL paper."""
COLLAPSES_FROM = 3e-3
"""The meta rate from which on a residual network that may rescale its loss was seen to turn against the task."""

Mixed = Callable[[Tensor], Sequence[Tensor | None]]


class DivergedError(RuntimeError):
    """The learned loss or its slope is not finite; the training step was not taken."""


class LearnedLoss:
    """A loss together with its slope at the prediction, and with the derivative of that slope in its parameters.

    Args:
        module: ``loss(prediction, target) -> []``. It may have a ``with_mixed_derivative`` of its own, as
            :class:`~lossmeta.losses.LossNetwork` has.
        device: of the predictions.

    Attributes:
        phi: the parameters to learn.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.phi: list[Tensor] = to_learn(module)
        mark_learned(module)

    def differentiated(self, f: Tensor, target: Tensor, meta: bool) -> tuple[Tensor, Tensor, Mixed]:
        """The loss at the prediction ``f``, its slope there, and what takes u to the gradients of <slope, u> in phi.

        The loss's own ``with_mixed_derivative`` is cheaper than autograd; it may decline. Without ``meta`` the last is
        not to be called.
        """
        direct = getattr(self.module, "with_mixed_derivative", None)
        result = direct(f, target) if direct is not None else None
        if result is not None:
            self._check_finite(*result[:2])
            return result
        value, slope = self.with_slope(f, target, create_graph=meta)

        def mixed(u: Tensor) -> Sequence[Tensor | None]:
            if not slope.requires_grad:  # no parameter changes the slope
                return [None] * len(self.phi)
            return torch.autograd.grad(slope, self.phi, u, allow_unused=True)

        return value, slope.detach(), mixed

    def with_slope(self, f: Tensor, target: Tensor, *, create_graph: bool) -> tuple[Tensor, Tensor]:
        value = self.module(f.requires_grad_(), target)
        check_scalar("AdaLFL", "loss", value, " (reduction='mean')")
        (slope,) = torch.autograd.grad(value, f, create_graph=create_graph)
        self._check_finite(value, slope)
        return value.detach(), slope

    def _check_finite(self, value: Tensor, slope: Tensor) -> None:
        if is_capturing(self.device):
            return  # nothing can be read
        finite = bool(slope.isfinite().all())
        if not (finite and math.isfinite(value.item())):
            raise DivergedError(
                f"AdaLFL: the learned loss is {value.item()} on this batch, its slope "
                f"{'finite' if finite else 'not finite'}; the step was not taken. Lower the learning rates, or load an "
                "earlier state"
            )


def to_learn(loss: nn.Module) -> list[Tensor]:
    return [p for p in loss.parameters() if p.requires_grad]


def check_apart(model: nn.Module, loss: nn.Module) -> None:
    """That the model holds nothing that the loss is to learn, as a LightningModule does that keeps both."""
    phi = set(to_learn(loss))
    held = [name for name, p in model.named_parameters() if p in phi]
    if held:
        raise ValueError(
            f"AdaLFL: the model must not hold parameters of the learned loss, got {held}; give the network alone, "
            "model.network say, and its optimizer those parameters alone"
        )


def check_meta_optimizer(where: str, loss: nn.Module, optimizer: Optimizer) -> None:
    """That it moves all trainable parameters of the loss; it may also hold frozen ones of it, but no others."""
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    others = [p for p in owned if p not in set(loss.parameters())]
    missing = [name for name, p in loss.named_parameters() if p.requires_grad and p not in owned]
    if others or missing:
        raise ValueError(
            f"{where}: meta_optimizer must have all trainable parameters of the loss and no others, got "
            f"{len(others)} others, and of the loss's all but {missing}; make it of loss.parameters()"
        )


def default_meta_rate(loss: nn.Module) -> float:
    """The one that the loss names, or the paper's."""
    return float(getattr(loss, "meta_rate", PAPER_META_RATE))


def warn_of_collapse(where: str, loss: nn.Module, optimizer: Optimizer) -> None:
    """Where a network on a residual may change the size of the loss, at a rate at which such losses have collapsed."""
    fast = {p for group in optimizer.param_groups if group["lr"] >= COLLAPSES_FROM for p in group["params"]}
    for module in loss.modules():
        unbounded = isinstance(module, LossNetwork) and module.residual and not module.normalize_slope
        if unbounded and fast & set(module.parameters()):
            warnings.warn(
                f"{where}: a LossNetwork with residual and without normalize_slope must have a meta rate below "
                f"{COLLAPSES_FROM:g}, at which such losses have turned against the task; set normalize_slope=True, or "
                "guard=True",
                stacklevel=3,
            )
            return
