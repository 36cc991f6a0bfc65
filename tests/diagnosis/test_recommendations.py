"""Recommendations: the situation decides, and every figure stands in docs/results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lossmeta
from lossmeta.diagnosis import Diagnosis, Evidence, _evidence

RESULTS = Path(__file__).parents[2]
ADVICE = [value for value in vars(_evidence).values() if isinstance(value, _evidence.Advice)]
CITED = sorted({evidence for advice in ADVICE for evidence in advice.evidence}, key=str)


# ---- The figures.


def table(evidence: Evidence) -> list[list[str]]:
    """The first table under the heading, as cells."""
    text = (RESULTS / evidence.page).read_text(encoding="utf-8")
    (_, below) = (
        text.split(f"\n### {evidence.table}\n", 1) if f"\n### {evidence.table}\n" in text else ("", "")
    )
    rows: list[list[str]] = []
    for line in below.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows


@pytest.mark.parametrize("evidence", CITED, ids=lambda e: e.table)
def test_figures_stand_in_docs(evidence: Evidence) -> None:
    heading, _, *rows = table(evidence)
    assert heading[1] == evidence.measure
    figures = {row[0]: row[1] for row in rows}
    assert {label: figures[label] for label, _ in evidence.rows} == dict(evidence.rows)


def test_there_is_advice_with_figures_and_without() -> None:
    assert len(ADVICE) == 11 and len(CITED) >= 8
    assert {advice.situation for advice in ADVICE if advice.use == "none"} == {
        _evidence.CONFIDENCE.situation,
        _evidence.NOT_BORNE_OUT.situation,
        _evidence.UNINFORMATIVE.situation,
    }


def test_evidence_reads_as_a_line() -> None:
    line = str(_evidence.QUICKSTART)
    assert line.startswith(
        "docs/results/quickstart.md, Digits with wrong labels, 10 seeds, error (%): cross-entropy 14.98"
    )


# ---- The situations.


def draw(
    size: int = 3000,
    classes: int = 5,
    *,
    strength: float = 7.0,
    noise: str = "",
    rare: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.full((classes,), 1.0)
    if rare:
        weights = 20.0 ** -torch.linspace(0, 1, classes)
    true = torch.multinomial(weights, size, replacement=True, generator=generator)
    logits = torch.randn(size, classes, generator=generator)
    p = (logits + strength * torch.nn.functional.one_hot(true, classes)).softmax(1)
    step = 1 if noise == "pairs" else torch.randint(1, classes, (size,), generator=generator)
    wrong = torch.rand(size, generator=generator) < (0.3 if noise else 0.0)
    return p, torch.where(wrong, (true + step) % classes, true)


CLEAN = draw(300, seed=3)


def told(found: Diagnosis) -> list[tuple[str, str]]:
    by_situation = {advice.situation: name for name, advice in vars(_evidence).items() if advice in ADVICE}
    return [(by_situation[r.situation], r.sureness) for r in found.recommendations]


def test_nothing_wrong_keeps_cross_entropy() -> None:
    found = lossmeta.diagnose(*draw())
    assert told(found) == [("NOTHING", "likely")]
    assert found.recommendations[0].use == "torch.nn.functional.cross_entropy"
    assert told(lossmeta.diagnose(*draw(), clean=CLEAN)) == [("NOTHING", "likely")]


def test_wrong_labels_without_clean_samples() -> None:
    assert told(lossmeta.diagnose(*draw(noise="even"))) == [("EVEN", "likely")]
    found = lossmeta.diagnose(*draw(noise="pairs"))
    assert told(found) == [("TO_CLASS", "possible")]
    assert "look the same" in found.recommendations[0].reason
    assert found.recommendations[0].evidence == ()


def test_wrong_labels_with_clean_samples() -> None:
    assert told(lossmeta.diagnose(*draw(noise="even"), clean=CLEAN)) == [("EVEN_WITH_CLEAN", "shown")]
    assert told(lossmeta.diagnose(*draw(noise="pairs"), clean=CLEAN)) == [("TO_CLASS_WITH_CLEAN", "shown")]


def test_few_clean_samples_leave_it_open() -> None:
    weak = draw(3000, strength=1.5)
    few, many = draw(10, strength=1.5, seed=4), draw(10_000, strength=1.5, seed=4)
    assert told(lossmeta.diagnose(*weak, clean=few))[0][1] == "possible"
    assert told(lossmeta.diagnose(*weak, clean=many))[0] == ("NOT_BORNE_OUT", "shown")
    assert told(lossmeta.diagnose(*weak, clean=many))[-1] == ("NOTHING", "likely")


def test_a_weak_model_alone_makes_wrong_labels_possible_only_where_they_are_not_even() -> None:
    """Where it confuses pairs of classes: 0 with 1, and 2 with 3."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 4
    partner = labels ^ 1
    lead = torch.nn.functional.one_hot(labels, 4) + 0.9 * torch.nn.functional.one_hot(partner, 4)
    p = (torch.randn(4000, 4, generator=generator) + 5 * lead).softmax(1)
    found = lossmeta.diagnose(p, labels)
    assert found.labels.share > 0.1 and found.labels.spread == "class to class"
    assert told(found)[0] == ("TO_CLASS", "possible")


def test_rare_classes() -> None:
    found = lossmeta.diagnose(*draw(rare=True))
    assert told(found) == [("RARE", "shown")]
    found = lossmeta.diagnose(*draw(rare=True, noise="even"))
    assert told(found) == [("WRONG_AND_RARE", "likely"), ("EVEN", "likely")]


def test_overfitting_where_labels_are_right() -> None:
    held_out, train = draw(strength=3), draw(strength=20, seed=1)
    assert ("OVERFITTING", "likely") in told(lossmeta.diagnose(*draw(), train=train))
    near = draw(strength=7, seed=1)
    assert told(lossmeta.diagnose(*draw(), train=near)) == [("NOTHING", "likely")]
    wrong = told(lossmeta.diagnose(*draw(noise="even"), train=train))
    assert wrong == [("EVEN", "likely")]
    assert lossmeta.diagnose(*held_out, train=train).overfitting is not None


def test_a_gap_that_may_be_chance_is_no_overfitting() -> None:
    train = draw(strength=20, seed=1)
    p, labels = draw(2)
    p[0] = torch.eye(5)[(labels[0] + 1) % 5]  # one loss of 27 nats
    found = lossmeta.diagnose(p, labels, train=train)
    assert (
        found.overfitting is not None and found.overfitting.loss_interval[0] < 0 < found.overfitting.loss_gap
    )
    assert all(name != "OVERFITTING" for name, _ in told(found))


def test_confidence() -> None:
    p, labels = draw(strength=2)
    found = lossmeta.diagnose((p.log() * 6).softmax(1), labels, clean=draw(20_000, strength=2, seed=2))
    assert found.confidence.excess > 0.05
    under = (draw()[0] * 0.5) + 0.1
    found = lossmeta.diagnose(under, draw()[1])
    assert told(found) == [("CONFIDENCE", "shown"), ("NOTHING", "likely")]
    assert found.recommendations[0].use == "none"


@pytest.mark.parametrize("classes", [2, 100])
def test_other_numbers_of_classes(classes: int) -> None:
    p, labels = draw(6000, classes, strength=9, noise="even")
    assert told(lossmeta.diagnose(p, labels))[0] == ("EVEN", "likely")
    assert told(lossmeta.diagnose(*draw(6000, classes, strength=12)))[-1] == ("NOTHING", "likely")
