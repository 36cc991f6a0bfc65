"""The learned loss network of AdaLFL as a module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta import _checks
from lossmeta.losses._labels import Labels
from lossmeta.losses._outputwise import IGNORED, OutputwiseLoss, with_labels_as_int64
from lossmeta.losses._parameters import has_hooks
from lossmeta.losses._task_loss import as_rows, scale_of_rows, slope_of_labels, task_loss, task_slope
from lossmeta.ops._precision import accumulation_dtype
from lossmeta.ops.adjusted_cross_entropy import with_slope
from lossmeta.ops.loss_network import HIDDEN, OUTPUTS, loss_network, with_mixed_derivative

RESIDUALS = {"cross_entropy": "softmax", "binary_cross_entropy": "sigmoid", "squared_error": "identity"}


class LossNetwork(OutputwiseLoss):
    r"""A loss that is itself a small network, averaged over the C outputs (AdaLFL, Eq. 3 and 4).

    .. math:: \mathcal M_\phi(y, f) = \frac1C \sum_{i=1}^C \ell_\phi(y_i, f_i)

    :math:`\ell_\phi` has the inputs target and prediction, two hidden layers and no biases. Its weights
    ``input_weight`` [H, 2], ``hidden_weight`` [H, H] and ``output_weight`` [1, H] are parameters that start
    Kaiming-normal; until they have been learned, minimising this loss serves nothing, and the first call in training
    warns. Give them an optimizer of their own, not the model's (:func:`check_not_minimized` looks).

    With ``residual`` the network is added to a task loss and its output layer starts at zero, so that the loss starts
    as the task loss exactly and nothing need be learned before the training:

    .. math:: \mathcal M_\phi(y, f) = \mathcal L_T(y, f) + \frac1C \sum_{i=1}^C \ell_\phi(y_i, f_i)

    With ``output="softplus"`` it starts log 2 above it, with the same gradient. The first update moves the output layer
    only: the other layers have a meta-gradient from the second on.

    With ``normalize_slope`` the shape of the loss is learned, and not its size, which acts as a learning rate. On each
    batch the loss is multiplied by a factor. It makes the loss as steep in the mean as the task loss, which is
    cross-entropy as a function of the logits, or squared error:

    .. math:: s(\phi) = \frac{\sum |\partial \mathcal L_T / \partial f|}
                           {\sum |\partial \mathcal M_\phi / \partial f|}

    For derivatives with respect to the prediction s is a constant. For those with respect to :math:`\phi` it is not:
    the meta-gradient has no component along mere scaling.

    Args:
        hidden: H, the width of the hidden layers.
        leak: slope of the smooth leaky ReLU for very negative inputs, in [0, 1]; the paper's :math:`\gamma`.
        smoothness: how closely it follows its kink, positive; the paper's :math:`\beta`.
        activation: ``"smooth_leaky_relu"`` (AdaLFL), or ``"relu"``, with ``output="softplus"`` the network of ML³.
        output: ``"linear"`` (AdaLFL) or ``"softplus"``.
        link: ``"softmax"`` for classification: takes logits and compares probabilities with one-hot targets.
            ``"sigmoid"`` for labels that are on or off on their own, several or none for a sample: takes a logit for
            each. ``"identity"`` for regression.
        residual: ``"cross_entropy"``, for the softmax link: :func:`torch.nn.functional.cross_entropy` with the weight,
            ``ignore_index``, ``label_smoothing`` and reduction below. ``"binary_cross_entropy"``, for the sigmoid link:
            its mean is that of :class:`torch.nn.BCEWithLogitsLoss`. ``"squared_error"``, for the identity link: its
            mean is that of :func:`torch.nn.functional.mse_loss`. ``None``: the network alone.
        normalize_slope: whether to rescale the loss in every call, as above; may be set at any time. Where the mean
            slope is nothing but rounding, as that of a constant loss, s is 1.
        exact: whether to evaluate the network at every output instead of reading a table of it where that pays. There
            is a table for class indices with the softmax link, and for labels with the sigmoid link.
        weight: weight per class, ``[C]``; that of its class multiplies the loss of a sample, or of a label.
        ignore_index: label that contributes neither loss nor gradient.
        label_smoothing: in [0, 1]; with it the network is always evaluated at every output.
        reduction: ``"none"``, ``"mean"`` (weighted) or ``"sum"``, over the samples. With the sigmoid link the mean is
            over the labels that are not ignored, and not over their weights, as that of ``BCEWithLogitsLoss``.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Shape:
        ``softmax``: those of :class:`torch.nn.CrossEntropyLoss`. ``identity``: both ``[N]`` or ``[N, d...]``.
        ``sigmoid``: both ``[N]``, ``[N, C]`` or ``[N, C, d...]``; the target is 0 or 1 (bool or integers), or floating
        and in between.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes, devices or labels that
            do not fit.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Example:
        >>> criterion = LossNetwork(residual="cross_entropy")  # starts as torch.nn.CrossEntropyLoss()
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> criterion(logits, torch.randint(3, (8,))).backward()
    """

    takes_labels = True
    DEFINING = (
        "hidden",
        "leak",
        "smoothness",
        "activation",
        "output",
        "link",
        "residual",
        "normalize_slope",
    )
    APPLIED = ("exact", "ignore_index", "label_smoothing", "reduction")

    def __init__(
        self,
        hidden: int = 40,
        leak: float = 0.01,
        smoothness: float = 10.0,
        *,
        activation: str = "smooth_leaky_relu",
        output: str = "linear",
        link: str = "softmax",
        residual: str | None = None,
        normalize_slope: bool = False,
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
        _checks.choice("LossNetwork", "activation", activation, HIDDEN)
        _checks.choice("LossNetwork", "output", output, OUTPUTS)
        if residual is not None:
            needed = _checks.choice("LossNetwork", "residual", residual, RESIDUALS)
            if link != needed:
                raise ValueError(
                    f"LossNetwork: residual={residual!r} is for link={needed!r}, got link={link!r}"
                )
        _checks.check_at_least_one("LossNetwork", "hidden", hidden)
        _checks.check_fraction("LossNetwork", "leak", leak)
        _checks.check_positive_and_finite("LossNetwork", "smoothness", smoothness)
        self.hidden = hidden
        self.leak = leak
        self.smoothness = smoothness
        self.activation = activation
        self.output = output
        self.residual = residual
        self.normalize_slope = normalize_slope
        self.exact = exact
        self.input_weight = nn.Parameter(torch.empty(hidden, 2, device=device, dtype=dtype))
        self.hidden_weight = nn.Parameter(torch.empty(hidden, hidden, device=device, dtype=dtype))
        self.output_weight = nn.Parameter(torch.empty(1, hidden, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def meta_rate(self) -> float:
        """Adam's rate at which it is learned online: 3e-3 where only its shape can change, else the paper's 1e-5."""
        return 3e-3 if self.residual is not None and self.normalize_slope else 1e-5

    def reset_parameters(self) -> None:
        """Draws the weights anew; with a residual the output layer's are 0."""
        self._unlearned = self.residual is None
        for weight in (self.input_weight, self.hidden_weight, self.output_weight):
            nn.init.kaiming_normal_(weight)
        if self.residual is not None:
            nn.init.zeros_(self.output_weight)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        loss = super()._plain(pred, target)
        if self._unlearned:
            self._say_unlearned(pred, "residual=..., ")
        if self.residual is None and not self.normalize_slope:
            return loss
        target = with_labels_as_int64(target)
        if self.residual is not None:
            loss = loss + task_loss(self, pred, target)
        return loss * self._scale(pred, target) if self.normalize_slope else loss

    def _scale(self, pred: Tensor, target: Tensor) -> Tensor:
        """The task loss's mean absolute slope over this loss's; differentiable in the weights only."""
        if self.link == "sigmoid":
            task = slope_of_labels(self._labels(pred.detach(), target))
            own = self._network_slope_of_labels(self._labels(pred.detach(), target, whole=True))
        else:
            f, y = as_rows(self, pred.detach(), target)
            task, own = task_slope(self, f, y), self._network_slope(f, y)
        if self.residual is not None:
            own = own + task
        return _ratio(task, own.abs().sum())[0]

    def _network_slope(self, f: Tensor, y: Tensor) -> Tensor:
        """The gradient of the network's part, summed where it is not reduced, in rows of predictions."""
        ignored, scale = scale_of_rows(self, f, y)
        if self.label_smoothing:
            classes = f.shape[1]
            if ignored is not None:
                f = f.masked_fill(ignored[:, None], 0)
                y = (y[:, None] == torch.arange(classes, device=y.device)).to(f.dtype)
            y = (1 - self.label_smoothing) * y + self.label_smoothing / classes
        slope = self._network(f, y)[1] * scale[:, None]
        return slope / scale.sum() if self.reduction == "mean" else slope

    def _network_slope_of_labels(self, labels: Labels) -> Tensor:
        return self._network(labels.logits, labels.target)[1].squeeze(1) * labels.scale

    def outputwise(self, pred: Tensor, target: Tensor) -> Tensor:
        loss = self._network(pred, target)[0]
        return loss.squeeze(1) if self.link == "sigmoid" else loss

    def _network(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        weights = (self.input_weight, self.hidden_weight, self.output_weight)
        return loss_network(pred, target, *weights, **self._options())

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
        """What :func:`~lossmeta.adalfl.meta_gradient` needs, without autograd.

        For the mean over logits ``[N, C]`` with class indices ``[N]``, over logits and labels of the sigmoid link, or
        over predictions and targets of one shape.

        Returns:
            The loss, its slope in ``pred``, and the function that takes ``u`` to the gradients of <slope, u> in the
            three weights. ``None`` where a call and autograd must do it: for other shapes and reductions, a subclass,
            weights of which one is frozen or has another dtype than ``pred``, and a module with hooks.
        """
        weights = (self.input_weight, self.hidden_weight, self.output_weight)
        if (
            type(self) is not LossNetwork
            or self.reduction != "mean"
            or self.weight is not None
            or self.label_smoothing
            or not all(w.requires_grad and w.dtype == pred.dtype for w in weights)
            or has_hooks(self)
            or not self._fits(pred, target)
        ):
            return None
        task: Tensor | None = None
        counts: Tensor | None = None  # whether an output counts, where the operator does not know
        count: Tensor | int
        if self.link == "softmax":
            loss, slope, mixed = with_mixed_derivative(pred, target, *weights, **self._options())
            count = (target != self.ignore_index).sum()
        elif self.link == "sigmoid":
            labels = self._labels(pred.detach(), target, whole=True)
            count = labels.counted
            loss, slope, mixed = with_mixed_derivative(
                labels.logits, labels.target, *weights, **self._options()
            )
            if labels.target.is_floating_point():
                counts = labels.scale[:, None]
                loss, slope = loss * counts, slope * counts
        else:
            rows = (len(pred), math.prod(pred.shape[1:]))
            loss, slope, mixed = with_mixed_derivative(
                pred.reshape(rows), target.reshape(rows), *weights, **self._options()
            )
            count = len(pred)
        shape = slope.shape
        value, slope = loss.sum() / count, slope.reshape(pred.shape) / count
        if self.residual is not None or self.normalize_slope:
            if self.link == "softmax":
                wide = pred.detach().to(accumulation_dtype(pred.dtype))  # a slope has the dtype of its logits
                task_value, task = with_slope(wide, target, ignore_index=self.ignore_index)
            elif self.link == "sigmoid":
                task = slope_of_labels(self._labels(pred.detach(), target)).reshape(pred.shape) / count
                task_value = task_loss(self, pred.detach(), target)
            else:
                task = task_slope(self, *as_rows(self, pred.detach(), target)).reshape(pred.shape)
                task_value = task_loss(self, pred.detach(), target)
            if self.residual is not None:
                value, slope = value + task_value, slope + task
        along = slope
        scale: Tensor | None = None
        if self.normalize_slope and task is not None:
            own = slope.abs().sum()
            scale, steep = _ratio(task, own)
            value, slope = value * scale, slope * scale

        def mixed_of_mean(u: Tensor) -> tuple[Tensor, ...]:
            if scale is not None:
                # s = t / |g|_1 depends on the weights through g: ds = -s <sign(g), dg> / |g|_1.
                back = ((along * u).sum() / own).where(steep, 0)
                u = scale * (u - back * along.sign())
            u = u.reshape(shape)
            gradients = mixed(u if counts is None else u * counts)
            torch._foreach_div_(gradients, count)
            return gradients

        return value, slope, mixed_of_mean

    def _fits(self, pred: Tensor, target: Tensor) -> bool:
        if not isinstance(target, Tensor) or pred.numel() == 0 or not pred.is_floating_point():
            return False
        if self.link == "softmax":
            return pred.dim() == 2 and target.dtype == torch.int64 and target.shape == pred.shape[:1]
        return (
            pred.dim() > 0
            and target.shape == pred.shape
            and (target.is_floating_point() or self.link == "sigmoid")
        )

    def of_output(self, f: Tensor, y: Tensor, num_classes: int | None) -> Tensor:
        network = super().of_output(f, y, num_classes)
        if self.residual == "squared_error":
            return (f - y) ** 2 + network
        if self.residual == "binary_cross_entropy":
            return network - torch.xlogy(y, f) - torch.xlogy(1 - y, 1 - f)
        if self.residual == "cross_entropy":
            if num_classes is None:
                raise ValueError(
                    "LossNetwork: num_classes must be given with residual='cross_entropy', to which each class adds "
                    "1/num_classes of the network, got None"
                )
            return network / num_classes - torch.xlogy(y, f)
        return network

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden}, leak={self.leak}, smoothness={self.smoothness}, activation={self.activation!r}, "
            f"output={self.output!r}, residual={self.residual!r}, normalize_slope={self.normalize_slope}, "
            f"exact={self.exact}, {super().extra_repr()}"
        )


def _ratio(task_slope: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The factor that makes a slope of absolute sum ``own`` as steep as the task loss's, and whether there is one.

    Where the slope is nothing but rounding there is none, and the factor is 1.
    """
    task = task_slope.abs().sum()
    steep = own > torch.finfo(task_slope.dtype).eps * task
    return torch.where(steep, task / own.where(steep, 1), 1), steep
