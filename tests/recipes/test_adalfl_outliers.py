"""The recipe of targets that are far off: the data is what it says, and every row trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from one_setting import methods

from lossmeta.experiments import Method, Trial, Tuned, run_folder
from lossmeta.recipes import _noise_methods, adalfl_outliers, recipes
from lossmeta.recipes.adalfl_outliers import DIABETES, EITHER, NONE, RAISED, Outliers, draw, squared_error

CPU = torch.device("cpu")
MakeTrial = Callable[..., Trial]


@pytest.mark.parametrize("outliers", [RAISED, EITHER, NONE], ids=lambda o: o.name)
def test_data(outliers: Outliers) -> None:
    drawn, right, other = (draw(DIABETES, o, s, CPU) for o, s in ((outliers, 3), (NONE, 3), (outliers, 4)))
    parts = [right.train, drawn.clean, drawn.selection, drawn.test]
    assert [len(y) for _, y in parts] == [200, 42, 50, 150]
    rows = [{tuple(x) for x in inputs.tolist()} for inputs, _ in parts]
    assert all(not rows[i] & rows[j] for i in range(4) for j in range(i))
    assert torch.equal(drawn.train[0], right.train[0])
    assert not torch.equal(drawn.train[0], other.train[0])
    by = drawn.train[1] - right.train[1]
    assert float((by != 0).double().mean()) == pytest.approx(outliers.share, abs=0.1)
    if outliers is not NONE:
        assert 5 < float(by.abs().max()) <= 10 + 1e-5
        assert bool((by < 0).any()) == (outliers is EITHER)
    for a, b in ((drawn.clean, right.clean), (drawn.selection, right.selection), (drawn.test, right.test)):
        assert torch.equal(a[1], b[1])


def test_columns_are_standardised() -> None:
    inputs, targets = adalfl_outliers.pool("diabetes")
    for x in (inputs, targets):
        torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1]), atol=1e-2, rtol=0)
        torch.testing.assert_close(x.std(0), torch.ones(x.shape[1]), atol=1e-2, rtol=0)
    assert float(inputs.abs().max()) <= 4


def test_too_few_samples_are_said() -> None:
    with pytest.raises(ValueError, match="diabetes: needs 1242 samples, got 442"):
        draw(replace(DIABETES, test=950), NONE, 0, CPU)


def test_squared_error() -> None:
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, 2.0)
    torch.nn.init.zeros_(model.bias)
    part = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    assert squared_error(model, part) == 0.5


def test_huber_pulls_alike_at_every_delta() -> None:
    target = torch.zeros(1)
    for delta in (0.1, 0.5):
        x = torch.tensor([7.0], requires_grad=True)
        adalfl_outliers.huber(None, delta)(x, target).backward()  # type: ignore[arg-type]
        assert x.grad is not None and x.grad.item() == pytest.approx(1.0)


@pytest.mark.parametrize("method", methods(adalfl_outliers.ROWS), ids=lambda m: m.label)
def test_rows(method: Method, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each explains something; the test part moves nothing."""
    monkeypatch.setattr(_noise_methods, "LAST_RATES", (0.03,))
    monkeypatch.setattr(_noise_methods, "LAST_STEPS", (5,))
    drawn = draw(DIABETES, RAISED, 0, CPU)
    first = method.train(make_trial(drawn, steps=120))
    assert 0.3 < first["squared error"] < 1.5  # type: ignore[operator]
    second = method.train(make_trial(replace(drawn, test=drawn.selection), steps=120))
    assert second["squared error"] == second["selection error"] == first["selection error"]


@pytest.mark.usefixtures("only_scikit_learn")
def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    rows = tuple(
        replace(r, candidates=r.candidates[:1], beside=None) if isinstance(r, Tuned) else r
        for r in adalfl_outliers.ROWS
    )
    monkeypatch.setattr(_noise_methods, "LAST_RATES", (0.03,))
    monkeypatch.setattr(_noise_methods, "LAST_STEPS", (5,))
    recipe = replace(adalfl_outliers.RECIPE, rows=rows)
    assert recipe.name == "adalfl-outliers" in recipes()
    status = recipe.run(size="small", seeds=1, steps=6, device="cpu", output=tmp_path)
    trials = [t for t in run_folder.read(tmp_path).trials if t.seed == 0]
    assert {t.task for t in trials} == {f"diabetes: {o.name}" for o in (RAISED, EITHER, NONE)}
    assert status in (0, 2) and "california" in capsys.readouterr().err
