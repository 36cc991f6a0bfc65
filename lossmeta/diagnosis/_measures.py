"""What is measured beside the labels: imbalance, confidence, overfitting, and wrong labels by clean samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lossmeta.diagnosis._intervals import QUANTILE, Interval, difference_of_means, wilson, z_score
from lossmeta.metrics import CalibrationError

LEAST = 1e-12  # a probability below counts as this in a log loss


@dataclass(frozen=True, eq=False)
class Balance:
    """How often each label is given.

    Attributes:
        counts: ``[C]``, int64.
        ratio: the most frequent label's count over the rarest's, of those that occur.
        effective_classes: the exponential of the entropy of the labels: C where they are equally frequent.
        uneven: whether the counts differ by more than chance gives, by 3 standard errors of Pearson's chi-squared.
    """

    counts: Tensor
    ratio: float
    effective_classes: float
    uneven: bool


def balance(labels: Tensor, classes: int) -> Balance:
    counts = labels.bincount(minlength=classes)
    share = counts.double() / len(labels)
    entropy = -float(share.xlogy(share).sum())
    occurring = counts[counts > 0]
    chi_squared = float(((share - 1 / classes) ** 2).sum()) * len(labels) * classes
    uneven = chi_squared > classes - 1 + 3 * math.sqrt(2 * (classes - 1))
    return Balance(counts, int(occurring.max()) / int(occurring.min()), math.exp(entropy), uneven)


@dataclass(frozen=True)
class Confidence:
    """Whether the model is right as often as it says.

    Attributes:
        calibration_error: expected calibration error, 15 bins; chance alone keeps it above 0.
        excess: mean confidence minus the share of predictions that agree with the labels.
        interval: 95 % of ``excess``.
    """

    calibration_error: float
    excess: float
    interval: Interval


def confidence(p: Tensor, labels: Tensor) -> Confidence:
    metric = CalibrationError(logits=False)
    metric.update(p.clamp(max=1), labels)
    top, predicted = p.max(1)
    excess = top - (predicted == labels).double()
    mean = float(excess.mean())
    half = QUANTILE * float(excess.std()) / math.sqrt(len(p)) if len(p) > 1 else math.inf
    return Confidence(float(metric.compute()), mean, (mean - half, mean + half))


@dataclass(frozen=True)
class Overfitting:
    """The samples that a model was trained on against those that it was not.

    Attributes:
        train_loss: log loss (nats) on the former; probabilities below 1e-12 count as that.
        held_out_loss: on the latter.
        loss_gap: held-out minus training.
        loss_interval: 95 % of it.
        train_error: share of predictions that disagree with the labels.
        error_gap: held-out minus training.
        error_interval: 95 % of it.
    """

    train_loss: float
    held_out_loss: float
    loss_gap: float
    loss_interval: Interval
    train_error: float
    error_gap: float
    error_interval: Interval


def overfitting(held_out: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor]) -> Overfitting:
    loss, train_loss = log_losses(*held_out), log_losses(*train)
    error, train_error = errors(*held_out), errors(*train)
    loss_gap, loss_interval = difference_of_means(loss, train_loss)
    error_gap, error_interval = difference_of_means(error, train_error)
    return Overfitting(
        float(train_loss.mean()),
        float(loss.mean()),
        loss_gap,
        loss_interval,
        float(train_error.mean()),
        error_gap,
        error_interval,
    )


@dataclass(frozen=True)
class CleanComparison:
    r"""The model on samples whose labels are right, against those in question.

    With :math:`a` the share of right predictions on the former and :math:`b` that of agreeing ones on the latter, at
    least :math:`1 - b/a` of the labels in question are wrong: :math:`b \ge a (1 - \text{share})` where the model is
    right as often on samples with a wrong label as on others.

    Attributes:
        samples: with right labels.
        error: on them.
        error_interval: 95 %, Wilson's.
        wrong_at_least: :math:`1 - b/a`, below 0 where the model does better on the labels in question.
        interval: 95 % of it, from the logarithm's delta method.
    """

    samples: int
    error: float
    error_interval: Interval
    wrong_at_least: float
    interval: Interval


def compare_with_clean(p: Tensor, labels: Tensor, clean: tuple[Tensor, Tensor]) -> CleanComparison:
    wrong = errors(*clean)
    error, count = float(wrong.mean()), len(wrong)
    a, b = 1 - error, 1 - float(errors(p, labels).mean())
    if not a or not b:
        interval = (-math.inf, 1.0)
        at_least = math.nan if not a else 1.0
    else:
        # At a = 1 the variance would be 0 however few the samples: half a wrong one is added.
        half_wrong = (error * count + 0.5) / (count + 1)
        deviation = math.sqrt((1 - b) / (b * len(p)) + half_wrong / ((1 - half_wrong) * count))
        at_least = 1 - b / a
        interval = (1 - b / a * math.exp(QUANTILE * deviation), 1 - b / a * math.exp(-QUANTILE * deviation))
    return CleanComparison(count, error, wilson(error, count), at_least, interval)


def errors(p: Tensor, labels: Tensor) -> Tensor:
    return (p.argmax(1) != labels).double()


def log_losses(p: Tensor, labels: Tensor) -> Tensor:
    return -p.gather(1, labels[:, None]).squeeze(1).clamp(min=LEAST).log()


def information(p: Tensor, labels: Tensor) -> float:
    """By how many standard errors labels have more probability than they would if drawn by their frequencies."""
    frequencies = labels.bincount(minlength=p.shape[1]).double() / len(labels)
    return z_score(p.gather(1, labels[:, None]).squeeze(1) - p @ frequencies)


def is_hard(p: Tensor) -> bool:
    return bool(torch.all((p == 0) | (p == 1)))
