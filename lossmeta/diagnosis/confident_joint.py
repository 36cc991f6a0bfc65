"""How given and true labels go together, counted where a model is confident."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossmeta.diagnosis._inputs import checked_labels, checked_probabilities
from lossmeta.diagnosis._intervals import Interval, wilson
from lossmeta.diagnosis._spread import spread

NAME = "confident_joint"
# A mean of equal numbers may come out a rounding error above all of them.
ROUNDING = 1e-8


@dataclass(frozen=True, eq=False)
class ConfidentJoint:
    """The joint distribution of true and given labels, as :func:`confident_joint` estimates it.

    Attributes:
        joint: ``[C, C]``, float64, sums to 1; ``joint[i, j]`` is the share of samples of true class i with label j.
        transition: ``[C, C]``, float64, rows sum to 1; ``transition[i, j]`` is P(label j | true class i). A class that
            no sample is counted for has the row of the identity.
        thresholds: ``[C]``, float64, the mean self-confidence of each class; infinite for a class without labels.
        share: of labels that are wrong, the mass of ``joint`` off its diagonal.
        interval: 95 % of ``share``, for chance alone: other samples of the same kind, under the same thresholds. It
            knows nothing of the bias of the estimate.
        concentration: the share of the wrong labels that went to the most frequent wrong label of their true class:
            1 / (C - 1) where they spread evenly, 1 where each class is taken for one other. With two classes it is the
            higher of the two rates over their sum, 1/2 where they are equal. NaN without wrong labels.
        spread: ``"even"``, ``"class to class"``, ``"mixed"`` between these, or ``"unknown"`` where there are too few
            wrong labels to tell.
        confident: number of samples that were counted.
        suspects: ``[S]``, int64, the samples whose label differs from the class that they were counted for, the least
            self-confident first.
        suggested: ``[S]``, int64, the class that each of them was counted for.
    """

    joint: Tensor
    transition: Tensor
    thresholds: Tensor
    share: float
    interval: Interval
    concentration: float
    spread: str
    confident: int
    suspects: Tensor
    suggested: Tensor


def confident_joint(probabilities: Tensor, labels: Tensor) -> ConfidentJoint:
    r"""Confident learning: which labels are wrong, and which classes are taken for which.

    A class's threshold :math:`t_j` is the mean of :math:`p_j` over the samples with label j. A sample counts for the
    class of the highest probability among those with :math:`p_j \ge t_j`; where there is none it does not count. The
    counts of each label are scaled to the number of samples that have it, and all of them to 1. A tie goes to the
    label, else to the lower class. Where no sample of a label counts, its samples count as right.

    Args:
        probabilities: ``[N, C]``, a tensor or a NumPy array; of a model that has not seen the samples.
        labels: ``[N]``, integers in [0, C).

    Returns:
        The estimate. Classes that overlap look like wrong labels to it, and so do classes that the model confuses.

    Raises:
        TypeError: for something that is no tensor or array.
        ValueError: for shapes and dtypes that do not fit, no samples, fewer than two classes, labels out of range, NaN,
            and rows that are no distribution.

    Sources:
        Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels" (2021).

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]])
        >>> found = lossmeta.diagnosis.confident_joint(p, torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> found.suspects.tolist(), found.suggested.tolist()
        ([2], [1])
    """
    p = checked_probabilities(NAME, probabilities)
    return estimate(p, checked_labels(NAME, labels, p))


def estimate(p: Tensor, labels: Tensor) -> ConfidentJoint:
    """The same for float64 probabilities and int64 labels that are known to be in order."""
    size, classes = p.shape
    own = p.gather(1, labels[:, None]).squeeze(1)
    counts = labels.bincount(minlength=classes).double()
    thresholds = p.new_zeros(classes).index_add_(0, labels, own) / counts
    thresholds = thresholds.where(counts > 0, torch.inf)

    candidates = p.where(p >= thresholds - ROUNDING, -1.0)
    best, place = candidates.max(1)
    at_label = candidates.gather(1, labels[:, None]).squeeze(1)
    place = labels.where(at_label == best, place)
    counted = best > 0  # a threshold may be 0, which is no confidence

    cells = (place * classes + labels)[counted].bincount(minlength=classes**2).double()
    cells = cells.view(classes, classes)
    of_label = cells.sum(0)
    cells = cells + torch.diag((of_label == 0).double() * counts)
    joint = cells * (counts / cells.sum(0).where(counts > 0, 1.0) / size)
    true = joint.sum(1, keepdim=True)
    identity = torch.eye(classes, dtype=torch.float64, device=p.device)
    transition = torch.where(true > 0, joint / true.where(true > 0, 1.0), identity)

    share = float((joint - torch.diag(joint.diagonal())).sum().clamp(0, 1))
    concentration, kind = spread(joint, transition, size)
    # A mean over labels of shares of binomial counts, as if of one common share: so many samples would know as much.
    known = of_label > 0
    effective = 1 / float(((counts[known] / size) ** 2 / of_label[known]).sum())
    wrong = (counted & (place != labels)).nonzero().squeeze(1)
    suspects = wrong[own[wrong].argsort(stable=True)]
    return ConfidentJoint(
        joint=joint,
        transition=transition,
        thresholds=thresholds,
        share=share,
        interval=wilson(share, effective),
        concentration=concentration,
        spread=kind,
        confident=int(counted.sum()),
        suspects=suspects,
        suggested=place[suspects],
    )
