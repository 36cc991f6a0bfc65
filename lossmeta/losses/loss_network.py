"""The learned loss network of AdaLFL as a module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta.losses._outputwise import IGNORED, OutputwiseLoss
from lossmeta.ops._arguments import choice
from lossmeta.ops.loss_network import HIDDEN, OUTPUTS, loss_network, with_mixed_derivative


class LossNetwork(OutputwiseLoss):
    r"""A loss that is itself a small network, averaged over the C outputs (AdaLFL, Eq. 3 and 4).

    .. math:: \mathcal M_\phi(y, f) = \frac1C \sum_{i=1}^C \ell_\phi(y_i, f_i)

    :math:`\ell_\phi` has the inputs target and prediction, two hidden layers and no biases. Its weights
    ``input_weight`` [H, 2], ``hidden_weight`` [H, H] and ``output_weight`` [1, H] are parameters that start
    Kaiming-normal; until they have been learned, minimising this loss serves nothing. Give them an optimizer of their
    own, not the model's.

    Args:
        hidden: H, the width of the hidden layers.
        leak: slope of the smooth leaky ReLU for very negative inputs, in [0, 1]; the paper's :math:`\gamma`.
        smoothness: how closely it follows its kink, positive; the paper's :math:`\beta`.
        activation: ``"smooth_leaky_relu"`` (AdaLFL), or ``"relu"``, with ``output="softplus"`` the network of ML³.
        output: ``"linear"`` (AdaLFL) or ``"softplus"``.
        link: ``"softmax"`` for classification: takes logits and compares probabilities with one-hot targets.
            ``"identity"`` for regression.
        exact: whether to evaluate the network at every output instead of reading a table of it where that pays.
        weight: weight per class, ``[C]``; that of its class multiplies the loss of a sample.
        ignore_index: label that contributes neither loss nor gradient.
        label_smoothing: in [0, 1]; with it the network is always evaluated at every output.
        reduction: ``"none"``, ``"mean"`` (weighted) or ``"sum"``, over the samples.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Shape:
        ``softmax``: those of :class:`torch.nn.CrossEntropyLoss`. ``identity``: both ``[N]`` or ``[N, d...]``.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes or devices that do not
            fit.
        TypeError: when called with something that is not a tensor.
        RuntimeError: when called, for labels out of range, and for parameters on another device.

    Example:
        >>> criterion = LossNetwork()
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> criterion(logits, torch.randint(3, (8,))).backward()
    """

    takes_labels = True

    def __init__(
        self,
        hidden: int = 40,
        leak: float = 0.01,
        smoothness: float = 10.0,
        *,
        activation: str = "smooth_leaky_relu",
        output: str = "linear",
        link: str = "softmax",
        exact: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = IGNORED,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            link=link,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        choice("LossNetwork", "activation", activation, HIDDEN)
        choice("LossNetwork", "output", output, OUTPUTS)
        if hidden < 1:
            raise ValueError(f"LossNetwork: hidden must be at least 1, got {hidden}")
        if not 0.0 <= leak <= 1.0:
            raise ValueError(f"LossNetwork: leak must lie in [0, 1], got {leak}")
        if not (smoothness > 0.0 and math.isfinite(smoothness)):
            raise ValueError(f"LossNetwork: smoothness must be positive and finite, got {smoothness}")
        self.hidden = hidden
        self.leak = leak
        self.smoothness = smoothness
        self.activation = activation
        self.output = output
        self.exact = exact
        self.input_weight = nn.Parameter(torch.empty(hidden, 2, device=device, dtype=dtype))
        self.hidden_weight = nn.Parameter(torch.empty(hidden, hidden, device=device, dtype=dtype))
        self.output_weight = nn.Parameter(torch.empty(1, hidden, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        for weight in (self.input_weight, self.hidden_weight, self.output_weight):
            nn.init.kaiming_normal_(weight)

    def outputwise(self, pred: Tensor, target: Tensor) -> Tensor:
        weights = (self.input_weight, self.hidden_weight, self.output_weight)
        return loss_network(pred, target, *weights, **self._options())[0]

    def _options(self) -> dict[str, Any]:
        return {
            "link": self.link,
            "leak": self.leak,
            "smoothness": self.smoothness,
            "hidden": self.activation,
            "output": self.output,
            "ignore_index": self.ignore_index,
            "exact": self.exact,
        }

    def with_mixed_derivative(
        self, pred: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, ...]]] | None:
        """The loss, its gradient in ``pred`` and, of the latter's product with ``u``, the gradients in the weights:
        what :func:`~lossmeta.adalfl.meta_gradient` needs, without autograd.

        For the mean over logits ``[N, C]`` with class indices ``[N]``. ``None`` where a call and autograd must do it:
        for anything else, a subclass, weights of which one is frozen, and a module with hooks.
        """
        weights = (self.input_weight, self.hidden_weight, self.output_weight)
        if (
            type(self) is not LossNetwork
            or self.link != "softmax"
            or self.reduction != "mean"
            or self.weight is not None
            or self.label_smoothing
            or pred.dim() != 2
            or target.dtype != torch.int64
            or target.shape != pred.shape[:1]
            or pred.shape[1] == 0
            or not all(w.requires_grad for w in weights)
            or self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
        ):
            return None
        loss, slope, mixed = with_mixed_derivative(pred, target, *weights, **self._options())
        count = (target != self.ignore_index).sum()

        def mixed_of_mean(u: Tensor) -> tuple[Tensor, ...]:
            gradients = mixed(u)
            torch._foreach_div_(gradients, count)
            return gradients

        return loss.sum() / count, slope / count, mixed_of_mean

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden}, leak={self.leak}, smoothness={self.smoothness}, activation={self.activation!r}, "
            f"output={self.output!r}, exact={self.exact}, {super().extra_repr()}"
        )
