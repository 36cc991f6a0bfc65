"""From what was measured to what to use.

Thresholds, and where they come from (docs/results/diagnose.md has the measurements):

- ``WRONG`` 5 % wrong labels, by the lower end of the interval. On clean digits and MNIST the estimate was at most 4 %.
  It may be 30 % and more where a model is weak, so that a spread which is not even counts as possible, not as likely.
- ``RARE`` 5 : 1, between the even classes and the 20 : 1 of docs/results/ala.md, by the labels or, where they may be
  wrong, by the estimate of the true classes: ten classes at 20 : 1 look like 6 : 1 where 30 % are redrawn over all.
- ``OVERFITTING`` a training loss below half of the held-out one, and a gap above 0. A convention.
- ``CALIBRATION`` 5 points of confidence. A convention.
- ``INFORMATIVE`` 3 standard errors.
"""

from __future__ import annotations

from dataclasses import dataclass

from lossmeta.diagnosis import _evidence as evidence
from lossmeta.diagnosis._measures import Balance, CleanComparison, Confidence, Overfitting
from lossmeta.diagnosis.confident_joint import ConfidentJoint

WRONG = 0.05
RARE = 5.0
OVERFITTING = 0.5
CALIBRATION = 0.05
INFORMATIVE = 3.0


@dataclass(frozen=True)
class Recommendation:
    """What to use against one fault, and why.

    Attributes:
        situation: what seems to be wrong.
        use: names of losses and controllers of this package, ``"none"`` where none helps.
        sureness: of the situation: ``"shown"`` by clean samples or by counting, ``"likely"`` where the measurement has
            one usual cause, ``"possible"`` where it has several, which it cannot tell apart.
        reason: the figures of these data, and what they leave open.
        note: what the evidence does and does not say.
        evidence: the figures of docs/results; empty where there are none.
    """

    situation: str
    use: str
    sureness: str
    reason: str
    note: str
    evidence: tuple[evidence.Evidence, ...]


def recommend(
    informative: bool,
    labels: ConfidentJoint,
    balance: Balance,
    confidence: Confidence,
    overfitting: Overfitting | None,
    clean: CleanComparison | None,
) -> tuple[Recommendation, ...]:
    """Recommendations, the most pressing first; at least one."""
    found: list[Recommendation] = []
    wrong = _wrong_labels(labels, clean) if informative else None
    rarity = f"the most frequent label is {balance.ratio:.3g} times as frequent as the rarest"
    rare = balance.uneven and balance.ratio >= RARE
    if wrong is not None and balance.uneven:  # wrong labels make rare classes look less so
        estimated = _ratio_of_true_classes(labels)
        rare = rare or estimated >= RARE
        rarity += f", the true classes by estimate {estimated:.3g}"
    if not informative:
        reason = "the labels get no more probability than if they were drawn by their frequencies"
        found.append(_of(evidence.UNINFORMATIVE, "likely", reason))
    if wrong is not None:
        advice, sureness, reason = wrong
        if rare and advice is not evidence.NOT_BORNE_OUT:
            found.append(_of(evidence.WRONG_AND_RARE, sureness, f"{reason}; {rarity}"))
            rare = False
        found.append(_of(advice, sureness, reason))
    if rare:
        found.append(_of(evidence.RARE, "shown", rarity))
    # Wrong labels make a model overfit and its confidence wrong: they come first.
    if wrong is None and overfitting is not None and overfits(overfitting):
        reason = (
            f"log loss {overfitting.train_loss:.3g} in training, {overfitting.held_out_loss:.3g} held out"
        )
        found.append(_of(evidence.OVERFITTING, "likely", reason))
    if wrong is None and informative and miscalibrated(confidence):
        reason = f"mean confidence minus share of agreeing predictions is {confidence.excess:+.3f}"
        found.append(_of(evidence.CONFIDENCE, "shown", reason))
    if informative and (wrong is None or wrong[0] is evidence.NOT_BORNE_OUT) and _none_helps(found):
        found.append(_of(evidence.NOTHING, "likely", f"{_share(labels)}; {rarity}"))
    return tuple(found)


def overfits(gap: Overfitting) -> bool:
    return gap.loss_interval[0] > 0 and gap.train_loss < OVERFITTING * gap.held_out_loss


def miscalibrated(confidence: Confidence) -> bool:
    low, high = confidence.interval
    return abs(confidence.excess) >= CALIBRATION and not low <= 0 <= high


def _none_helps(found: list[Recommendation]) -> bool:
    return all(recommendation.use == "none" for recommendation in found)


def _wrong_labels(
    labels: ConfidentJoint, clean: CleanComparison | None
) -> tuple[evidence.Advice, str, str] | None:
    """Advice, sureness and reason where labels may be wrong."""
    to_class = labels.spread == "class to class"
    reason = f"{_share(labels)}, spread: {labels.spread}"
    noticed = labels.interval[0] >= WRONG
    if clean is None:
        if not noticed:
            return None
        if labels.spread == "even":
            weak = "a weak model raises the estimate, and one that confuses all classes alike looks the same"
            return evidence.EVEN, "likely", f"{reason}; {weak}"
        reason += "; overlapping or confused classes look the same: check the suspects, or give clean samples"
        return evidence.TO_CLASS if to_class else evidence.EVEN, "possible", reason
    low, high = clean.interval
    reason += f"; by the clean samples at least {clean.wrong_at_least:.1%} [{low:.1%}, {high:.1%}]"
    advice = evidence.TO_CLASS_WITH_CLEAN if to_class else evidence.EVEN_WITH_CLEAN
    if low > 0 and (noticed or low >= WRONG):
        return advice, "shown", reason
    if not noticed:
        return None
    if high < WRONG:
        return evidence.NOT_BORNE_OUT, "shown", reason
    return advice, "possible", f"{reason}: too few of them to tell"


def _ratio_of_true_classes(labels: ConfidentJoint) -> float:
    shares = labels.joint.sum(1)
    found = shares[shares > 0]
    return float(found.max() / found.min())


def _share(labels: ConfidentJoint) -> str:
    low, high = labels.interval
    return f"an estimated {labels.share:.1%} [{low:.1%}, {high:.1%}] of the labels are wrong"


def _of(advice: evidence.Advice, sureness: str, reason: str) -> Recommendation:
    return Recommendation(advice.situation, advice.use, sureness, reason, advice.note, advice.evidence)
