"""Parametric cross-entropy (ALA, Eq. 6) as a module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lossmeta import plot
from lossmeta._checks import (
    REDUCTIONS,
    check_float,
    check_fraction,
    check_same_device,
    check_tensors,
    choice,
)
from lossmeta.losses import _labels as labels
from lossmeta.losses import _plot
from lossmeta.losses._parameters import register
from lossmeta.losses._saved import SavedLoss
from lossmeta.ops.parametric_cross_entropy import ACTIVATIONS, LowRankPhi, parametric_cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LINKS = {"softmax": "softmax", "sigmoid": "sigmoid"}


class ParametricCrossEntropy(SavedLoss):
    r"""Cross-entropy whose class correlations :math:`\Phi` adapt (ALA, Eq. 6), for ``CrossEntropyLoss``.

    .. math:: \ell = -\sigma\bigl(y^\top \Phi \log \mathrm{softmax}(x)\bigr)

    :math:`\Phi` starts as the identity. A positive :math:`\Phi(i, j)` rewards class j where class i is true,
    a negative one penalises that confusion. Keep what is off the diagonal small: where a row of it sums to 1 or so,
    the wrong classes earn as much as the right one, and the model gets worse.

    The loss lies between -1 and 0, and its gradient is smaller than that of cross-entropy: at :math:`\Phi = I` by
    the factor :math:`p / (1 + p)^2` for the probability p of the true class, about 1/C at the start. Adam does not
    mind; for SGD raise the learning rate, or use ``activation="identity"``.

    ``phi`` is a buffer, which no optimizer finds among the parameters and a controller sets
    (``loss.phi.copy_(...)``); with ``learnable=True`` it is a parameter. Either way it is in ``state_dict()``.

    A matrix of C² numbers is too much for a vocabulary. With ``rank`` r it is
    :math:`\Phi = \mathrm{diag}(d) + L R^\top`, of which ``phi_diagonal`` [C], ``phi_left`` [C, r] and ``phi_right``
    [C, r] are kept instead of ``phi``. Memory is then O(N C + C r) and time O(N C r). It starts as the identity too:
    ``phi_diagonal`` is 1 and ``phi_left`` 0, while ``phi_right`` is drawn, with columns of norm about 1, so that
    ``phi_left`` has a gradient. With ``rank=0`` :math:`\Phi` is diagonal, and until it is moved the loss is that of
    the plain identity.

    With ``link="sigmoid"`` each of C labels is on or off on its own, and judged as a choice between these two:

    .. math:: \ell_c = -\sigma\bigl(\Phi_c(y_c, 0) \log(1 - p_c) + \Phi_c(y_c, 1) \log p_c\bigr), \qquad
              p_c = \mathrm{sigmoid}(x_c)

    ``phi`` is [C, 2, 2] then, an identity for each label: with ``activation="identity"`` that is binary cross-entropy.
    :math:`\Phi_c(1, 1)` weighs the label where it is on, :math:`\Phi_c(0, 0)` where it is off.

    Args:
        num_classes: C.
        rank: r, at least 0, or ``None`` for a matrix.
        link: ``"softmax"`` for one class of C, ``"sigmoid"`` for labels on their own, without ``rank``.
        activation: ``"sigmoid"`` (the paper's) or ``"identity"``, with which :math:`\Phi = I` is plain
            cross-entropy.
        learnable: whether ``phi``, or its parts, are parameters instead of buffers, for a controller that learns it
            from a validation loss; set it inside ``torch.no_grad()``. Minimising the training loss over it would only
            make the loss meaningless.
        weight: weight per class, ``[C]``, or per label.
        ignore_index: label that contributes neither loss nor gradient.
        label_smoothing: in [0, 1].
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. With the sigmoid link the mean is over the labels that are not
            ignored, and not over their weights, as that of ``BCEWithLogitsLoss``, and ``"none"`` keeps every label.
        device: where ``phi``, or its parts, are made.
        dtype: their dtype.

    Shape:
        Those of :class:`torch.nn.CrossEntropyLoss`: logits ``[C]``, ``[N, C]`` or ``[N, C, d...]`` with class
        indices or probabilities. ``sigmoid``: logits ``[C]``, ``[N, C]`` or ``[N, C, d...]``, or ``[N]`` for C = 1, and
        a target of the same shape, which is 0 or 1 (bool or integers), or floating and in between.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes, devices or labels that
            do not fit.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Example:
        >>> criterion = ParametricCrossEntropy(num_classes=3)  # was: torch.nn.CrossEntropyLoss()
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> criterion(logits, torch.randint(3, (8,))).backward()
        >>> criterion = ParametricCrossEntropy(131072, rank=8)  # a matrix would take 69 GB
    """

    DEFINING = ("num_classes", "activation", "rank", "link")
    APPLIED = ("learnable", "ignore_index", "label_smoothing", "reduction")

    phi: Tensor
    phi_diagonal: Tensor
    phi_left: Tensor
    phi_right: Tensor
    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        rank: int | None = None,
        *,
        link: str = "softmax",
        activation: str = "sigmoid",
        learnable: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        choice("ParametricCrossEntropy", "link", link, LINKS)
        choice("ParametricCrossEntropy", "activation", activation, ACTIVATIONS)
        choice("ParametricCrossEntropy", "reduction", reduction, REDUCTIONS)
        for name, number, least in (("num_classes", num_classes, 1), ("rank", rank, 0)):
            if number is None and name == "rank":
                continue
            if not isinstance(number, int) or number < least:
                kind = ValueError if isinstance(number, int) else TypeError
                raise kind(
                    f"ParametricCrossEntropy: {name} must be an integer, at least {least}, got {number!r}"
                )
        check_fraction("ParametricCrossEntropy", "label_smoothing", label_smoothing)
        if weight is not None:
            check_tensors("ParametricCrossEntropy", weight=weight)
            if weight.shape != (num_classes,):
                raise ValueError(
                    f"ParametricCrossEntropy: weight must be [{num_classes}], got {list(weight.shape)}"
                )
        if link == "sigmoid":
            labels.check_ignore_index("ParametricCrossEntropy", ignore_index)
            if rank is not None:
                raise ValueError(f"ParametricCrossEntropy: rank must be None with link='sigmoid', got {rank}")
        self.num_classes = num_classes
        self.link = link
        self.rank = rank
        self.activation = activation
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        if rank is None:
            identity = torch.eye(num_classes if link == "softmax" else 2, device=device, dtype=dtype)
            phi = identity if link == "softmax" else identity.repeat(num_classes, 1, 1)
            register(self, "phi", phi, learnable)
        else:
            drawn = torch.randn(num_classes, rank, device=device, dtype=dtype) / math.sqrt(num_classes)
            register(self, "phi_diagonal", drawn.new_ones(num_classes), learnable)
            register(self, "phi_left", torch.zeros_like(drawn), learnable)
            register(self, "phi_right", drawn, learnable)
        self.register_buffer("weight", weight)

    @property
    def learnable(self) -> bool:
        """Whether ``phi`` is a parameter."""
        return isinstance(self.phi if self.rank is None else self.phi_diagonal, nn.Parameter)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        check_tensors("ParametricCrossEntropy", logits=logits, target=target)
        if self.link == "sigmoid":
            return self._per_label(logits, target)
        phi: Tensor | LowRankPhi
        if self.rank is None:
            phi, models = self.phi, self.phi.dim() == 3
        else:
            phi = LowRankPhi(self.phi_diagonal, self.phi_left, self.phi_right)
            models = phi.diagonal.dim() == 2
        dim = 0 if logits.dim() == 1 else 2 if models else 1
        if logits.dim() and logits.shape[dim] != self.num_classes:
            raise ValueError(
                f"ParametricCrossEntropy: logits must have num_classes = {self.num_classes} classes in dimension "
                f"{dim}, got {list(logits.shape)}"
            )
        return parametric_cross_entropy(
            logits,
            target,
            phi,
            activation=self.activation,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def _per_label(self, logits: Tensor, target: Tensor) -> Tensor:
        """Each label as a model of two classes, whose logits are 0 and its own."""
        name, classes = "ParametricCrossEntropy", self.num_classes
        check_float(name, logits=logits)
        check_same_device(name, target=target, logits=logits)
        shape = logits.shape
        if classes > 1 and logits.dim() == target.dim() == 1:  # one sample
            logits, target = logits[None], target[None]
        labels.check(name, logits, target, self.weight)
        if (logits.shape[1] if logits.dim() > 1 else 1) != classes:
            raise ValueError(
                f"{name}: logits must be [N, {classes}] or [N, {classes}, d...], got {list(shape)}"
            )
        options = (self.weight, self.ignore_index, self.label_smoothing)
        x, y, scale, counted = labels.flat(name, logits, target, *options, whole=True)
        inner = (logits.shape[0], classes, math.prod(logits.shape[2:]))

        def by_label(z: Tensor) -> Tensor:
            return z.reshape(inner).movedim(1, 0).reshape(classes, -1)

        x, y = by_label(x), by_label(y)
        loss = parametric_cross_entropy(
            torch.stack([torch.zeros_like(x), x], -1),
            torch.stack([1 - y, y], -1) if y.is_floating_point() else y,
            self.phi,
            activation=self.activation,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        loss = loss.reshape(classes, inner[0], inner[2]).movedim(0, 1).reshape(-1) * scale
        if self.reduction == "mean":
            return loss.sum() / counted
        return loss.sum() if self.reduction == "sum" else loss.reshape(shape)

    def plot(self) -> Figure:
        r"""Draws :math:`\Phi` as colours; where it is the identity, the loss and its slope.

        A row of the picture is a true class, a column the class that it rewards (above 0) or penalises. The identity
        says nothing as a picture. The loss depends on the probability of the true class alone then, and is drawn over
        it, and beside it its slope in that class's logit. ``weight`` and ``label_smoothing`` are left out. With the
        sigmoid link a row is a label, and its four columns are its matrix.

        Returns:
            A ``matplotlib.figure.Figure``: write it with its ``savefig``.

        Raises:
            ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
            ValueError: where ``phi`` is that of several models.
        """
        phi = (
            self.phi
            if self.rank is None
            else LowRankPhi(self.phi_diagonal, self.phi_left, self.phi_right).dense()
        )
        phi = phi.detach().cpu()
        if self.link == "sigmoid":
            return self._plot_per_label(phi)
        if phi.dim() != 2:
            raise ValueError(
                f"ParametricCrossEntropy: phi must be [C, C] to be drawn, got {list(phi.shape)}; draw one at a time"
            )
        if not torch.equal(phi, torch.eye(len(phi), dtype=phi.dtype, device="cpu")):
            figure, (panel,) = plot.figure("ParametricCrossEntropy", size=(4.8, 4.0))
            plot.matrix(panel, phi.tolist(), "Φ")
            panel.set_xlabel("class")
            panel.set_ylabel("true class")
            return figure
        p = torch.linspace(0, 1, _plot.POINTS, dtype=torch.float64, device="cpu")[1:-1]
        with torch.enable_grad():
            logits = torch.stack([p.log(), (1 - p).log()], 1).requires_grad_()
            loss = parametric_cross_entropy(
                logits,
                torch.zeros_like(p, dtype=torch.int64),
                torch.eye(2, dtype=p.dtype, device="cpu"),
                activation=self.activation,
                reduction="none",
            )
            (slope,) = torch.autograd.grad(loss.sum(), logits)
        values = {"loss": loss.detach(), "slope in the logit of the true class": slope[:, 0]}
        return _plot.panels("ParametricCrossEntropy", p, "probability of the true class", values)

    def _plot_per_label(self, phi: Tensor) -> Figure:
        figure, (panel,) = plot.figure("ParametricCrossEntropy", size=(4.8, 4.0))
        plot.matrix(panel, phi.reshape(-1, 4).tolist(), "Φ")
        panel.set_xticks(range(4), ["off, off", "off, on", "on, off", "on, on"])
        panel.set_xlabel("true, rewarded")
        panel.set_ylabel("label")
        return figure

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f"rank={self.rank}, "
        return (
            f"num_classes={self.num_classes}, {rank}link={self.link!r}, activation={self.activation!r}, "
            f"learnable={self.learnable}, weighted={self.weight is not None}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"reduction={self.reduction!r}"
        )
