"""The retrieval recipes: classes that training has not seen, and the losses that ALA's are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta import data
from lossmeta.data import Dataset
from lossmeta.experiments import Tuned
from lossmeta.recipes import _ala_retrieval_tasks as tasks
from lossmeta.recipes import _ala_triplets as triplets
from lossmeta.recipes import ala_retrieval

CPU = torch.device("cpu")
SMALL = tasks.Source("small", (20, 6, 8), steps=4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """40 classes of 8 to 12 samples each, and one that is too small."""
    labels = torch.cat([torch.full((8 + c % 5,), c) for c in range(40)] + [torch.full((3,), 40)])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(labels), 12, generator=generator) + F.one_hot(labels % 12, 12)
    monkeypatch.setattr(data, "load", lambda name: Dataset(name, (rows, labels), None, 41))
    tasks._rows.cache_clear()
    yield
    tasks._rows.cache_clear()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("measure", [tasks.RECALL, tasks.VERIFICATION], ids=lambda m: m.name)
def test_classes(measure: Any) -> None:
    drawn = tasks.draw(SMALL, measure, 1, CPU)
    classes = [set(part[1].tolist()) for part in (drawn.train, drawn.valid, drawn.test)]
    assert [len(c) for c in classes] == [20, 6, 8]
    assert not classes[0] & classes[1] and not classes[0] & classes[2] and not classes[1] & classes[2]
    assert 40 not in set.union(*classes)
    for part in (drawn.valid, drawn.test):
        assert (part[1].unique(return_counts=True)[1] == tasks.KEPT).all()
    counts = {c: 8 + c % 5 for c in range(40)}
    assert all(int((drawn.train[1] == c).sum()) == counts[c] for c in classes[0])
    again = tasks.draw(SMALL, measure, 1, CPU)
    assert torch.equal(again.train[0], drawn.train[0]) and torch.equal(again.test[0], drawn.test[0])
    assert classes[0] != set(tasks.draw(SMALL, measure, 2, CPU).train[1].tolist())


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:Population. all children", "ignore:Controller. the metric")
def test_every_row_trains(make_trial: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for measure in (tasks.RECALL, tasks.VERIFICATION):
        task = tasks.task(SMALL, measure, 20)
        labels = set()
        assert set(ala_retrieval.REPORTED[measure]) <= {row.label for row in ala_retrieval.ROWS}
        # Rows know nothing of the measure.
        for row in ala_retrieval.ROWS if measure is tasks.RECALL else ala_retrieval.ROWS[-2:]:
            assert isinstance(row, Tuned) and callable(row.candidates)
            candidate = row.candidates(task)[2]
            method = row.then(candidate) if row.then else candidate
            trial = make_trial(task, 3)
            monkeypatch.setattr(ala_retrieval, "GRID", 2)
            found = method.train(trial)
            for m in task.measures:
                value = found[m.name]
                assert value is not None and 0 <= value <= 1
            labels.add(row.label)
        assert ala_retrieval.POPULATION in labels
        assert len(labels) == (len(ala_retrieval.ROWS) if measure is tasks.RECALL else 2)


@pytest.fixture
def make_trial(tmp_path: Path) -> Callable[..., Any]:
    from lossmeta.experiments import Trial

    def make(task: Any, seed: int) -> Any:
        return Trial(task, seed, CPU, task.prepare(seed, CPU), {}, lambda share: None, tmp_path)

    return make


@pytest.mark.usefixtures("small")
def test_batches(make_trial: Callable[..., Any]) -> None:
    fit = tasks.EmbeddingFit(make_trial(tasks.task(SMALL, tasks.RECALL, 5), 0), 0.1)
    for with_validation in (False, True):
        seen = list(fit.batches(with_validation))
        assert len(seen) == 5
        for _, x, y in seen:
            counts = y.unique(return_counts=True)[1]
            assert len(counts) == 16 and (counts == 4).all()
            assert len({tuple(row) for row in x.tolist()}) == 64
        classes = {int(c) for _, _, y in seen for c in y}
        assert bool(classes & set(fit.drawn.valid[1].tolist())) == with_validation
        assert not classes & set(fit.drawn.test[1].tolist())


def embedded(seed: int, n: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=1)
    return x, torch.arange(n) % 3


@pytest.mark.parametrize("seed", range(4))
def test_triplet(seed: int) -> None:
    x, y = embedded(seed)
    terms = [
        term
        for a in range(9)
        for p in range(9)
        for n in range(9)
        if a != p and y[a] == y[p] and y[a] != y[n]
        if (term := float((x[a] - x[p]).square().sum() - (x[a] - x[n]).square().sum() + 0.2)) > 0
    ]
    assert triplets.triplet(x, y).item() == pytest.approx(sum(terms) / len(terms))


def test_margin_draws_by_distance() -> None:
    """Of three negatives, as often as 1/q of their distances says; none beyond 1.4."""
    angles = torch.tensor([0.0, 0.1, 0.6, 1.0, 2.0], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin(), *torch.zeros(3, 5, dtype=torch.float64)], 1)
    y = torch.tensor([0, 0, 1, 2, 3])
    d = (x[0] - x).norm(dim=1).clamp_min(0.5)
    q = d**3 * (1 - d**2 / 4)  # of 5 dimensions
    share = torch.stack([1 / q[2], 1 / q[3], torch.tensor(0.0, dtype=torch.float64)])
    share = share / share.sum()
    generator = torch.Generator().manual_seed(0)
    total, rounds = 0.0, 4000
    for _ in range(rounds):
        total += float(triplets.margin(x, y, generator, beta=3.0))
    # With so wide a boundary every negative's term is positive and every positive pair's is 0.
    own = [0.2 + 3 - (x[a] - x[n]).norm() for a in (0, 1) for n in (2, 3)]
    other = (x[1] - x).norm(dim=1).clamp_min(0.5)
    q1 = other**3 * (1 - other**2 / 4)
    share1 = torch.stack([1 / q1[2], 1 / q1[3]]) / (1 / q1[2] + 1 / q1[3])
    expected = (share[0] * own[0] + share[1] * own[1] + share1[0] * own[2] + share1[1] * own[3]) / 2
    assert total / rounds == pytest.approx(float(expected), rel=0.01)


def test_margin_terms() -> None:
    x, y = embedded(1, 4)
    y = torch.tensor([0, 0, 0, 0])
    assert triplets.margin(x, y, torch.Generator()).item() == 0
    collapsed = torch.ones(4, 5) / 5**0.5
    collapsed.requires_grad_()
    loss = triplets.margin(collapsed, torch.tensor([0, 0, 1, 1]), torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(1.4, abs=1e-3)  # 0.2 + 1.2 - 0 of every negative
    loss.backward()
    assert collapsed.grad is not None and collapsed.grad.isfinite().all()
