"""Parametric cross-entropy (ALA, Eq. 6) as a module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lossmeta import plot
from lossmeta._checks import REDUCTIONS, check_fraction, check_tensors, choice
from lossmeta.losses import _plot
from lossmeta.losses._parameters import register
from lossmeta.losses._saved import SavedLoss
from lossmeta.ops.parametric_cross_entropy import ACTIVATIONS, LowRankPhi, parametric_cross_entropy

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

    A matrix of C² numbers is too much for a vocabulary. With ``rank`` r it is
    :math:`\Phi = \mathrm{diag}(d) + L R^\top`, of which ``phi_diagonal`` [C], ``phi_left`` [C, r] and ``phi_right``
    [C, r] are kept instead of ``phi``. Memory is then O(N C + C r) and time O(N C r). It starts as the identity too:
    ``phi_diagonal`` is 1 and ``phi_left`` 0, while ``phi_right`` is drawn, with columns of norm about 1, so that
    ``phi_left`` has a gradient. With ``rank=0`` :math:`\Phi` is diagonal, and until it is moved the loss is that of
    the plain identity.

    Args:
        num_classes: C.
        rank: r, at least 0, or ``None`` for a matrix.
        activation: ``"sigmoid"`` (the paper's) or ``"identity"``, with which :math:`\Phi = I` is plain
            cross-entropy.
        learnable: whether ``phi``, or its parts, are parameters instead of buffers, for a controller that learns it
            from a validation loss; set it inside ``torch.no_grad()``. Minimising the training loss over it would only
            make the loss meaningless.
        weight: weight per class, ``[C]``.
        ignore_index: label that contributes neither loss nor gradient.
        label_smoothing: in [0, 1].
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        device: where ``phi``, or its parts, are made.
        dtype: their dtype.

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
        >>> criterion = ParametricCrossEntropy(131072, rank=8)  # a matrix would take 69 GB
    """

    DEFINING = ("num_classes", "activation", "rank")
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
        self.num_classes = num_classes
        self.rank = rank
        self.activation = activation
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        if rank is None:
            register(self, "phi", torch.eye(num_classes, device=device, dtype=dtype), learnable)
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
        phi = (
            self.phi
            if self.rank is None
            else LowRankPhi(self.phi_diagonal, self.phi_left, self.phi_right).dense()
        )
        phi = phi.detach().cpu()
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
        rank = "" if self.rank is None else f"rank={self.rank}, "
        return (
            f"num_classes={self.num_classes}, {rank}activation={self.activation!r}, "
            f"learnable={self.learnable}, weighted={self.weight is not None}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"reduction={self.reduction!r}"
        )
