"""Figures of the ALA paper that its recipes draw: when they are written, and what they show."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import TINY

from lossmeta.ala import ClassCorrelation, DistanceMixture, Schedule
from lossmeta.experiments import Measure, Trial
from lossmeta.experiments.records import Header, Record, Run, TaskHeader
from lossmeta.losses import DistanceMixtureLoss
from lossmeta.recipes import (
    _ala_images,
    _ala_rules,
    ala_ablations,
    ala_cifar10_aucpr,
    ala_cifar10_error,
)
from lossmeta.recipes._ala_controlled import Adaptive
from lossmeta.recipes._ala_curves import CURVES, FIGURE, Curve, loss_against_metric, watch_first_seed
from lossmeta.recipes._ala_images import ImageFit, draw
from lossmeta.recipes._ala_methods import controller
from lossmeta.recipes._ala_phi import (
    DISTANCES,
    ENTRIES,
    MATRICES,
    draw_class_correlations,
    draw_mixture,
    entries,
    matrices,
)
from lossmeta.recipes._ala_reward_design import reward_design
from lossmeta.recipes._ala_rules import by_rule
from lossmeta.recipes._ala_tasks import CLEAN

pytestmark = pytest.mark.usefixtures("figures")
CPU = torch.device("cpu")
PNG = b"\x89PNG"
MakeTrial = Callable[..., Trial]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- Loss against metric (Figures 1 and 5).


def watched(row: str) -> Any:
    return by_rule("", _ala_rules.CrossEntropy, 0.03, watching=partial(watch_first_seed, row=row))


def test_curves_of_a_training(images: None, make_trial: MakeTrial, tmp_path: Path) -> None:
    """They end where the training does, and training is as without them."""
    trial = make_trial(draw(CLEAN, TINY, 0, CPU), steps=101)
    found = watched("plain").train(trial)
    assert found == by_rule("", _ala_rules.CrossEntropy, 0.03).train(trial)
    assert names(tmp_path) == {CURVES, FIGURE} and (tmp_path / FIGURE).read_bytes().startswith(PNG)
    curve = json.loads((tmp_path / CURVES).read_text())["plain"]
    assert curve["steps"] == [*range(3, 100, 3), 101]
    assert {len(values) for values in curve.values()} == {34}
    assert curve["metric"][-1] == found["error"]
    fit, losses = ImageFit(trial, 0.03), []
    for _, x, y in fit.batches():
        losses.append(torch.nn.functional.cross_entropy(fit.model(x), y))
        fit.step(losses[-1])
        if len(losses) == 3:
            assert curve["trained"][0] == pytest.approx(sum(v.item() for v in losses) / 3)
    assert curve["trained"][-1] == pytest.approx(sum(v.item() for v in losses[99:]) / 2)
    with torch.no_grad():
        held_out = torch.nn.functional.cross_entropy(fit.model(fit.drawn.valid[0]), fit.drawn.valid[1])
    assert curve["validation"][-1] == pytest.approx(held_out.item(), rel=1e-5)


def test_rows_share_a_figure(images: None, make_trial: MakeTrial, tmp_path: Path) -> None:
    trial = make_trial(draw(CLEAN, TINY, 0, CPU), steps=8)
    watched("a").train(trial)
    adapted = Adaptive(children=2).method("", 0.1, 0.5, watching=partial(watch_first_seed, row="b"))
    found = adapted.train(trial)
    assert found == Adaptive(children=2).method("", 0.1, 0.5).train(trial)
    known = json.loads((tmp_path / CURVES).read_text())
    assert list(known) == ["a", "b"]
    # Eq. 6 lies between -1 and 0.
    assert min(known["a"]["trained"]) > 0 > max(known["b"]["trained"])


def test_only_the_first_seed_is_watched(images: None, make_trial: MakeTrial, tmp_path: Path) -> None:
    watched("a").train(make_trial(draw(CLEAN, TINY, 1, CPU), seed=1, steps=4))
    assert names(tmp_path) == set()


def test_a_training_that_diverges_has_the_curves_of_before(
    images: None, make_trial: MakeTrial, tmp_path: Path
) -> None:
    fit = ImageFit(make_trial(draw(CLEAN, TINY, 0, CPU), steps=4), 0.03)
    watch = watch_first_seed(fit, "a")
    assert watch is not None
    watch(0, torch.tensor(1.0))
    with torch.no_grad():
        next(fit.model.parameters()).fill_(torch.nan)
    for i in range(1, 4):
        watch(i, torch.tensor(1.0))
    assert json.loads((tmp_path / CURVES).read_text())["a"]["steps"] == [1]


def test_loss_against_metric() -> None:
    curves = {
        "a": Curve([10, 20, 30], [2.0, 1.0, 1.5], [2.2, 1.2, 1.3], [0.5, 0.4, 0.3]),
        "b": Curve([10, 20], [-0.1, -0.9], [2.0, 5.0], [0.6, 0.7]),
    }
    figure = loss_against_metric(curves, Measure("error", higher_is_better=False, percent=True))
    held_out, tested, mismatch = figure.axes
    for axes in figure.axes:
        assert [line.get_label() for line in axes.get_lines()] == ["a", "b"]
    assert held_out.get_ylabel() == "cross-entropy, validation"
    assert tested.get_ylabel() == mismatch.get_ylabel() == "test error (%)"
    assert held_out.get_xlabel() == tested.get_xlabel() == "training step"
    assert mismatch.get_xlabel() == "loss that is minimised, scaled to [0, 1]"
    a, b = mismatch.get_lines()
    assert a.get_xdata().tolist() == pytest.approx([1, 0, 0.5])  # type: ignore[union-attr]
    assert b.get_xdata().tolist() == pytest.approx([1, 0])  # type: ignore[union-attr]
    assert a.get_ydata().tolist() == pytest.approx([50, 40, 30])  # type: ignore[union-attr]
    assert held_out.get_lines()[0].get_ydata().tolist() == [2.2, 1.2, 1.3]  # type: ignore[union-attr]
    assert held_out.get_legend() is not None
    constant = {"a": Curve([1], [2.0], [1.0], [0.5])}
    assert loss_against_metric(constant, Measure("AUCPR", True)).axes[1].get_ylabel() == "test AUCPR"


# ---- Phi over the training (Figures S2 and S3).


def of_pairs(windows: int) -> Schedule:
    space = ClassCorrelation(3)
    pairs = [[0.1 * w, 0.0, -0.02 * w] for w in range(1, windows + 1)]
    return Schedule(space, [20 * w for w in range(1, windows + 1)], {"pairs": pairs})


def test_matrices() -> None:
    figure = matrices(of_pairs(9))
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title() for axes in panels] == [f"after step {s}" for s in (40, 60, 100, 180)]
    assert all(axes.get_xlabel() == "class" for axes in panels) and panels[0].get_ylabel() == "true class"
    for axes, window in zip(panels, (2, 3, 5, 9), strict=True):
        (picture,) = axes.get_images()
        a, b = 0.1 * window, -0.02 * window
        expected = torch.tensor([[0, a, 0], [a, 0, b], [0, b, 0]])
        torch.testing.assert_close(torch.as_tensor(picture.get_array()).float(), expected)
        assert picture.get_clim() == pytest.approx((-0.9, 0.9))
    few = matrices(of_pairs(2))
    assert len([axes for axes in few.axes if axes.get_images()]) == 2


def test_entries() -> None:
    figure = entries(of_pairs(3))
    diagonal, pairs = figure.axes
    assert (diagonal.get_title(), pairs.get_title()) == ("diagonal", "pairs")
    assert all((a.get_xlabel(), a.get_ylabel()) == ("training step", "Φ") for a in figure.axes)
    assert len(diagonal.get_lines()) == len(pairs.get_lines()) == 3
    line = pairs.get_lines()[0]
    assert line.get_xdata().tolist() == [0, 20, 40, 60]  # type: ignore[union-attr]
    assert line.get_ydata().tolist() == pytest.approx([0, 0.1, 0.2, 0.3])  # type: ignore[union-attr]
    assert diagonal.get_lines()[0].get_ydata().tolist() == [1, 1, 1, 1]  # type: ignore[union-attr]
    assert pairs.get_legend() is None


def test_entries_of_a_mixture_are_named() -> None:
    phi = torch.tensor([DistanceMixture().parameters[0].default] * 2)
    (axes,) = entries(Schedule(DistanceMixture(), [5, 10], {"phi": phi}), {"phi": DISTANCES}).axes
    lines = axes.get_lines()
    assert [line.get_label() for line in lines] == list(DISTANCES)
    # At first the default distances alone.
    start = [line.get_ydata()[0] for line in lines]  # type: ignore[index]
    assert start == DistanceMixtureLoss().phi.tolist()
    assert [n for n, s in zip(DISTANCES, start, strict=True) if s] == ["d²", "0.5 / d"]


def test_a_controller_s_figures(images: None, make_trial: MakeTrial, tmp_path: Path) -> None:
    method = Adaptive().method("", 0.1, 0.5, finally_=draw_class_correlations)
    method.train(make_trial(draw(CLEAN, TINY, 1, CPU), seed=1, steps=24))
    assert names(tmp_path) == set()
    method.train(make_trial(draw(CLEAN, TINY, 0, CPU), steps=24))
    assert names(tmp_path) == {MATRICES, ENTRIES}
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names(tmp_path))


@pytest.mark.filterwarnings("ignore:Controller. the metric")
def test_a_mixture_s_figure(make_trial: MakeTrial, tmp_path: Path) -> None:
    from lossmeta.recipes import _ala_retrieval_tasks as tasks

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20 * 12) % 20
    rows = torch.randn(len(labels), 12, generator=generator)
    drawn = tasks.Unseen(tasks.RECALL, *((rows, labels),) * 3)
    trial = make_trial(drawn, steps=40)
    fits = partial(tasks.EmbeddingFit, losses=DistanceMixture())
    found = controller("", 0.1, new_fit=fits, finally_=draw_mixture).train(trial)
    assert names(tmp_path) == {f"toy-{ENTRIES}"}
    assert found == controller("", 0.1, new_fit=fits).train(trial)


# ---- Reward design (Figure 3).


def test_reward_design() -> None:
    measures = (
        Measure("error", higher_is_better=False, percent=True),
        Measure("training error", higher_is_better=False, percent=True),
        Measure("validation", higher_is_better=True, shown=False),
    )

    def record(method: str, seed: int, error: float | None, role: str = "report") -> Record:
        found = {"error": error, "training error": 0.1, "validation": 0.5}
        return Record(role, "task", method, seed, {}, found, 1.0, None, None)

    trials = [
        record("a", 0, 0.9),
        record("a", 0, 0.2),  # the last counts
        record("a", 1, 0.4),
        record("b", 0, 0.5),
        record("b", 1, None),
        record("b", 10_000, 0.9, "tuning"),
        record("c", 0, 0.7),
        record("d", 0, None),
    ]
    header = Header(
        "toy", "", {}, (TaskHeader("task", measures),), ("a", "b", "c", "d"), (), (0, 1), "", {}, {}
    )
    rows = {"b": "reward B", "a": "reward A", "d": "reward D"}
    error, training = reward_design(Run(Path(), header, trials), rows).axes
    assert error.get_xlabel() == "error (%), mean ± sd"
    assert training.get_xlabel() == "training error (%), mean ± sd"
    assert error.get_ylabel() == training.get_ylabel() == "rewarded by"
    assert [t.get_text() for t in error.get_yticklabels()] == ["reward B", "reward A"]
    (dots,) = error.get_lines()[:1]
    assert dots.get_xdata().tolist() == pytest.approx([50, 30])  # type: ignore[union-attr]
    (bars,) = error.containers
    (segments,) = bars[2]  # type: ignore[misc]
    widths = [float(s[1][0] - s[0][0]) for s in segments.get_segments()]
    assert widths == pytest.approx([0, 2 * 100 * 0.02**0.5])
    assert [t.get_text() for t in training.get_yticklabels()] == ["reward B", "reward A", "reward D"]


# ---- The recipes.


def finished(
    recipe: Any, rows: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch, chosen: Any = TINY
) -> set[str]:
    """The files of a short run of some of the rows."""
    monkeypatch.setitem(_ala_images.SETTINGS, "small", chosen)
    some = replace(
        recipe,
        rows=lambda setting: [row for row in recipe.rows(setting) if row.label in rows],
        reference=tuple(label for label in recipe.reference if label in rows),
        reported={},
    )
    assert some.run(size="small", seeds=2, steps=8, device="cpu", output=folder) == 0
    return names(folder)


@pytest.mark.parametrize("module", [ala_cifar10_error, ala_cifar10_aucpr], ids=lambda m: m.__name__)
def test_recipes_draw(images: None, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.label for row in module.RECIPES[0].rows(TINY)} & {
        module.PLAIN,
        module.SINGLE,
        module.MULTI,
        f"{module.SINGLE}, step 0.1",
        f"{module.PLAIN}, several networks",
    }
    found = finished(module.RECIPES[0], rows, tmp_path, monkeypatch)
    assert found >= {CURVES, FIGURE, MATRICES, ENTRIES}
    assert list(json.loads((tmp_path / CURVES).read_text())) == [module.PLAIN, module.SINGLE]


def test_ablations_draw(images: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ala_ablations.RECIPES[0]
    assert ala_ablations.REWARDS.keys() <= {row.label for row in recipe.rows(TINY)}
    rows = {ala_ablations.DEFAULT, "cross-entropy", "rewarded by training loss"}
    drawn: list[list[str]] = []
    monkeypatch.setattr("lossmeta.plot.intervals", lambda axes, labels, *a: drawn.append(labels))
    assert "reward-design.png" in finished(recipe, rows, tmp_path, monkeypatch)
    assert drawn[-2:] == [["none: cross-entropy", "training loss", "validation error"]] * 2
