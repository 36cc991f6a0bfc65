"""The recipes of the ALA paper's tables: every row trains, and none sees what it may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import TINY
from torch import Tensor

from lossmeta.ala import ClassCorrelation
from lossmeta.experiments import Diverged, Method, Trial, Tuned, run_folder
from lossmeta.metrics import AveragePrecision
from lossmeta.models import resnet32
from lossmeta.recipes import (
    _ala_images,
    _ala_rules,
    ala_ablations,
    ala_cifar10_aucpr,
    ala_cifar10_error,
    recipes,
)
from lossmeta.recipes._ala_controlled import Adaptive
from lossmeta.recipes._ala_images import (
    PAPER,
    SMALL,
    ImageFit,
    best_of,
    draw,
)
from lossmeta.recipes._ala_methods import population
from lossmeta.recipes._ala_pbt import Member, exploit_and_explore, population_based_training
from lossmeta.recipes._ala_rules import by_rule
from lossmeta.recipes._ala_tables import PaperTable
from lossmeta.recipes._ala_tasks import CLEAN, OfProbabilities, Problem
from lossmeta.recipes._ala_tuning import tuned

pytestmark = pytest.mark.usefixtures("images")
CPU = torch.device("cpu")
MakeTrial = Callable[..., Trial]
TABLES: list[PaperTable] = [*ala_cifar10_error.RECIPES, *ala_cifar10_aucpr.RECIPES, *ala_ablations.RECIPES]


def methods() -> list[Any]:
    """Every row of every table, at one setting."""
    return [
        pytest.param(table.problem, row, id=f"{table.name}: {row.label}")
        for table in TABLES
        for row in table.rows(TINY)
    ]


def rows(part: tuple[Tensor, Tensor]) -> set[tuple[float, ...]]:
    return {tuple(row) for row in part[0].flatten(1).tolist()}


def test_data() -> None:
    drawn = draw(CLEAN, TINY, 3, CPU)
    assert [len(part[1]) for part in (drawn.train, drawn.valid, drawn.test)] == [160, 80, 90]
    assert drawn.train[0].shape[1:] == (3, 8, 8)
    assert len(rows(drawn.train) | rows(drawn.valid) | rows(drawn.test)) == 160 + 80 + 90
    again, other = draw(CLEAN, TINY, 3, CPU), draw(CLEAN, TINY, 4, CPU)
    assert torch.equal(again.train[0], drawn.train[0])
    assert not torch.equal(other.test[0], drawn.test[0])


@pytest.mark.parametrize(("problem", "method"), methods())
def test_rows(problem: Problem, method: Method, make_trial: MakeTrial) -> None:
    """Each trains; the test part decides nothing."""
    drawn = draw(problem, TINY, 0, CPU)
    hidden = replace(drawn, test=drawn.valid)
    found = [method.train(make_trial(data, steps=24)) for data in (drawn, hidden)]
    assert found[0]["validation"] == found[1]["validation"]
    name = problem.measure.name
    sign = 1 if problem.measure.higher_is_better else -1
    assert 0 < found[0][name] < 1  # type: ignore[operator]
    assert found[1][name] == sign * found[1]["validation"]  # type: ignore[operator]


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.name)
def test_rows_at_both_sizes(table: PaperTable) -> None:
    """The paper's size has one setting of each row, the small one chooses; the paper's figures belong to rows."""
    labels = {row.label for row in table.rows(SMALL)}
    assert {row.label.replace("10 networks", "4 networks") for row in table.rows(PAPER)} == labels
    assert not any(isinstance(row, Tuned) for row in table.rows(PAPER))
    assert table.reported.keys() <= labels
    assert set(table.reference) <= labels


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.name)
def test_the_recipe(
    table: PaperTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    chosen = replace(TINY, rates=(0.01, 0.03), window=2)
    monkeypatch.setitem(_ala_images.SETTINGS, "small", chosen)
    status = recipes()[table.name].run(size="small", seeds=1, steps=3, device="cpu", output=tmp_path)
    run = run_folder.read(tmp_path)
    assert status == 0
    assert {t.method for t in run.trials if t.role == "report"} == {row.label for row in table.rows(chosen)}
    assert {t.seed for t in run.trials if t.role == "tuning"} == {10_000}
    assert "paper" in capsys.readouterr().out


def test_the_paper_s_size(make_trial: MakeTrial) -> None:
    """ResNet-32 with augmentation, three steps."""
    assert PAPER.model is resnet32 and PAPER.augment
    setting = replace(PAPER, rows=(60, 20), test=20, batch=8, children=2)
    trial = make_trial(draw(CLEAN, setting, 0, CPU), steps=3)
    for method in (
        by_rule("", _ala_rules.LargeMargin, 0.1, least_ease=0.0),
        by_rule("", _ala_rules.SelfPaced, 0.1),
        Adaptive(children=2).method("", 0.1, 1.0),
        population_based_training("", 0.1, 2),
        population("", 0.1, children=2, new_fit=ImageFit),
    ):
        assert 0 <= method.train(trial)["error"] <= 1  # type: ignore[operator]


def test_networks_share_batches_but_not_weights(make_trial: MakeTrial) -> None:
    trial = make_trial(draw(CLEAN, TINY, 0, CPU), steps=8)
    fits = [ImageFit(trial, 0.1, child) for child in (0, 1, 0)]
    first, second, again = (next(fit.model.parameters()) for fit in fits)
    assert torch.equal(first, again) and not torch.equal(first, second)
    for (_, x, _), (_, other, _) in zip(fits[0].batches(), fits[1].batches(), strict=True):
        assert torch.equal(x, other)


def test_the_rate_drops_after_half_and_three_quarters(make_trial: MakeTrial) -> None:
    fit = ImageFit(make_trial(draw(CLEAN, TINY, 0, CPU), steps=8), 1.0)
    rates = [fit.optimizer.param_groups[0]["lr"] for _ in fit.batches()]
    assert rates == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)


def test_probabilities_are_compared_and_not_logits() -> None:
    logits, labels = torch.randn(20, 4), torch.arange(20) % 4
    metric = OfProbabilities(AveragePrecision())
    moved = logits + torch.randn(20, 1)
    found = metric.each(torch.stack([logits, moved]), labels)
    torch.testing.assert_close(found[0], found[1])
    assert found[0] == AveragePrecision()(logits.softmax(1), labels)


def test_one_setting_is_not_tuned() -> None:
    def make(label: str, rate: float) -> Method:
        return Method(label, lambda trial: {}, {"kind": "any", "rate": rate})

    assert isinstance(tuned("row", TINY, make, {"rate": (0.1, 0.2)}), Tuned)
    one = tuned("row", TINY, make, {"rate": (0.1,)})
    assert isinstance(one, Method) and one.label == "row" and one.settings["rate"] == 0.1


def test_the_best_network_is_one_that_did_not_diverge(make_trial: MakeTrial) -> None:
    trial = make_trial(draw(CLEAN, TINY, 0, CPU), steps=4)
    fits = [ImageFit(trial, 0.1, child) for child in (0, 1)]
    with torch.no_grad():
        next(fits[0].model.parameters()).fill_(torch.nan)
    assert best_of(fits) is fits[1]
    with pytest.raises(Diverged):
        best_of(fits[:1])


def test_controls_of_the_controller(make_trial: MakeTrial) -> None:
    """A policy that a run begins with is learned once, and is copied."""
    trial = make_trial(draw(CLEAN, TINY, 0, CPU), steps=16)
    learned = Adaptive(policy="first run")
    first, again = (learned.method("", 0.1, 0.5).train(trial) for _ in range(2))
    assert first == again and len(trial.scratch) == 1
    frozen = Adaptive(policy="first run", learn=False).method("", 0.1, 0.5).train(trial)
    assert len(trial.scratch) == 1 and frozen["error"] > 0  # type: ignore[operator]
    Adaptive(policy="digits", learn=False).method("", 0.1, 0.5).train(trial)
    assert len(trial.scratch) == 2


def test_exploit_and_explore(make_trial: MakeTrial) -> None:
    trial = make_trial(draw(CLEAN, TINY, 0, CPU), steps=4)
    space = ClassCorrelation(10, lowest=0.0)
    members = [
        Member(ImageFit(trial, 0.1, child), space, torch.full((55,), float(child))) for child in range(4)
    ]
    for member in members:
        for _, x, y in member.fit.batches():
            member.fit.step(member.loss()(member.fit.model(x), y))
    rate = members[0].fit.optimizer.param_groups[0]["lr"]
    replaced = exploit_and_explore(members, [0.3, 0.1, 0.9, 0.5], torch.Generator().manual_seed(0))
    assert replaced == [1]
    loser, winner = members[1], members[2]
    for a, b in zip(loser.fit.model.parameters(), winner.fit.model.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b
        assert torch.equal(
            loser.fit.optimizer.state[a]["momentum_buffer"], winner.fit.optimizer.state[b]["momentum_buffer"]
        )
    assert loser.fit.optimizer.param_groups[0]["lr"] / rate in (pytest.approx(0.8), pytest.approx(1.2))
    moved = (loser.place - winner.place)[:10]
    assert set(moved.tolist()) <= {-1.0, 0.0, 1.0} and len(set(moved.tolist())) > 1
    assert loser.loss().values["pairs"].min() >= 0
