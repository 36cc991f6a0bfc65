"""Cross-entropy that knows how labels go wrong, and estimates of that."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from lossmeta._checks import check_float, check_number, check_same_device, check_tensors, dtype_name, outside
from lossmeta.losses._classification import ClassificationLoss
from lossmeta.losses._distributions import check_distributions


class ForwardCorrectedLoss(ClassificationLoss):
    r"""Cross-entropy between the labels and what a model of the true class would make of their errors.

    .. math:: \ell = -\log \sum_c p_c\, T_{c y}, \qquad p = \mathrm{softmax}(x)

    :math:`T_{ij}` is the probability that a sample of class i carries the label j. If it is right, the model that is
    best for the wrong labels under this loss is the one that is best for right labels under cross-entropy. At T = I the
    loss is cross-entropy. It is computed from :math:`\log p` and :math:`\log T`, so that small probabilities do not
    vanish. A label that no class of positive probability carries costs infinitely much, with a gradient of 0.

    T comes from knowledge of the labels, from :func:`gold_transition` or from :func:`anchor_transition`. It is a
    buffer: it moves with the module and is in ``state_dict()``, and nothing learns it. Clean samples keep their plain
    cross-entropy beside this loss.

    Args:
        transition: T, ``[C, C]``, whose rows are distributions: at least 0, with sums within 1e-3 of 1 (within two
            units of rounding for bfloat16). It is copied.
        weight: weight per class of the label, ``[C]``.
        ignore_index: label that contributes neither loss nor gradient.
        reduction: ``"none"``, ``"mean"`` (weighted) or ``"sum"``.

    Shape:
        Those of :class:`torch.nn.CrossEntropyLoss` with class indices (int64 or uint8): logits ``[C]``, ``[N, C]`` or
        ``[N, C, d...]``. float64 stays; float32, bfloat16 and float16 are computed and returned in float32.

    Raises:
        ValueError: for a matrix that is not as above or another option outside its values, and when called for shapes,
            dtypes, devices or labels that do not fit. On CUDA, where looking would wait for the device, a label out of
            range makes the loss NaN.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Sources:
        Patrini et al., "Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach" (2017),
        Theorem 2.

    Example:
        >>> flips = torch.tensor([[0.5, 0.5], [0.0, 1.0]])  # half of class 0 is labelled 1
        >>> criterion = lossmeta.losses.ForwardCorrectedLoss(flips)
        >>> criterion(torch.tensor([[40.0, 0.0]]), torch.tensor([1])).exp().item()  # sure of class 0, label 1: 1 / 0.5
        2.0
    """

    transition: Tensor

    def __init__(
        self,
        transition: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        name = type(self).__name__
        check_tensors(name, transition=transition)
        check_float(name, transition=transition)
        if transition.dim() != 2 or len(transition) != transition.shape[1] or not len(transition):
            raise ValueError(
                f"{name}: transition must be [C, C] with C at least 1, got {list(transition.shape)}"
            )
        check_distributions(name, "transition", transition, "divide each by its sum")
        super().__init__(
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            num_classes=(len(transition), "transition"),
        )
        self.register_buffer("transition", transition.detach().clone())

    def of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        # Not a product of matrices, which autocast would round.
        columns = self.transition.to(logits.dtype).T
        log_t = columns[labels].log() if len(labels) < len(columns) else columns.log()[labels]
        terms = logits.log_softmax(1) + log_t
        impossible = terms.detach().amax(1) == -torch.inf
        # There the derivative of logsumexp would be NaN.
        terms = terms.masked_fill(impossible[:, None], 0)
        return -terms.logsumexp(1).masked_fill(impossible, -torch.inf)

    def extra_repr(self) -> str:
        return f"num_classes={len(self.transition)}, {super().extra_repr()}"


def gold_transition(probabilities: Tensor, labels: Tensor) -> Tensor:
    r"""Gold loss correction: estimates how labels go wrong from a few samples whose true class is known.

    .. math:: T_{i \cdot} = \frac{1}{|\{n : y_n = i\}|} \sum_{n : y_n = i} \hat p(\cdot \mid x_n)

    :math:`\hat p` is the softmax of a model that was trained on the wrong labels, on these clean samples. A class that
    does not occur among them is taken to be labelled rightly: its row is that of the identity, with a warning.

    Args:
        probabilities: :math:`\hat p` of the clean samples, ``[N, C]``; rows are distributions.
        labels: their true classes, int64 or uint8, ``[N]``.

    Returns:
        T, ``[C, C]``, for :class:`ForwardCorrectedLoss`: float64 for float64, else float32, computed in float64 on the
        CPU, on the device of the probabilities. Nothing is differentiated.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, rows that are no distributions, and labels outside
            [0, C).
        TypeError: for something that is not a tensor.

    Sources:
        Hendrycks et al., "Using Trusted Data to Train Deep Networks on Labels Corrupted by Severe Noise" (2018).

    Example:
        >>> said = torch.tensor([[0.6, 0.4], [0.8, 0.2], [0.1, 0.9]])
        >>> [[round(t, 2) for t in row] for row in gold_transition(said, torch.tensor([0, 0, 1])).tolist()]
        [[0.7, 0.3], [0.1, 0.9]]
    """
    name = "gold_transition"
    check_tensors(name, probabilities=probabilities, labels=labels)
    p = _checked_probabilities(name, probabilities)
    check_same_device(name, labels=labels, probabilities=probabilities)
    if labels.dtype not in (torch.int64, torch.uint8):
        raise ValueError(f"{name}: labels must be int64 or uint8, got {dtype_name(labels)}")
    if labels.shape != p.shape[:1]:
        raise ValueError(f"{name}: labels must be {list(p.shape[:1])}, got {list(labels.shape)}")
    y, classes = labels.detach().cpu().long(), p.shape[1]
    outside(name, "labels", y, classes)
    chosen = y == torch.arange(classes, device="cpu")[:, None]
    absent = [c for c, occurs in enumerate(chosen.any(1).tolist()) if not occurs]
    if absent:
        warnings.warn(
            f"{name}: labels should hold every class, got none of {absent}; the identity's rows stand in, as if these "
            "classes were labelled rightly; add clean samples of them",
            stacklevel=2,
        )
    rows = chosen.to(p.dtype) @ p
    rows[absent, absent] = 1
    return _as_transition(rows, probabilities)


def anchor_transition(probabilities: Tensor, quantile: float = 1.0) -> Tensor:
    r"""Estimates how labels go wrong from samples of whose class the model is surest, without clean ones.

    .. math:: T_{i \cdot} = \hat p(\cdot \mid x^i), \qquad x^i = \arg\max_n \hat p_i(x_n)

    :math:`\hat p` is the softmax of a model that was trained on the wrong labels. :math:`x^i` stands for a sample that
    belongs to class i beyond doubt: such a sample must exist, and the model must be calibrated on it. A model that has
    learned the wrong labels by heart says the identity.

    Args:
        probabilities: :math:`\hat p`, ``[N, C]``; rows are distributions. The samples need no labels.
        quantile: in (0, 1]. 1 is the sample with the largest :math:`\hat p_i`; the authors took 0.97 where this sample
            was an outlier, on CIFAR-100.

    Returns:
        T, ``[C, C]``, for :class:`ForwardCorrectedLoss`: float64 for float64, else float32, computed in float64 on the
        CPU, on the device of the probabilities. Nothing is differentiated.

    Raises:
        ValueError: for shapes or dtypes that do not fit, no sample, rows that are no distributions and a quantile
            outside (0, 1].
        TypeError: for probabilities that are no tensor and a quantile that is no number.

    Sources:
        Patrini et al., "Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach" (2017).

    Example:
        >>> said = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]])
        >>> anchor_transition(said).tolist()
        [[0.75, 0.25], [0.125, 0.875]]
    """
    name = "anchor_transition"
    check_tensors(name, probabilities=probabilities)
    check_number(name, "quantile", quantile)
    if not 0 < quantile <= 1:
        raise ValueError(f"{name}: quantile must lie in (0, 1], got {quantile}")
    p = _checked_probabilities(name, probabilities)
    if not len(p):
        raise ValueError(f"{name}: probabilities must hold at least one sample, got {list(p.shape)}")
    anchors = p.argsort(stable=True, dim=0)[math.ceil(quantile * len(p)) - 1]
    return _as_transition(p[anchors], probabilities)


def _checked_probabilities(name: str, probabilities: Tensor) -> Tensor:
    """In float64 on the CPU."""
    check_float(name, probabilities=probabilities)
    if probabilities.dim() != 2 or not probabilities.shape[1]:
        raise ValueError(
            f"{name}: probabilities must be [N, C] with C at least 1, got {list(probabilities.shape)}"
        )
    check_distributions(name, "probabilities", probabilities, "of logits take .softmax(1)")
    return probabilities.detach().cpu().double()


def _as_transition(rows: Tensor, like: Tensor) -> Tensor:
    """With sums of 1 to the rounding."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (rows / rows.sum(1, keepdim=True)).to(like.device, dtype)
