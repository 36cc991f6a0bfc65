"""Rivals of TuneLoss that ask and are told alike: random search, Bayesian optimisation, and TuneReg."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np

from lossmeta.tuneloss._box import Array, Bounds, Box, Values
from lossmeta.tuneloss.measurement import Measurement, Trial


class _Search(ABC):
    """Asks for values that depend on the bounds, the seed and what was told, and on nothing else."""

    def __init__(self, bounds: Bounds, seed: int = 0) -> None:
        name = type(self).__name__
        self.box = Box.of(name, bounds)
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"{name}: seed must be an integer, got {type(seed).__name__}")
        if seed < 0:
            raise ValueError(f"{name}: seed must be at least 0, got {seed}")
        self.seed = int(seed)
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self._failures: list[Array] = []

    @property
    def failed(self) -> int:
        return len(self._failures)

    @abstractmethod
    def _next(self) -> Array:
        """Entries [k]."""

    def ask(self) -> Values:
        """The next values by name, numbers or float64 arrays; the same ones until something is told."""
        return self.box.named(np.clip(self._next(), self.box.lower, self.box.upper))

    def tell(self, values: Mapping[str, Any], measurement: Measurement | float) -> None:
        """What training with these values led to; they need not have been asked for.

        Args:
            values: by name.
            measurement: a :class:`Measurement` or the validation error. One that is not finite says that it failed.

        Raises:
            TypeError: for a measurement that is neither.
            ValueError: for values of other names or out of bounds. Nothing has changed then.
        """
        entries = self.box.entries(values)
        if not isinstance(measurement, Measurement):
            try:
                measurement = Measurement(float(measurement))
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"{type(self).__name__}: measurement must be a Measurement or a number, got "
                    f"{type(measurement).__name__}"
                ) from error
        if not np.isfinite(measurement.error):
            self._failures.append(entries)
            return
        self._check_needs(measurement)
        trial = Trial(self.box.named(entries), measurement)
        self.trials.append(trial)
        if self.best is None or measurement.error < self.best.measurement.error:
            self.best = trial

    def _check_needs(self, measurement: Measurement) -> None:
        """The error is enough."""
        return None

    @property
    def _told(self) -> int:
        return len(self.trials) + self.failed

    def _random(self) -> Array:
        """Entries [k], uniform in the box's coordinates."""
        return self.box.at(np.random.default_rng([self.seed, self._told]).random(self.box.size))

    def state_dict(self) -> dict[str, Any]:
        """The seed and the trials, as numbers, strings, lists, dictionaries and arrays."""
        return {
            "method": type(self).__name__,
            "names": list(self.box.places),
            "lower": self.box.lower.copy(),
            "upper": self.box.upper.copy(),
            "seed": self.seed,
            "failures": [self.box.named(entries) for entries in self._failures],
            "trials": [
                {"values": dict(t.values), "measurement": t.measurement.state_dict()} for t in self.trials
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; arrays may have become lists, as JSON makes them.

        Raises:
            ValueError: for a state of another method or of other bounds, and a damaged one. Nothing has changed then.
        """
        name = type(self).__name__
        try:
            same = state["method"] == name and list(state["names"]) == list(self.box.places)
            for key, bound in (("lower", self.box.lower), ("upper", self.box.upper)):
                same = same and np.array_equal(np.asarray(state[key], dtype=np.float64), bound)
            seed = int(state["seed"])
            told = [(s["values"], Measurement.of_state(s["measurement"])) for s in state["trials"]]
            told += [(values, Measurement(np.nan)) for values in state["failures"]]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{name}: state must be what state_dict gave, got one without {error}"
            ) from error
        if not same:
            raise ValueError(
                f"{name}: state must be of the same method and bounds, got another; make it as it was"
            )
        new = copy(self)
        new.seed, new.trials, new.best, new._failures = seed, [], None, []
        for values, measurement in told:
            new.tell(values, measurement)
        self.__dict__.update(new.__dict__)


class RandomSearch(_Search):
    """Draws every value at random: log-uniform where the lower bound is positive, else uniform.

    Args:
        bounds: ``{name: (lower, upper)}``, of numbers or of vectors.
        seed: of the draws. Trial n of a seed has the same values in every process.

    Attributes:
        trials: that were told, the failed ones left out.
        best: the trial of the least error so far, or ``None``.
        failed: how many trials had an error that was not finite.

    Raises:
        TypeError: for bounds that are no mapping of pairs, and a seed that is no integer.
        ValueError: for bounds that are not finite or not in order, and a negative seed.

    Example:
        >>> from lossmeta.tuneloss import RandomSearch
        >>> search = RandomSearch({"l2": (0.01, 10.0), "dropout": (0.0, 1.0)}, seed=1)
        >>> for _ in range(20):
        ...     values = search.ask()
        ...     search.tell(values, (values["l2"] - 1) ** 2 + values["dropout"])
        >>> list(search.best.values)
        ['l2', 'dropout']
    """

    def _next(self) -> Array:
        return self._random()


class _Optuna(_Search):
    """A sampler of Optuna, made anew for every question, so that nothing is hidden in it."""

    def __init__(self, bounds: Bounds, seed: int = 0) -> None:
        super().__init__(bounds, seed)
        _optuna(type(self).__name__)

    @abstractmethod
    def _sampler(self, optuna: Any, seed: int) -> Any: ...

    def _next(self) -> Array:
        optuna = _optuna(type(self).__name__)
        box = self.box
        distributions = {
            str(i): optuna.distributions.FloatDistribution(low, high, log=low > 0)
            for i, (low, high) in enumerate(zip(box.lower.tolist(), box.upper.tolist(), strict=True))
        }
        seed = int(np.random.SeedSequence([self.seed, self._told]).generate_state(1)[0])
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(sampler=self._sampler(optuna, seed))
            for trial in self.trials:
                params = dict(zip(distributions, box.entries(trial.values).tolist(), strict=True))
                study.add_trial(
                    optuna.trial.create_trial(
                        params=params, distributions=distributions, value=trial.measurement.error
                    )
                )
            params = study.ask(distributions).params
        finally:
            optuna.logging.set_verbosity(level)
        return np.array([params[name] for name in distributions])


class GaussianProcess(_Optuna):
    """Bayesian optimisation by a Gaussian process and expected improvement: ``GPSampler`` of Optuna.

    Its first ten trials are random. It needs ``pip install "lossmeta[integrations]"``.

    Args:
        bounds: ``{name: (lower, upper)}``, of numbers or of vectors.
        seed: of the sampler.

    Attributes:
        trials, best, failed: as those of :class:`RandomSearch`.

    Raises:
        ImportError: without Optuna.
        TypeError, ValueError: as :class:`RandomSearch`.

    Example:
        >>> from lossmeta.tuneloss import GaussianProcess
        >>> search = GaussianProcess({"l2": (0.01, 10.0)})
        >>> search.tell(search.ask(), 0.5)
    """

    def _sampler(self, optuna: Any, seed: int) -> Any:
        return optuna.samplers.GPSampler(seed=seed)


class TPE(_Optuna):
    """Bayesian optimisation by tree-structured Parzen estimators: ``TPESampler`` of Optuna.

    Its first ten trials are random. It needs ``pip install "lossmeta[integrations]"``.

    Args:
        bounds: ``{name: (lower, upper)}``, of numbers or of vectors.
        seed: of the sampler.

    Attributes:
        trials, best, failed: as those of :class:`RandomSearch`.

    Raises:
        ImportError: without Optuna.
        TypeError, ValueError: as :class:`RandomSearch`.

    Example:
        >>> from lossmeta.tuneloss import TPE
        >>> search = TPE({"l2": (0.01, 10.0)})
        >>> search.tell(search.ask(), 0.5)
    """

    def _sampler(self, optuna: Any, seed: int) -> Any:
        return optuna.samplers.TPESampler(seed=seed)


class TuneReg(_Search):
    r"""Learns the loss from validation errors and features alone, without gradients.

    After ``initial`` trials the next values are those of :func:`learn_loss` of all trials, with the task's loss fixed
    at coefficient 1: they make the best model that of least loss, and the loss agree with a multiple of the validation
    errors. Values that were tried already say nothing new, and random ones take their place. The error may be any
    metric to be lowered.

    What its paper leaves open is assumed, and told in full here: the first trial is the middle of the box, in
    coordinates that are logarithmic where a lower bound is positive; further initial ones are random; the cost and the
    constraints are those of LearnLoss, which that paper's successor says generalises LearnLinReg.

    Args:
        bounds: ``{name: (lower, upper)}``, of numbers or of vectors.
        seed: of random values.
        initial: trials before the first loss is learned.
        solver: of :func:`learn_loss`.

    Attributes:
        trials, best, failed: as those of :class:`RandomSearch`.

    Raises:
        TypeError: as :class:`RandomSearch`.
        ValueError: as :class:`RandomSearch`, and for ``initial`` less than 2. :meth:`tell` raises one for a measurement
            without features.

    Sources:
        Streeter, "Learning Optimal Linear Regularizers" (2019), TuneReg and LearnLinReg. Streeter, "Learning Effective
        Loss Functions Efficiently" (2019), Eq. 6 without gradients.

    Example:
        >>> from lossmeta.tuneloss import Measurement, TuneReg
        >>> search = TuneReg({"l2": (0.01, 10.0)})
        >>> values = search.ask()
        >>> search.tell(values, Measurement(error=0.7, features=torch.tensor([0.5, 0.2]).numpy()))
        >>> list(search.best.values)
        ['l2']
    """

    def __init__(self, bounds: Bounds, seed: int = 0, *, initial: int = 2, solver: str = "auto") -> None:
        super().__init__(bounds, seed)
        if initial < 2:
            raise ValueError(f"TuneReg: initial must be at least 2, got {initial}; any loss fits one trial")
        self.initial, self.solver = initial, solver

    def _check_needs(self, measurement: Measurement) -> None:
        shape = None if measurement.features is None else np.shape(measurement.features)
        if shape != (1 + self.box.size,):
            raise ValueError(
                f"TuneReg: features of the measurement must have shape {[1 + self.box.size]}, got "
                f"{'none' if shape is None else list(shape)}; measure the model with lossmeta.tuneloss.measure"
            )
        if not np.isfinite(np.asarray(measurement.features)).all():
            raise ValueError("TuneReg: features of the measurement must be finite, got NaN or infinity")

    def _next(self) -> Array:
        if not self._told:
            return self.box.at(np.full(self.box.size, 0.5))
        if len(self.trials) < self.initial:
            return self._random()
        found = self._learned()
        unit = self.box.unit(found)
        tried = [*(self.box.entries(t.values) for t in self.trials), *self._failures]
        return self._random() if any(np.abs(unit - self.box.unit(t)).max() < 1e-6 for t in tried) else found

    def _learned(self) -> Array:
        from lossmeta.tuneloss.learn_loss import learn_loss

        learned = learn_loss(
            np.array([t.measurement.error for t in self.trials]),
            np.stack([np.asarray(t.measurement.features, dtype=np.float64) for t in self.trials]),
            np.concatenate([[1.0], self.box.lower]),
            np.concatenate([[1.0], self.box.upper]),
            solver=self.solver,
        )
        return np.clip(np.asarray(learned.values, dtype=np.float64)[1:], self.box.lower, self.box.upper)


def _optuna(name: str) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            f'{name}: optuna must be installed, got {str(error)!r}; pip install "lossmeta[integrations]"'
        ) from error
    return optuna
