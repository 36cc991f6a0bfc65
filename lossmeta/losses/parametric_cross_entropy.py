"""Parametric cross-entropy (ALA, Eq. 6) as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lossmeta import plot
from lossmeta._checks import REDUCTIONS, check_fraction, check_tensors, choice
from lossmeta.losses import _plot
from lossmeta.losses._parameters import register
from lossmeta.losses._saved import SavedLoss
from lossmeta.ops.parametric_cross_entropy import ACTIVATIONS, parametric_cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    Args:
        num_classes: C.
        activation: ``"sigmoid"`` (the paper's) or ``"identity"``, with which :math:`\Phi = I` is plain
            cross-entropy.
        learnable: whether ``phi`` is a parameter instead of a buffer, for a controller that learns it from a
            validation loss; set it inside ``torch.no_grad()``. Minimising the training loss over it would only make the
            loss meaningless.
        weight: weight per class, ``[C]``.
        ignore_index: label that contributes neither loss nor gradient.
        label_smoothing: in [0, 1].
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        device: where ``phi`` is made.
        dtype: dtype of ``phi``.

    Shape:
        Those of :class:`torch.nn.CrossEntropyLoss`: logits ``[C]``, ``[N, C]`` or ``[N, C, d...]`` with class
        indices or probabilities.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes, devices or labels that
            do not fit.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Example:
        >>> criterion = ParametricCrossEntropy(num_classes=3)  # was: torch.nn.CrossEntropyLoss()
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> criterion(logits, torch.randint(3, (8,))).backward()
    """

    DEFINING = ("num_classes", "activation")
    APPLIED = ("learnable", "ignore_index", "label_smoothing", "reduction")

    phi: Tensor
    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
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
        choice("ParametricCrossEntropy", "activation", activation, ACTIVATIONS)
        choice("ParametricCrossEntropy", "reduction", reduction, REDUCTIONS)
        if not isinstance(num_classes, int) or num_classes < 1:
            kind = ValueError if isinstance(num_classes, int) else TypeError
            raise kind(
                f"ParametricCrossEntropy: num_classes must be an integer, at least 1, got {num_classes!r}"
            )
        check_fraction("ParametricCrossEntropy", "label_smoothing", label_smoothing)
        if weight is not None:
            check_tensors("ParametricCrossEntropy", weight=weight)
            if weight.shape != (num_classes,):
                raise ValueError(
                    f"ParametricCrossEntropy: weight must be [{num_classes}], got {list(weight.shape)}"
                )
        self.num_classes = num_classes
        self.activation = activation
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        register(self, "phi", torch.eye(num_classes, device=device, dtype=dtype), learnable)
        self.register_buffer("weight", weight)

    @property
    def learnable(self) -> bool:
        """Whether ``phi`` is a parameter."""
        return isinstance(self.phi, nn.Parameter)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        check_tensors("ParametricCrossEntropy", logits=logits, target=target)
        dim = 0 if logits.dim() == 1 else 2 if self.phi.dim() == 3 else 1
        if logits.dim() and logits.shape[dim] != self.num_classes:
            raise ValueError(
                f"ParametricCrossEntropy: logits must have num_classes = {self.num_classes} classes in dimension "
                f"{dim}, got {list(logits.shape)}"
            )
        return parametric_cross_entropy(
            logits,
            target,
            self.phi,
            activation=self.activation,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def plot(self) -> Figure:
        r"""Draws :math:`\Phi` as colours; where it is the identity, the loss and its slope.

        A row of the picture is a true class, a column the class that it rewards (above 0) or penalises. The identity
        says nothing as a picture. The loss depends on the probability of the true class alone then, and is drawn over
        it, and beside it its slope in that class's logit. ``weight`` and ``label_smoothing`` are left out.

        Returns:
            A ``matplotlib.figure.Figure``: write it with its ``savefig``.

        Raises:
            ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
            ValueError: where ``phi`` is that of several models.
        """
        phi = self.phi.detach().cpu()
        if phi.dim() != 2:
            raise ValueError(
                f"ParametricCrossEntropy: phi must be [C, C] to be drawn, got {list(phi.shape)}; draw one at a time"
            )
        if not torch.equal(phi, torch.eye(len(phi), dtype=phi.dtype)):
            figure, (panel,) = plot.figure("ParametricCrossEntropy", size=(4.8, 4.0))
            plot.matrix(panel, phi.tolist(), "Φ")
            panel.set_xlabel("class")
            panel.set_ylabel("true class")
            return figure
        p = torch.linspace(0, 1, _plot.POINTS, dtype=torch.float64)[1:-1]
        with torch.enable_grad():
            logits = torch.stack([p.log(), (1 - p).log()], 1).requires_grad_()
            loss = parametric_cross_entropy(
                logits,
                torch.zeros(len(p), dtype=torch.int64),
                torch.eye(2, dtype=p.dtype),
                activation=self.activation,
                reduction="none",
            )
            (slope,) = torch.autograd.grad(loss.sum(), logits)
        values = {"loss": loss.detach(), "slope in the logit of the true class": slope[:, 0]}
        return _plot.panels("ParametricCrossEntropy", p, "probability of the true class", values)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, activation={self.activation!r}, "
            f"learnable={self.learnable}, weighted={self.weight is not None}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"reduction={self.reduction!r}"
        )
