"""Forward correction by a learned class transition matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lossmeta import _checks, plot
from lossmeta.losses._class_indices import Samples, read
from lossmeta.losses._distributions import check_distributions
from lossmeta.losses._outputwise import IGNORED
from lossmeta.losses._parameters import has_hooks
from lossmeta.losses._saved import SavedLoss
from lossmeta.losses.loss_network import LossNetwork

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RAISED = 1e-3  # the most of a row that is moved to entries that were given as 0


class TransitionLoss(SavedLoss):
    r"""Cross-entropy with labels that were flipped from class to class, by a transition matrix that is learned.

    ``transition`` :math:`T_{kj}` is the probability that a sample of class k bears label j. Forward correction (Patrini
    et al., Making Deep Neural Networks Robust to Label Noise, 2017) asks the model for the class, and judges it by what
    is seen, which is the label:

    .. math:: \ell(f, y) = -\log \sum_k p_k T_{ky}, \qquad p = \mathrm{softmax}(f)

    The rows of T are the softmax of those of the parameter ``transition_logits`` [C, C], so that T always is a
    transition matrix; :class:`~lossmeta.adalfl.OnlineLearner` learns it from clean validation batches. The loss is
    computed from logarithms, and is as exact for small probabilities as cross-entropy. Give the parameter an optimizer
    of its own, not the model's (:func:`check_not_minimized` looks).

    With ``shape``, what stands for cross-entropy there is learned too: the network takes :math:`\log(pT)` for logits,
    whose softmax is :math:`pT`.

    .. math:: \ell(f, y) = -\log (pT)_y + \frac1C \sum_{i=1}^C \ell_\phi([i = y], (pT)_i)

    With ``normalize_slope`` it is the shape of the loss that is learned, and not its size, which acts as a learning
    rate: the loss is multiplied on each batch by a factor that makes it as steep in the mean as forward correction with
    the same T, so that it starts as that exactly. For derivatives with respect to the prediction s is a constant. For
    those with respect to the parameters it is not.

    .. math:: s = \frac{\sum |\partial \log (pT)_y / \partial f|}{\sum |\partial \ell / \partial f|}

    There is none without ``shape``. The comparison is not with cross-entropy, as that of :class:`LossNetwork` is: where
    the model has become sure, the slope of forward correction vanishes and that of cross-entropy at a wrong label does
    not, so that the factor would grow without bound.

    Args:
        num_classes: C, at least 2.
        stay: what the diagonal of T starts at, between 1/C and 1; the other classes share the rest of a row.
        transition: what T starts at instead, ``[C, C]``, rows that sum to 1 within 1e-3: an estimate as that of gold
            loss correction. Entries below 1e-3/C start there, because a probability of 0 is not the softmax of
            anything, and those below would hardly be learned.
        shape: ``LossNetwork(residual="cross_entropy")``, of any width and activation, whose weights are learned beside
            T. Its other options are those that it has by default; those of this loss count. A batch needs memory for
            :math:`N C^2` numbers then, and for :math:`NC` without.
        normalize_slope: whether to rescale a loss with ``shape`` in every call, as above; without, learning the shape
            may make training fail. May be set at any time. Where the mean slope is nothing but rounding, as where all
            rows of T are the same, s is 1.
        ignore_index: label that contributes neither loss nor gradient.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over the samples.
        device: where the parameter is made, by default that of ``transition``.
        dtype: dtype of the parameter.

    Shape:
        Logits ``[N, C]``, ``[N, C, d...]`` or ``[C]``, with class indices ``[N]``, ``[N, d...]`` or ``[]``, as
        :class:`torch.nn.CrossEntropyLoss`. Half precision is read as it is; the loss is float32 then.

    Raises:
        ValueError: for an option outside the values above, a ``transition`` whose rows are no probabilities, and when
            called for shapes, dtypes, devices or labels that do not fit. On CUDA, where looking would wait for the
            device, the loss of a label out of range is NaN.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Example:
        >>> criterion = TransitionLoss(3, stay=0.8)
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> criterion(logits, torch.randint(3, (8,))).backward()
        >>> [round(p, 4) for p in criterion.transition[0].tolist()]
        [0.8, 0.1, 0.1]
    """

    DEFINING = ("num_classes", "normalize_slope")
    APPLIED = ("ignore_index", "reduction")
    PARTS: ClassVar[dict[str, type[SavedLoss]]] = {"shape": LossNetwork}

    def __init__(
        self,
        num_classes: int,
        stay: float = 0.9,
        transition: Tensor | None = None,
        *,
        shape: LossNetwork | None = None,
        normalize_slope: bool = False,
        ignore_index: int = IGNORED,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"TransitionLoss: num_classes must be at least 2, got {num_classes}")
        if not 1 / num_classes < stay < 1:
            raise ValueError(
                f"TransitionLoss: stay must lie between 1/num_classes = {1 / num_classes:.3g} and 1, got {stay}"
            )
        _checks.choice("TransitionLoss", "reduction", reduction, _checks.REDUCTIONS)
        if shape is not None:
            _check_shape(shape)
        elif normalize_slope:
            raise ValueError(
                "TransitionLoss: normalize_slope must be False without shape, whose size it would take out, got True"
            )
        self.num_classes = num_classes
        self.normalize_slope = normalize_slope
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.shape = shape
        if transition is None:
            start = torch.full(
                (num_classes, num_classes),
                math.log((1 - stay) / (num_classes - 1)),
                device=device,
                dtype=dtype,
            )
            start.fill_diagonal_(math.log(stay))
        else:
            _check_transition(transition, num_classes)
            start = transition.detach().double().clamp_min(RAISED / num_classes).log()
            start = start.to(
                transition.device if device is None else device, dtype or torch.get_default_dtype()
            )
        self.transition_logits = nn.Parameter(start)

    @property
    def meta_rate(self) -> float:
        """Adam's rate at which it is learned online: 3e-2 for the flips alone; with a shape, whose rate is another, the
        paper's 1e-5.
        """
        return 3e-2 if self.shape is None else 1e-5

    @property
    def transition(self) -> Tensor:
        """T ``[C, C]``, differentiable in the parameter: row k is how the labels of class k are distributed."""
        return self.transition_logits.softmax(1)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        samples = read(
            "TransitionLoss", pred, target, self.ignore_index, (self.num_classes, "the transition")
        )
        _checks.check_same_device("TransitionLoss", transition_logits=self.transition_logits, pred=pred)
        log_t = self.transition_logits.to(samples.logits.dtype).log_softmax(1)
        log_p = samples.logits.log_softmax(1)
        if self.shape is None:
            losses = -(log_p + log_t.t()[samples.labels]).logsumexp(1)
            return samples.reduced(losses, self.reduction)
        log_q = _of_labels(log_p, log_t)
        losses = self.shape.outputwise(log_q, samples.labels)
        losses = losses - log_q.gather(1, samples.labels[:, None]).squeeze(1)
        if self.normalize_slope:
            log_p = log_p.detach()
            losses = losses * self._scale(samples, log_p, log_t, _of_labels(log_p, log_t))
        return samples.reduced(losses, self.reduction)

    def _scale(self, samples: Samples, log_p: Tensor, log_t: Tensor, log_q: Tensor) -> Tensor:
        """Forward correction's mean absolute slope over this loss's; differentiable in the parameters only."""
        assert self.shape is not None
        p, labels = log_p.exp(), samples.labels
        corrected = p - (log_p + log_t.t()[labels]).softmax(1)
        # d log q_j / d f_k = R_kj - p_k, where R_kj is the probability of class k given label j.
        classes = (log_p[:, :, None] + log_t - log_q[:, None]).exp()
        by_label = self.shape._network(log_q, labels)[1]
        own = corrected + (classes * by_label[:, None]).sum(2) - p * by_label.sum(1, keepdim=True)
        corrected, own = (g.where(samples.counts[:, None], 0).abs().sum() for g in (corrected, own))
        steep = own > 8 * torch.finfo(own.dtype).eps * samples.counts.sum()  # else it is nothing but rounding
        return torch.where(steep, corrected / own.where(steep, 1), 1)

    @torch.no_grad()
    def with_mixed_derivative(
        self, pred: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor]]] | None:
        r"""What :func:`~lossmeta.adalfl.meta_gradient` needs, in closed form.

        With the probabilities :math:`r_k = p_k T_{ky} / (pT)_y` of the classes, given the label,

        .. math:: \frac{\partial \ell}{\partial f} = p - r, \qquad
                  \frac{\partial \langle p - r, u \rangle}{\partial \log T_{ky}} = -r_k (u_k - \langle r, u \rangle)

        Returns:
            The loss, its slope in ``pred``, and the function that takes ``u`` to the gradient of <slope, u> in
            ``transition_logits``. ``None`` where a call and autograd must do it: with ``shape``, for other shapes than
            ``[N, C]``, other reductions than the mean, a subclass, a parameter that is frozen or has another dtype than
            ``pred``, and a module with hooks.
        """
        a = self.transition_logits
        if (
            type(self) is not TransitionLoss
            or self.shape is not None
            or self.reduction != "mean"
            or not a.requires_grad
            or a.dtype != pred.dtype
            or pred.dtype not in (torch.float32, torch.float64)
            or pred.dim() != 2
            or has_hooks(self)
        ):
            return None
        samples = read(
            "TransitionLoss", pred, target, self.ignore_index, (self.num_classes, "the transition")
        )
        _checks.check_same_device("TransitionLoss", transition_logits=a, pred=pred)
        log_t = a.log_softmax(1)
        log_p = samples.logits.log_softmax(1)
        joint = log_p + log_t.t()[samples.labels]
        log_q = joint.logsumexp(1)
        classes = (joint - log_q[:, None]).exp()
        count = samples.counts.sum()
        value = samples.reduced(-log_q, "mean")
        slope = (log_p.exp() - classes).where(samples.counts[:, None], 0) / count

        @torch.no_grad()
        def mixed(u: Tensor) -> tuple[Tensor]:
            u = u.where(samples.counts[:, None], 0)
            by_sample = classes * ((classes * u).sum(1, keepdim=True) - u) / count
            by_label = torch.zeros_like(a).index_put_((samples.labels,), by_sample, accumulate=True).t()
            return (by_label - log_t.exp() * by_label.sum(1, keepdim=True),)

        return value, slope, mixed

    def plot(self) -> Figure:
        """Draws the transition matrix as colours: a row is a class, a column a label.

        Returns:
            A ``matplotlib.figure.Figure``: write it with its ``savefig``.

        Raises:
            ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
        """
        figure, (panel,) = plot.figure("TransitionLoss", size=(4.8, 4.0))
        plot.matrix(panel, self.transition.detach().cpu().tolist(), "transition")
        panel.set_xlabel("label")
        panel.set_ylabel("class")
        return figure

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, normalize_slope={self.normalize_slope}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


def _of_labels(log_p: Tensor, log_t: Tensor) -> Tensor:
    """log (p T), ``[S, C]``."""
    return (log_p[:, :, None] + log_t).logsumexp(1)


def _check_transition(transition: Tensor, classes: int) -> None:
    _checks.check_tensors("TransitionLoss", transition=transition)
    _checks.check_float("TransitionLoss", transition=transition)
    if transition.shape != (classes, classes):
        raise ValueError(
            f"TransitionLoss: transition must be [{classes}, {classes}] for num_classes={classes}, "
            f"got {list(transition.shape)}"
        )
    check_distributions(
        "TransitionLoss", "transition", transition, "divide each row, which is one class, by its sum"
    )


def _check_shape(shape: LossNetwork) -> None:
    if type(shape) is not LossNetwork:
        raise TypeError(f"TransitionLoss: shape must be a LossNetwork, got {type(shape).__name__}")
    if shape.residual != "cross_entropy":
        raise ValueError(
            "TransitionLoss: shape must be LossNetwork(residual='cross_entropy'), with which the loss starts as "
            f"forward correction, got residual={shape.residual!r}"
        )
    expected = {"normalize_slope": False, "ignore_index": IGNORED, "label_smoothing": 0, "reduction": "mean"}
    others = {name: getattr(shape, name) for name, value in expected.items() if getattr(shape, name) != value}
    if shape.weight is not None:
        others["weight"] = shape.weight.tolist()
    if others:
        raise ValueError(
            f"TransitionLoss: shape must have only options of its network, got also {others}; give normalize_slope, "
            "ignore_index and reduction to TransitionLoss"
        )
