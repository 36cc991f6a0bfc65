"""TuneLoss as a sampler of Optuna: many machines share one study."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from lossmeta.tuneloss import Measurement, TuneLoss
from lossmeta.tuneloss._box import Array, Bounds, Values

try:
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
    raise ImportError(
        f"lossmeta.integrations.optuna: optuna must be installed, got {str(error)!r}; "
        'pip install "lossmeta[integrations]"'
    ) from error

ATTRIBUTE = "lossmeta:measurement"
NEAR = 0.1  # of the radius: closer than this two trials are the same
SCATTER = 0.25  # of the radius, by which a further worker's values are moved


class TuneLossSampler(optuna.samplers.BaseSampler):  # type: ignore[misc]  # Any where optuna is missing
    """:class:`~lossmeta.tuneloss.TuneLoss` as a sampler, for workers that share a study through its storage.

    A sampler keeps nothing. Each time it makes the tuner anew from the finished trials, in the order in which they were
    finished, so that all workers see the same one, and one that was killed is replaced by another. A trial counts if
    :func:`report` has written what its model says; whether it then failed or was pruned does not matter. Trials without
    are counted as failed and say nothing of the trust region, since a machine may have been lost. Trials that wait or
    run say nothing yet.

    The first worker that asks gets the tuner's own values. The next gets others if a trial that runs, or one that
    ended without a report, has these already (closer than a tenth of the trust region's radius), or if an earlier trial
    runs and has not been given its values yet: each coordinate, or a whole vector, is moved by up to a quarter of the
    radius, and stays inside the trust region. Before the first report it is up to the whole radius. What moves them
    depends on the trial's number and the seed, so that no two workers get the same.

    A worker that is killed leaves a trial that seems to run. Optuna's heartbeat marks it as failed, or
    ``study.tell(number, state=TrialState.FAIL)`` does; until then others keep away from its values.

    Parameters that are not in ``bounds`` go to another sampler.

    Args:
        bounds: ``{name: (lower, upper)}``, of numbers or of vectors. An entry of a vector is a parameter of the study
            ``name[i]``. The scale is logarithmic where the lower bound is positive.
        seed: of the moves.
        independent_sampler: for parameters that are not in ``bounds``; by default ``RandomSampler``.
        options: those of :class:`~lossmeta.tuneloss.TuneLoss`.

    Raises:
        TypeError, ValueError: as :class:`~lossmeta.tuneloss.TuneLoss`. In a study of several objectives, and for a
            parameter of ``bounds`` that is asked for with another kind or scale, suggestions raise a ValueError.

    Example:
        >>> import numpy, optuna
        >>> from lossmeta.integrations.optuna import TuneLossSampler, report
        >>> from lossmeta.tuneloss import Measurement
        >>> sampler = TuneLossSampler({"l2": (0.01, 10.0)})
        >>> def objective(trial):
        ...     l2 = sampler.suggest(trial)["l2"]
        ...     # Here a model is trained, and lossmeta.tuneloss.measure looks at it.
        ...     found = Measurement((l2 - 1) ** 2, slope=numpy.array([2 * (l2 - 1)]), curvature=numpy.eye(1) * 2)
        ...     return report(trial, found)
        >>> study = optuna.create_study(sampler=sampler)
        >>> study.optimize(objective, n_trials=5)
        >>> round(study.best_params["l2"], 3)
        1.0
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        seed: int = 0,
        independent_sampler: Any = None,
        **options: Any,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"TuneLossSampler: seed must be an integer, got {type(seed).__name__}")
        if seed < 0:
            raise ValueError(f"TuneLossSampler: seed must be at least 0, got {seed}")
        box = TuneLoss(bounds, **options).box
        self.bounds, self.seed, self.options = dict(bounds), int(seed), options
        self.independent_sampler = independent_sampler or optuna.samplers.RandomSampler(seed=seed)
        # In the order of the box's entries.
        self.distributions = {
            name: FloatDistribution(low, high, log=low > 0)
            for name, low, high in zip(
                _entry_names(box.places), box.lower.tolist(), box.upper.tolist(), strict=True
            )
        }

    def suggest(self, trial: Any) -> Values:
        """Values by name, numbers or float64 arrays, as :meth:`~lossmeta.tuneloss.TuneLoss.ask` gives them.

        Args:
            trial: of a study, whose sampler may be another: that of a fixed trial, or a rival.
        """
        box = self._new_tuner().box
        return box.named(
            np.array(
                [trial.suggest_float(n, d.low, d.high, log=d.log) for n, d in self.distributions.items()]
            )
        )

    def tuner(self, study: Any) -> TuneLoss:
        """The tuner that has been told what the finished trials of a study have reported.

        ``failed`` has the trials without a report, too.
        """
        return self._tuner(study.get_trials(deepcopy=False))

    def _new_tuner(self) -> TuneLoss:
        return TuneLoss(self.bounds, **self.options)

    def _tuner(self, trials: Sequence[Any]) -> TuneLoss:
        tuner = self._new_tuner()
        finished = [t for t in trials if t.state.is_finished()]
        silent, lost = 0, 0
        for trial in sorted(finished, key=lambda t: (t.datetime_complete, t.number)):
            if ATTRIBUTE not in trial.user_attrs:
                silent += trial.state == TrialState.COMPLETE
                lost += 1
                continue
            try:
                tuner.tell(self._values(trial), _read(trial))
            except (TypeError, ValueError, KeyError) as error:
                lost += 1
                warnings.warn(
                    f"TuneLossSampler: trial {trial.number} must fit the tuner, got {error}; it is left out",
                    stacklevel=2,
                )
        if silent:
            warnings.warn(
                f"TuneLossSampler: a trial must report its measurement, got none from {silent} that completed; call "
                "lossmeta.integrations.optuna.report in the objective",
                stacklevel=2,
            )
        tuner.failed += lost
        return tuner

    def _values(self, trial: Any) -> Values:
        return self._new_tuner().box.named(np.array([trial.params[name] for name in self.distributions]))

    # ---- What Optuna asks.

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self.distributions)

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, float]:
        self._raise_error_if_multi_objective(study)
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        tuner = self._tuner(trials)
        box = tuner.box
        unit = box.unit(box.entries(tuner.ask()))
        if self._taken(tuner, unit, trials, trial.number):
            unit = self._moved(tuner, unit, trial.number)
        entries = box.at(unit)
        return dict(zip(self.distributions, entries.tolist(), strict=True))

    def _taken(self, tuner: TuneLoss, unit: Array, trials: Sequence[Any], number: int) -> bool:
        for other in trials:
            running = other.state == TrialState.RUNNING
            if not running and (not other.state.is_finished() or ATTRIBUTE in other.user_attrs):
                continue
            if not self.distributions.keys() <= other.params.keys():
                # Two that start at once do not see each other's values. The later one gives way.
                if running and other.number < number:
                    return True
                continue
            try:
                theirs = tuner.box.unit(tuner.box.entries(self._values(other)))
            except ValueError:  # out of bounds: put there by hand
                continue
            if np.abs(theirs - unit).max() <= NEAR * tuner.radius:
                return True
        return False

    def _moved(self, tuner: TuneLoss, unit: Array, number: int) -> Array:
        box = tuner.box
        move = np.random.default_rng([self.seed, number]).uniform(-1, 1, box.size)
        for group in box.groups:  # hundreds of independent moves would never be alike
            move[group] = move[group.start]
        lower, upper = np.zeros(box.size), np.ones(box.size)
        reach = tuner.radius
        centre = min(tuner.trials, key=lambda t: t.measurement.error, default=None)
        if centre is not None:
            reach *= SCATTER
            middle = box.unit(box.entries(centre.values))
            lower, upper = np.maximum(lower, middle - tuner.radius), np.minimum(upper, middle + tuner.radius)
        # At a border the move is to the other side: clipped, workers would meet there.
        moved = unit + reach * move
        turned = unit - reach * move
        return np.clip(np.where((moved < lower) | (moved > upper), turned, moved), lower, upper)

    def sample_independent(
        self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.independent_sampler.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        self.independent_sampler.reseed_rng()


def report(trial: Any, measurement: Measurement) -> float:
    """Writes what a trained model says into its trial, where :class:`TuneLossSampler` reads it.

    k parameters take about 22 k^2 bytes, as JSON. A column of MySQL holds 64 kB.

    Args:
        trial: of a study, after its values were suggested.
        measurement: from :func:`~lossmeta.tuneloss.measure`.

    Returns:
        The validation error, for the objective to return.

    Raises:
        TypeError: for a measurement that is none.
        ValueError: in a study with a :class:`TuneLossSampler`, for a measurement that its tuner refuses, or before all
            values were suggested. Nothing is written then.
    """
    if not isinstance(measurement, Measurement):
        raise TypeError(f"report: measurement must be a Measurement, got {type(measurement).__name__}")
    sampler = getattr(getattr(trial, "study", None), "sampler", None)
    if isinstance(sampler, TuneLossSampler):
        missing = [name for name in sampler.distributions if name not in trial.params]
        if missing:
            raise ValueError(
                f"report: values of the trial must have been suggested, got none of {', '.join(missing)}; call "
                "TuneLossSampler.suggest first"
            )
        sampler._new_tuner().tell(sampler._values(trial), measurement)
    state = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in measurement.state_dict().items()
    }
    trial.set_user_attr(ATTRIBUTE, json.dumps(state, default=float))
    return float(measurement.error)


def _read(trial: Any) -> Measurement:
    return Measurement.of_state(json.loads(trial.user_attrs[ATTRIBUTE]))


def _entry_names(places: dict[str, int | slice]) -> list[str]:
    found: list[str] = []
    for name, place in places.items():
        found += (
            [name] if isinstance(place, int) else [f"{name}[{i}]" for i in range(place.stop - place.start)]
        )
    return found
