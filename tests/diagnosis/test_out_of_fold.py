"""Out of fold: nobody predicts what it has seen, folds are stratified, and random numbers stay as they were."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lossmeta.diagnosis import out_of_fold
from lossmeta.diagnosis.folds import stratified


class Memory:
    """Is certain of what it has seen, and has no idea of anything else."""

    def fit(self, inputs: Any, labels: Any) -> None:
        self.known = {float(x[0]): int(y) for x, y in zip(inputs, labels, strict=True)}

    def predict_proba(self, inputs: Any) -> Any:
        p = np.full((len(inputs), 3), 1 / 3)
        for row, x in enumerate(inputs):
            if float(x[0]) in self.known:
                p[row] = np.eye(3)[self.known[float(x[0])]]
        return p


def fit(model: Any, inputs: Any, labels: Any) -> None:
    model.fit(inputs, labels)


def sgd(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        rows = torch.randint(len(labels), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()


def data(size: int = 90) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 3
    inputs = torch.randn(size, 2, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 3)[:, :2]
    return inputs, labels


@pytest.mark.parametrize("folds", [2, 5, 90])
def test_no_model_predicts_what_it_has_seen(folds: int) -> None:
    inputs, labels = data()
    p = out_of_fold(Memory, fit, inputs, labels, folds=folds)
    torch.testing.assert_close(p, torch.full((90, 3), 1 / 3, dtype=torch.float64))
    memory = Memory()
    memory.fit(inputs, labels)
    assert memory.predict_proba(inputs).max() == 1


def test_every_model_is_trained_on_all_the_other_folds() -> None:
    inputs, labels = data()
    seen: list[int] = []

    def train(model: Memory, inputs: Any, labels: Any) -> None:
        seen.append(len(labels))
        model.fit(inputs, labels)

    out_of_fold(Memory, train, inputs, labels, folds=4)
    assert sorted(seen) == [67, 67, 68, 68]


def test_folds_have_their_share_of_every_label() -> None:
    labels = torch.tensor([0] * 23 + [1] * 9 + [2] * 3)[torch.randperm(35)]
    fold_of = stratified(labels, 5, torch.Generator().manual_seed(0))
    for label, least in enumerate((4, 1, 0)):
        counts = fold_of[labels == label].bincount(minlength=5)
        assert int(counts.min()) == least and int(counts.max()) <= least + 1
    assert fold_of.bincount().tolist() == [7] * 5
    other = stratified(labels, 5, torch.Generator().manual_seed(1))
    assert not torch.equal(other, fold_of)


def test_a_torch_model_gives_the_softmax_of_its_logits() -> None:
    inputs, labels = data()
    p = out_of_fold(lambda: nn.Linear(2, 4), sgd, inputs, labels)
    assert p.shape == (90, 4) and p.dtype == torch.float64
    torch.testing.assert_close(p.sum(1), torch.ones(90, dtype=torch.float64))
    assert float((p.argmax(1) == labels).double().mean()) > 0.7


def test_the_seed_decides() -> None:
    inputs, labels = data()
    p = out_of_fold(lambda: nn.Linear(2, 3), sgd, inputs, labels, seed=3)
    torch.manual_seed(99)
    assert torch.equal(out_of_fold(lambda: nn.Linear(2, 3), sgd, inputs, labels, seed=3), p)
    assert not torch.equal(out_of_fold(lambda: nn.Linear(2, 3), sgd, inputs, labels, seed=4), p)


@pytest.mark.parametrize("fails", [False, True])
def test_global_random_numbers_are_left_alone(fails: bool) -> None:
    def train(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        sgd(model, inputs, labels)
        random.random()
        np.random.rand()  # noqa: NPY002
        if fails:
            raise RuntimeError("no")

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    try:
        out_of_fold(lambda: nn.Linear(2, 3), train, *data())
    except RuntimeError:
        assert fails
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_a_model_predicts_in_eval_mode_and_keeps_its_modes() -> None:
    from lossmeta.diagnosis import _models

    model = nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5), nn.BatchNorm1d(50), nn.Linear(50, 3))
    model[2].eval()
    inputs, _ = data()
    statistics = model[2].running_mean.clone()
    first = _models.predicted("test", model, inputs, 3)
    assert torch.equal(first, _models.predicted("test", model, inputs, 3))
    assert [m.training for m in model] == [True, True, False, True]
    assert torch.equal(model[2].running_mean, statistics)
    model.eval()
    torch.testing.assert_close(first, model(inputs).double().softmax(1).detach())


def test_large_inputs_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from lossmeta.diagnosis import _models

    inputs, _ = data()
    whole = _models.predicted("test", model := nn.Linear(2, 3), inputs, 3)
    monkeypatch.setattr(_models, "BATCH", 7)
    torch.testing.assert_close(_models.predicted("test", model, inputs, 3), whole, rtol=1e-6, atol=1e-6)


def test_a_label_that_one_fold_has_alone() -> None:
    """An estimator has no column then for a class that it has not seen."""
    inputs, labels = data(61)
    labels[labels == 1] = 2
    labels[7] = 1
    p = out_of_fold(LogisticRegression, fit, inputs.numpy(), labels.numpy())
    assert p.shape == (61, 3) and p[7, 1] == 0 and float(p[labels == 2][:, 1].max()) > 0


class Wrong(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(x)


def nothing(model: Any, inputs: Any, labels: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            lambda x: torch.full((len(x), 3), 1 / 3),
            "must give logits, got rows that sum to 1 as probabilities do",
        ),
        (lambda x: x[:, 0], r"must give logits \[N, C\], got \[45\]; give probabilities instead"),
        (lambda x: (x,), r"must give logits \[N, C\], got tuple"),
        (lambda x: x, r"must give 3 classes, got 2 in fold 0"),
        (lambda x: x.repeat(1, 2) * torch.nan, r"what the model gives must be finite, got nan"),
    ],
)
def test_bad_models(output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^out_of_fold: .*{message}"):
        out_of_fold(lambda: Wrong(output), nothing, *data(), folds=2)


def test_labels_that_are_no_indices() -> None:
    class Named:
        classes_ = np.array([0.5, 1.5, 2.5])

        def predict_proba(self, inputs: Any) -> Any:
            return np.full((len(inputs), 3), 1 / 3)

    with pytest.raises(
        ValueError, match=r"^out_of_fold: the model's classes_ must be the labels, integers from 0"
    ):
        out_of_fold(Named, nothing, *data())


def test_bad_input() -> None:
    inputs, labels = data()
    for arguments, options, error, message in (
        ((Memory, fit, inputs, labels), {"folds": 1}, ValueError, "folds must be at least 2, got 1"),
        (
            (Memory, fit, inputs[:3], labels[:3]),
            {},
            ValueError,
            "at least one sample for each of 5 folds, got 3",
        ),
        ((Memory, fit, inputs[:3], labels), {}, ValueError, r"one row for each of 90 labels, got \[3, 2\]"),
        ((Memory, fit, inputs, labels - 1), {}, ValueError, "labels must not be negative, got -1"),
        ((Memory, fit, inputs, labels.float()), {}, ValueError, "labels must be integers, got float32"),
        (
            (Memory, fit, inputs.tolist(), labels),
            {},
            TypeError,
            "inputs must be a tensor or a NumPy array, got list",
        ),
        (
            (dict, nothing, inputs, labels),
            {},
            TypeError,
            "make_model must give a torch model or something with",
        ),
    ):
        with pytest.raises(error, match=rf"^out_of_fold: .*{message}"):
            out_of_fold(*arguments, **options)  # type: ignore[arg-type]
