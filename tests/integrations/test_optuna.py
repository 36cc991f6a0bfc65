"""TuneLoss as a sampler of Optuna."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

optuna = pytest.importorskip("optuna", reason="needs optuna")

from optuna.distributions import FloatDistribution  # noqa: E402
from optuna.trial import TrialState, create_trial  # noqa: E402

from lossmeta.integrations.optuna import ATTRIBUTE, TuneLossSampler, report  # noqa: E402
from lossmeta.tuneloss import Measurement, TuneLoss  # noqa: E402

WORKER = Path(__file__).parent / "optuna_worker.py"
BOUNDS = {"l1": (0.01, 10.0), "drop": (0.0, 1.0), "l2": (np.full(3, 0.01), np.full(3, 10.0))}
BEST = np.array([0.5, 0.3, 1.0, 1.0, 2.0])


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(level)


def measurement(values: dict[str, Any]) -> Measurement:
    """|log(entries / best)|^2, and the square of drop - best."""
    entries = np.array([values["l1"], values["drop"], *values["l2"]])
    away = np.log(np.maximum(entries, 1e-9) / BEST)
    slope, curvature = 2 * away / np.maximum(entries, 1e-9), 2 / np.maximum(entries, 1e-9) ** 2
    away[1] = entries[1] - BEST[1]
    slope[1], curvature[1] = 2 * away[1], 2
    return Measurement(float(away @ away), slope=slope, curvature=np.diag(curvature), names=tuple(BOUNDS))


def study_of(sampler: Any, **options: Any) -> Any:
    return optuna.create_study(sampler=sampler, **options)


def objective_of(sampler: TuneLossSampler) -> Any:
    return lambda trial: report(trial, measurement(sampler.suggest(trial)))


def entries_of(sampler: TuneLossSampler, trial: Any) -> np.ndarray:
    return np.array([trial.params[name] for name in sampler.distributions])


def unit_of(sampler: TuneLossSampler, trial: Any) -> np.ndarray:
    box = TuneLoss(BOUNDS).box
    return box.unit(entries_of(sampler, trial))


# ---- One worker.


@pytest.mark.parametrize("storage", ["memory", "sqlite"])
def test_one_worker_is_the_tuner(storage: str, tmp_path: Path) -> None:
    if storage == "sqlite":
        pytest.importorskip("sqlalchemy", reason="needs sqlalchemy")
    sampler, tuner = TuneLossSampler(BOUNDS, radius=0.2), TuneLoss(BOUNDS, radius=0.2)
    study = study_of(sampler, storage=f"sqlite:///{tmp_path}/study.db" if storage == "sqlite" else None)
    study.optimize(objective_of(sampler), n_trials=8)
    for trial in study.trials:
        values = tuner.ask()
        np.testing.assert_allclose(entries_of(sampler, trial), tuner.box.entries(values), rtol=1e-12)
        tuner.tell(values, measurement(values))
    assert study.best_value < 1e-3 < study.trials[0].value
    again = sampler.tuner(study)
    assert again.best.measurement.error == study.best_value
    assert (len(again.trials), again.failed, again.radius) == (8, 0, tuner.radius)


def test_suggestions_have_the_kinds_of_the_tuner() -> None:
    sampler = TuneLossSampler(BOUNDS)
    trial = study_of(sampler).ask()
    values = sampler.suggest(trial)
    assert list(values) == list(BOUNDS) and isinstance(values["l1"], float) and values["l2"].shape == (3,)
    assert trial.distributions == {
        "l1": FloatDistribution(0.01, 10, log=True),
        "drop": FloatDistribution(0, 1),
        **{f"l2[{i}]": FloatDistribution(0.01, 10, log=True) for i in range(3)},
    }
    fixed = sampler.suggest(optuna.trial.FixedTrial({"l1": 1, "drop": 0, "l2[0]": 1, "l2[1]": 2, "l2[2]": 3}))
    np.testing.assert_array_equal(fixed["l2"], [1, 2, 3])


def test_all_of_a_measurement_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy", reason="needs sqlalchemy")
    r = np.random.default_rng(0)
    gram = r.normal(size=(7, 7)) * 1e-9
    whole = Measurement(
        np.float32(0.1), r.normal(size=6), gram + gram.T, r.normal(size=5), np.eye(5) / 3, tuple(BOUNDS)
    )
    sampler = TuneLossSampler(BOUNDS)
    where = f"sqlite:///{tmp_path}/study.db"
    study = study_of(sampler, storage=where, study_name="s")
    trial = study.ask()
    sampler.suggest(trial)
    assert report(trial, whole) == whole.error
    study.tell(trial, 0.1)
    (found,) = sampler.tuner(optuna.load_study(study_name="s", storage=where)).trials
    assert found.measurement.names == tuple(BOUNDS)
    for name in ("error", "features", "gram", "slope", "curvature"):
        np.testing.assert_array_equal(getattr(found.measurement, name), getattr(whole, name))


def test_the_order_is_that_of_completion() -> None:
    sampler = TuneLossSampler(BOUNDS)
    first, second = study_of(sampler), study_of(sampler)
    r = np.random.default_rng(0)
    trials = []
    for i in range(6):
        values = TuneLoss(BOUNDS).box.named(TuneLoss(BOUNDS).box.at(r.random(5)))
        params = dict(zip(sampler.distributions, TuneLoss(BOUNDS).box.entries(values).tolist(), strict=True))
        trial = create_trial(
            params=params, distributions=sampler.distributions, value=measurement(values).error
        )
        report(trial, measurement(values))
        trial.datetime_complete = trial.datetime_start.replace(year=2001 + i)
        trials.append(trial)
    for study, order in ((first, (0, 1, 2, 3, 4, 5)), (second, (3, 0, 5, 2, 1, 4))):
        for i in order:
            study.add_trial(trials[i])
    one, other = sampler.tuner(first), sampler.tuner(second)
    assert one.radius == other.radius and len(one.trials) == 6
    assert [t.measurement.error for t in one.trials] == [t.measurement.error for t in other.trials]
    a, b = (sampler.sample_relative(s, s.ask()._cached_frozen_trial, {}) for s in (first, second))
    assert a == b


def test_other_parameters_go_to_another_sampler() -> None:
    class Seven(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return 7 if name == "layers" else super().sample_independent(study, trial, name, distribution)

    sampler = TuneLossSampler(BOUNDS, independent_sampler=Seven(seed=0))
    study = study_of(sampler)

    def objective(trial: Any) -> float:
        assert trial.suggest_int("layers", 1, 9) == 7
        assert trial.suggest_categorical("kind", ["a", "b"]) in "ab"
        return report(trial, measurement(sampler.suggest(trial)))

    study.optimize(objective, n_trials=3)
    assert len(sampler.tuner(study).trials) == 3
    plain = TuneLossSampler(BOUNDS, seed=4)
    plain.reseed_rng()
    assert study_of(plain).ask({"x": FloatDistribution(2, 3)}).params["x"] >= 2


# ---- Failures.


def test_trials_without_a_measurement_are_counted_and_never_fatal() -> None:
    sampler = TuneLossSampler(BOUNDS)
    study = study_of(sampler)
    good = objective_of(sampler)

    def objective(trial: Any) -> float:
        if trial.number in (0, 4):
            sampler.suggest(trial)
            raise RuntimeError("lost")
        if trial.number == 2:
            sampler.suggest(trial)
            raise optuna.TrialPruned
        if trial.number == 3:
            sampler.suggest(trial)
            return float("nan")
        if trial.number == 5:
            return report(trial, Measurement(float("nan"), slope=None)) if sampler.suggest(trial) else 0.0
        return good(trial)

    study.optimize(objective, n_trials=12, catch=(RuntimeError,))
    tuner = sampler.tuner(study)
    assert (len(tuner.trials), tuner.failed) == (7, 5)
    assert (
        len({tuple(t.params.values()) for t in study.trials[:8]}) == 8
    )  # what failed is not asked for again
    assert study.best_value < 0.1


def test_a_lost_trial_leaves_the_trust_region_and_a_diverged_one_does_not() -> None:
    radii = []
    for diverged in (False, True):
        sampler = TuneLossSampler(BOUNDS)
        study = study_of(sampler)
        study.optimize(objective_of(sampler), n_trials=1)
        trial = study.ask()
        sampler.suggest(trial)
        if diverged:
            report(trial, Measurement(float("nan")))
        study.tell(trial, state=TrialState.FAIL)
        tuner = sampler.tuner(study)
        assert tuner.failed == 1
        radii.append(tuner.radius)
    assert radii[0] == 0.35 and radii[1] <= 0.35 / 4


def test_a_pruned_trial_with_a_measurement_counts() -> None:
    sampler = TuneLossSampler(BOUNDS)
    study = study_of(sampler)

    def objective(trial: Any) -> float:
        report(trial, measurement(sampler.suggest(trial)))
        raise optuna.TrialPruned

    study.optimize(objective, n_trials=2)
    assert len(sampler.tuner(study).trials) == 2


def test_a_completed_trial_without_a_report_is_told_of() -> None:
    sampler = TuneLossSampler(BOUNDS)
    study = study_of(sampler)
    trial = study.ask()
    sampler.suggest(trial)
    study.tell(trial, 1.0)
    with pytest.warns(
        UserWarning, match=r"must report its measurement, got none from 1 that completed; call"
    ):
        assert sampler.tuner(study).failed == 1


def test_what_does_not_fit_is_left_out_with_a_warning() -> None:
    sampler = TuneLossSampler(BOUNDS)
    study = study_of(sampler)
    inside = {"l1": 1.0, "drop": 0.5, "l2[0]": 1.0, "l2[1]": 1.0, "l2[2]": 1.0}
    enough = '{"error": 1, "slope": [1, 1, 1, 1, 1], "curvature": [[1, 0, 0, 0, 0]]}'
    for params, text in (({**inside, "l1": 99.0}, '{"error": 1}'), (inside, enough), (inside, "nonsense")):
        trial = create_trial(
            params=params, distributions={n: FloatDistribution(0, 100) for n in params}, value=1.0
        )
        trial.user_attrs[ATTRIBUTE] = text
        study.add_trial(trial)
    study.add_trial(
        create_trial(params={}, distributions={}, value=1.0, user_attrs={ATTRIBUTE: '{"error": 1}'})
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tuner = sampler.tuner(study)
    assert tuner.failed == 4 and tuner.trials == []
    assert [str(w.message).split(":")[1][:8] for w in told] == [f" trial {i}" for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.optimize(objective_of(sampler), n_trials=3)
    assert len(sampler.tuner(study).trials) == 3


# ---- Several workers.


@pytest.mark.parametrize("reported", [0, 1, 4])
def test_running_trials_have_distinct_values_inside_the_trust_region(reported: int) -> None:
    sampler = TuneLossSampler(BOUNDS, radius=0.05)  # so small that the step ends at its border
    study = study_of(sampler)
    study.optimize(objective_of(sampler), n_trials=reported)
    tuner = sampler.tuner(study)
    own = tuner.box.unit(tuner.box.entries(tuner.ask()))
    trials = [study.ask() for _ in range(6)]
    for trial in trials:
        sampler.suggest(trial)
    units = [unit_of(sampler, trial) for trial in trials]
    np.testing.assert_allclose(units[0], own, atol=1e-9)
    assert all(np.abs(a - b).max() > 1e-3 * tuner.radius for i, a in enumerate(units) for b in units[:i])
    centre = own if tuner.best is None else tuner.box.unit(tuner.box.entries(tuner.best.values))
    for unit in units:
        assert np.abs(unit - centre).max() <= tuner.radius + 1e-9
        assert np.abs(unit - own).max() <= tuner.radius / (4 if reported else 1) + 1e-9
    # The entries of a vector move together.
    moves = np.array(units[1:]) - own
    if not reported:
        np.testing.assert_allclose(moves[:, 2:], moves[:, [2]].repeat(3, 1), atol=1e-9)


def test_the_later_of_two_that_start_at_once_gives_way() -> None:
    """Neither sees the other's values."""
    sampler = TuneLossSampler(BOUNDS)
    study = study_of(sampler)
    study.optimize(objective_of(sampler), n_trials=2)
    earlier, later = study.ask(), study.ask()
    tuner = sampler.tuner(study)
    late, early = (sampler.sample_relative(study, t._cached_frozen_trial, {}) for t in (later, earlier))
    np.testing.assert_allclose(list(early.values()), tuner.box.entries(tuner.ask()), rtol=1e-9)
    assert np.abs(np.log(np.array(list(late.values())) / list(early.values()))).max() > 1e-3
    other_seed = TuneLossSampler(BOUNDS, seed=1).sample_relative(study, later._cached_frozen_trial, {})
    assert other_seed != late == sampler.sample_relative(study, later._cached_frozen_trial, {})


def spawn(where: str, trials: int, *folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(WORKER), where, "shared", str(trials), *map(str, folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("storage", ["journal", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_three_workers_of_which_one_is_killed_and_another_takes_its_place(
    storage: str, tmp_path: Path
) -> None:
    if storage == "sqlite":
        pytest.importorskip("sqlalchemy", reason="needs sqlalchemy")
        where: str = f"sqlite:///{tmp_path}/study.db"
        opened: Any = where
    else:
        from optuna.storages.journal import JournalFileBackend

        where = str(tmp_path / "journal.log")
        opened = optuna.storages.JournalStorage(JournalFileBackend(where))
    study = study_of(None, storage=opened, study_name="shared")
    workers = [spawn(where, 4), spawn(where, 4), spawn(where, 4, tmp_path)]
    try:
        stopped = tmp_path / "stopped"
        while not stopped.exists():
            assert workers[2].poll() is None, workers[2].stderr.read()  # type: ignore[union-attr]
            time.sleep(0.05)
        workers[2].send_signal(signal.SIGKILL)
        workers[2].wait()
        lost = int(stopped.read_text())
        assert study.trials[lost].state == TrialState.RUNNING
        study.tell(lost, state=TrialState.FAIL)  # whoever cleans up
        workers.append(spawn(where, 3))
        for worker in (workers[0], workers[1], workers[3]):
            _, errors = worker.communicate(timeout=300)
            assert worker.returncode == 0, errors.decode()
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
            worker.stderr.close()  # type: ignore[union-attr]
    # 4 and 4, one before the kill, and 3 of the newcomer; and the lost one.
    trials = optuna.load_study(study_name="shared", storage=opened).trials
    assert [t.number for t in trials] == list(range(13))
    assert [t.number for t in trials if t.state == TrialState.FAIL] == [lost]
    assert sum(t.state == TrialState.COMPLETE for t in trials) == 12
    for i, one in enumerate(trials):
        for other in trials[:i]:
            if other.datetime_complete > one.datetime_start and one.datetime_complete > other.datetime_start:
                assert one.params != other.params, f"{i} and {other.number} ran at once"
    sampler = TuneLossSampler({"l1": (0.01, 10.0), "l2": (np.full(3, 0.01), np.full(3, 10.0))})
    tuner = sampler.tuner(study)
    assert (len(tuner.trials), tuner.failed) == (12, 1)
    assert sorted(t.measurement.error for t in tuner.trials) == sorted(
        t.value for t in trials if t.value is not None
    )
    assert study.best_value < 0.5 * trials[0].value


# ---- What is refused.


def test_bad_samplers() -> None:
    with pytest.raises(TypeError, match="TuneLoss: bounds must map names"):
        TuneLossSampler([(0, 1)])
    with pytest.raises(ValueError, match="bounds of 'a' must be finite, the lower below"):
        TuneLossSampler({"a": (2.0, 1.0)})
    with pytest.raises(TypeError, match="seed must be an integer, got str"):
        TuneLossSampler(BOUNDS, seed="1")
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        TuneLossSampler(BOUNDS, seed=-1)
    with pytest.raises(ValueError, match="method must be one of"):
        TuneLossSampler(BOUNDS, method="newton")


def test_bad_studies() -> None:
    sampler = TuneLossSampler(BOUNDS)
    trial = study_of(sampler, directions=["minimize", "minimize"]).ask()
    with pytest.raises(ValueError, match="multi-objective"):
        sampler.suggest(trial)
    with pytest.raises(ValueError, match="different log configuration"):
        study_of(sampler).ask().suggest_float("l1", 0.01, 10)
    with pytest.raises(ValueError, match="different distribution kind"):
        study_of(sampler).ask().suggest_int("drop", 0, 1)


def test_bad_reports() -> None:
    sampler = TuneLossSampler(BOUNDS)
    study = study_of(sampler)
    trial = study.ask()
    with pytest.raises(TypeError, match="report: measurement must be a Measurement, got float"):
        report(trial, 0.5)
    trial.suggest_float("l1", 0.01, 10, log=True)
    with pytest.raises(
        ValueError, match=r"must have been suggested, got none of drop, l2\[0\], l2\[1\], l2\[2\]; call"
    ):
        report(trial, Measurement(0.5))
    sampler.suggest(trial)
    with pytest.raises(ValueError, match="must have slope and curvature for method='gauss_newton'"):
        report(trial, Measurement(0.5))
    with pytest.raises(ValueError, match=r"slope of the measurement must have shape \[5\], got \[2\]"):
        report(trial, Measurement(0.5, slope=np.ones(2), curvature=np.eye(2)))
    assert ATTRIBUTE not in trial.user_attrs


def test_without_optuna() -> None:
    code = (
        "import sys; sys.modules['optuna'] = None\n"
        "import lossmeta.tuneloss\n"
        "try: import lossmeta.integrations.optuna\n"
        "except ImportError as error: print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("lossmeta.integrations.optuna: optuna must be installed, got ")
    assert shown.strip().endswith('pip install "lossmeta[integrations]"')


def test_example_runs(run_example: Callable[[str], str]) -> None:
    printed = run_example("optuna_shared_study.py")
    first, best = printed.removeprefix("first ").split(", best of 4: ")
    assert float(best.split()[0]) < float(first) - 0.05
