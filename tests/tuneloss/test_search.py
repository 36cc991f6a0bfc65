"""Random search, Bayesian optimisation and TuneReg by ask and tell."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import numpy as np
import pytest

from lossmeta.tuneloss import TPE, GaussianProcess, Measurement, RandomSearch, TuneReg
from lossmeta.tuneloss._box import Values

BOUNDS = {"l1": (0.01, 10.0), "drop": (0.0, 1.0), "l2": (np.full(2, 0.1), np.array([5.0, 6.0]))}
NAMES = ("errors", "features", "lower", "upper")


def error(values: Values) -> float:
    return float(
        np.log(values["l1"]) ** 2 + (values["drop"] - 0.3) ** 2 + np.log(values["l2"] / 2).sum() ** 2
    )


def measurement(values: Values) -> Measurement:
    return Measurement(error(values), features=np.array([1, values["l1"], values["drop"], *values["l2"]]))


@pytest.fixture(params=[RandomSearch, GaussianProcess, TPE, TuneReg])
def kind(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if issubclass(request.param, (GaussianProcess, TPE)):
        pytest.importorskip("optuna", reason="needs optuna")
    if request.param is TuneReg:
        learns(monkeypatch, lambda features, lower, upper: lower + (upper - lower) / (1 + len(features)))
    return request.param


def learns(monkeypatch: pytest.MonkeyPatch, values: Any) -> list[dict[str, Any]]:
    """Puts a function in place of learn_loss, and returns what that is called with."""
    calls: list[dict[str, Any]] = []

    def learn_loss(*args: Any, **options: Any) -> Any:
        calls.append({**dict(zip(NAMES, args, strict=True)), **options})
        return types.SimpleNamespace(values=values(*args[1:]))

    module = types.ModuleType("lossmeta.tuneloss.learn_loss")
    module.learn_loss = learn_loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


# ---- What all of them do.


def test_asks_inside_the_box_and_keeps_the_best(kind: Any) -> None:
    search = kind(BOUNDS, seed=3)
    told = []
    for _ in range(13):
        values = search.ask()
        assert list(values) == list(BOUNDS) and isinstance(values["l1"], float)
        assert values["l2"].shape == (2,) and values["l2"].dtype == np.float64
        again = search.ask()
        assert all(np.array_equal(values[n], again[n]) for n in values)
        search.box.entries(values)  # refuses what is outside
        told.append(error(values))
        search.tell(values, measurement(values))
    assert len({tuple(search.box.entries(t.values)) for t in search.trials}) == 13
    assert search.best.measurement.error == min(told)
    assert search.best is search.trials[int(np.argmin(told))]


@pytest.mark.parametrize("as_json", [False, True])
def test_goes_on_from_a_state(kind: Any, as_json: bool) -> None:
    search, other = kind(BOUNDS, seed=3), kind(BOUNDS)
    for i in range(11):
        values = search.ask()
        search.tell(values, np.nan if i in (1, 4) else measurement(values))
    state = search.state_dict()
    if as_json:
        state = json.loads(json.dumps(state, default=lambda x: x.tolist()))
    other.load_state_dict(state)
    assert (other.failed, len(other.trials)) == (2, 9)
    assert other.best.measurement.error == search.best.measurement.error
    for _ in range(2):
        values, theirs = search.ask(), other.ask()
        assert all(np.array_equal(values[n], theirs[n]) for n in values)
        search.tell(values, measurement(values))
        other.tell(theirs, measurement(theirs))


def test_failed_trials_are_counted_and_not_asked_for_again(kind: Any) -> None:
    search = kind(BOUNDS)
    asked = []
    for failure in (np.nan, np.inf, Measurement(float("nan")), -np.inf):
        asked.append(search.ask())
        search.tell(asked[-1], failure)
    assert search.failed == 4 and search.trials == [] and search.best is None
    assert len({v["l1"] for v in asked}) == 4
    values = search.ask()
    search.tell(values, measurement(values))
    search.tell(values, measurement(values))  # the same once more
    assert len(search.trials) == 2


def test_values_that_were_not_asked_for_may_be_told(kind: Any) -> None:
    search = kind(BOUNDS)
    values = {"l2": [1.0, 2.0], "drop": 0.5, "l1": 1}
    search.tell(values, measurement({**values, "l2": np.array([1.0, 2.0])}))
    assert search.best.values["l1"] == 1.0 and list(search.best.values) == list(BOUNDS)
    search.ask()


def test_bad_input(kind: Any) -> None:
    name = kind.__name__
    with pytest.raises(TypeError, match=rf"^{name}: bounds must map"):
        kind([(0, 1)])
    with pytest.raises(ValueError, match=rf"^{name}: bounds of 'a' must be finite"):
        kind({"a": (1.0, 0.0)})
    with pytest.raises(TypeError, match=rf"^{name}: seed must be an integer, got float"):
        kind(BOUNDS, seed=1.0)
    with pytest.raises(ValueError, match=rf"^{name}: seed must be at least 0, got -1"):
        kind(BOUNDS, seed=-1)
    search = kind(BOUNDS)
    values = search.ask()
    with pytest.raises(ValueError, match=rf"^{name}: values must be of l1, drop, l2, got l1"):
        search.tell({"l1": 1.0}, 0.5)
    with pytest.raises(ValueError, match=rf"^{name}: value of 'drop' must lie in \[0, 1\], got 2"):
        search.tell({**values, "drop": 2.0}, 0.5)
    with pytest.raises(TypeError, match=rf"^{name}: measurement must be a Measurement or a number, got str"):
        search.tell(values, "low")
    search.tell(values, measurement(values))
    state = search.state_dict()
    for change, message in (
        ({"method": "Other"}, "must be of the same method and bounds"),
        ({"upper": np.full(4, 20.0)}, "must be of the same method and bounds"),
        ({"trials": [{"values": values}]}, "must be what state_dict gave"),
        ({"trials": [{"values": {"l1": 1.0}, "measurement": {"error": 1.0}}]}, "values must be of"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: .*{message}"):
            search.load_state_dict({**state, "seed": 9, **change})
    assert search.seed == 0 and len(search.trials) == 1


# ---- Random search.


def test_random_search_is_log_uniform_where_the_lower_bound_is_positive() -> None:
    search = RandomSearch(BOUNDS, seed=1)
    drawn = []
    for _ in range(2000):
        drawn.append(search.ask())
        search.tell(drawn[-1], 1.0)
    for values in (
        np.log([v["l1"] / 0.01 for v in drawn]) / np.log(1000),
        np.array([v["drop"] for v in drawn]),
        np.log([v["l2"][1] / 0.1 for v in drawn]) / np.log(60),
    ):
        counts = np.histogram(values, 10, (0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 35  # chi squared of 9 degrees: p = 6e-5
    assert (
        np.abs(np.corrcoef([[v["l1"], v["drop"], *v["l2"]] for v in drawn], rowvar=False) - np.eye(4)).max()
        < 0.1
    )


def test_random_search_depends_on_the_seed() -> None:
    assert RandomSearch(BOUNDS, 1).ask()["l1"] != RandomSearch(BOUNDS, 2).ask()["l1"]
    assert RandomSearch(BOUNDS, 1).ask()["l1"] == RandomSearch(BOUNDS, 1).ask()["l1"]


# ---- Optuna's samplers.


@pytest.mark.parametrize("kind", [GaussianProcess, TPE], ids=["GP", "TPE"])
def test_optuna_learns_from_what_was_told(kind: Any) -> None:
    optuna = pytest.importorskip("optuna", reason="needs optuna")
    verbosity = optuna.logging.get_verbosity()
    search, rival = kind(BOUNDS, seed=1), RandomSearch(BOUNDS, seed=1)
    for one in (search, rival):
        for _ in range(24):
            values = one.ask()
            one.tell(values, error(values))
    later = [t.measurement.error for t in search.trials[12:]]
    assert np.median(later) < 0.5 * np.median([t.measurement.error for t in rival.trials])
    assert optuna.logging.get_verbosity() == verbosity


@pytest.mark.parametrize("kind", [GaussianProcess, TPE], ids=["GP", "TPE"])
def test_without_optuna(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ImportError, match=rf'^{kind.__name__}: optuna must be .*pip install "lossmeta\[integrations\]"'
    ):
        kind(BOUNDS)


# ---- TuneReg.


def test_tunereg_calls_learn_loss_with_the_task_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = np.array([1.0, 0.2, 0.4, 3.0, 4.0])
    calls = learns(monkeypatch, lambda *args: expected)
    search = TuneReg(BOUNDS, initial=2, solver="osqp")
    first = search.ask()
    np.testing.assert_allclose(search.box.unit(search.box.entries(first)), 0.5)
    search.tell(first, measurement(first))
    second = search.ask()
    assert not calls and second["l1"] != first["l1"]
    search.tell(second, measurement(second))
    third = search.ask()
    np.testing.assert_array_equal(search.box.entries(third), expected[1:])
    (call,) = calls
    np.testing.assert_array_equal(call["errors"], [error(first), error(second)])
    np.testing.assert_array_equal(call["features"], [measurement(v).features for v in (first, second)])
    np.testing.assert_array_equal(call["lower"], [1, 0.01, 0, 0.1, 0.1])
    np.testing.assert_array_equal(call["upper"], [1, 10, 1, 5, 6])
    assert call["solver"] == "osqp"
    search.tell(third, np.nan)
    fourth = search.ask()  # what was tried is not tried again, failed or not
    assert np.abs(search.box.entries(fourth) - expected[1:]).max() > 1e-3


def test_tunereg_finds_the_loss_that_is_the_error() -> None:
    """The error is that loss at a = 0.5, b = 2 exactly, and the models are the minima of losses; 4 determine it."""
    pytest.importorskip("lossmeta.tuneloss.learn_loss", reason="needs learn_loss")
    search = TuneReg({"a": (0.01, 10.0), "b": (0.01, 10.0)}, initial=4)
    for _ in range(4):
        values = search.ask()
        x, y = values["a"] ** -0.5, values["b"] ** -0.5
        task = 1 / x + 1 / y
        search.tell(values, Measurement(task + 0.5 * x + 2 * y, features=np.array([task, x, y])))
    values = search.ask()
    assert values["a"] == pytest.approx(0.5, rel=1e-4) and values["b"] == pytest.approx(2, rel=1e-4)


def test_tunereg_needs_features() -> None:
    search = TuneReg(BOUNDS)
    values = search.ask()
    with pytest.raises(ValueError, match=r"must have shape \[5\], got none; measure the model with"):
        search.tell(values, 0.5)
    with pytest.raises(ValueError, match=r"must have shape \[5\], got \[4\]"):
        search.tell(values, Measurement(0.5, features=np.ones(4)))
    with pytest.raises(ValueError, match="must be finite"):
        search.tell(values, Measurement(0.5, features=np.full(5, np.inf)))
    assert search.trials == []
    with pytest.raises(ValueError, match="initial must be at least 2, got 1"):
        TuneReg(BOUNDS, initial=1)
