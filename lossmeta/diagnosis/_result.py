"""A diagnosis, and how it reads."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lossmeta.diagnosis import _measures as measures
from lossmeta.diagnosis._intervals import Interval
from lossmeta.diagnosis._recommendation import Recommendation
from lossmeta.diagnosis.confident_joint import ConfidentJoint

WIDTH = 100
FLIPS = 5  # of the most frequent pairs of classes, and of suspects
LEAST_SHOWN = 5e-4  # 0.1 % when rounded


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What :func:`lossmeta.diagnose` found; ``print`` shows it.

    Attributes:
        samples: N.
        classes: C.
        error: share of predictions that disagree with the labels.
        error_interval: 95 % of it, Wilson's.
        informative: whether the predictions know anything of the labels.
        labels: an estimate of which labels are wrong.
        balance: how often each label is given.
        confidence: whether the model is right as often as it says.
        overfitting: held-out against training samples, where the latter were given.
        clean: the model on samples with right labels, where they were given.
        warnings: what makes these figures unsure.
        recommendations: what to use, the most pressing first; at least one.
    """

    samples: int
    classes: int
    error: float
    error_interval: Interval
    informative: bool
    labels: ConfidentJoint
    balance: measures.Balance
    confidence: measures.Confidence
    overfitting: measures.Overfitting | None
    clean: measures.CleanComparison | None
    warnings: tuple[str, ...]
    recommendations: tuple[Recommendation, ...]

    def __str__(self) -> str:
        return report(self)


def report(found: Diagnosis) -> str:
    lines = [f"{found.samples} samples, {found.classes} classes", ""]
    lines += [f"{name:<22}{value}" for name, value in _figures(found)]
    for warning in found.warnings:
        lines += ["", *_wrapped(f"Warning: {warning}")]
    for number, advice in enumerate(found.recommendations, 1):
        lines += ["", *_wrapped(f"{number}. {advice.situation} ({advice.sureness})")]
        texts = [f"use: {advice.use}", f"because {advice.reason}", advice.note, *map(str, advice.evidence)]
        for text in texts:
            lines += _wrapped(text, "   ")
    return "\n".join(lines)


def _figures(found: Diagnosis) -> Iterator[tuple[str, str]]:
    labels, confidence, balance = found.labels, found.confidence, found.balance
    yield "held-out error", f"{found.error:.1%} {_percent(found.error_interval)}"
    yield (
        "wrong labels",
        f"{labels.share:.1%} {_percent(labels.interval)} by estimate, often too high; spread: {labels.spread}",
    )
    if flips := _largest_flips(found):
        yield "  most frequent", flips
    if len(labels.suspects):
        first = ", ".join(str(i) for i in labels.suspects[:FLIPS].tolist())
        yield "  suspects", f"{len(labels.suspects)} samples, first {first}"
    if found.clean is not None:
        at_least = f"at least {found.clean.wrong_at_least:.1%} {_percent(found.clean.interval)}"
        yield (
            "  by clean samples",
            f"{at_least}; error on {found.clean.samples} clean samples {found.clean.error:.1%}",
        )
    yield "imbalance", f"{balance.ratio:.3g} : 1, {balance.effective_classes:.1f} effective classes"
    excess = f"confidence minus accuracy {confidence.excess:+.1%} {_percent(confidence.interval)}"
    yield "calibration error", f"{confidence.calibration_error:.1%}; {excess}"
    if found.overfitting is not None:
        gap = found.overfitting
        losses = f"log loss {gap.train_loss:.3f} in training, {gap.held_out_loss:.3f} held out"
        low, high = gap.loss_interval
        yield "overfitting", f"{losses}, gap {gap.loss_gap:.3f} [{low:.3f}, {high:.3f}]"
        yield (
            "",
            f"error {gap.train_error:.1%} in training, gap {gap.error_gap:.1%} {_percent(gap.error_interval)}",
        )


def _largest_flips(found: Diagnosis) -> str:
    joint = found.labels.joint.clone().fill_diagonal_(0)
    values, cells = torch.sort(joint.flatten(), descending=True, stable=True)
    flips = []
    for value, cell in zip(values[:FLIPS].tolist(), cells[:FLIPS].tolist(), strict=True):
        if value >= LEAST_SHOWN:
            true, given = divmod(cell, found.classes)
            flips.append(f"{true} as {given} {value:.1%}")
    return ", ".join(flips)


def _percent(interval: Interval) -> str:
    return f"[{interval[0]:.1%}, {interval[1]:.1%}]"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "   ")
