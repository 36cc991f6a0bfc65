"""The tuner: asks for parameters of a loss, and is told what training with them led to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lossmeta._checks import check_at_least_one, check_positive_and_finite, choice
from lossmeta.tuneloss._box import Array, Bounds, Box, Values
from lossmeta.tuneloss.gauss_newton import gauss_newton_step
from lossmeta.tuneloss.measurement import Measurement, Trial

LEAST_RADIUS = 0.003
METHODS = {"gauss_newton": "gauss_newton", "paper": "paper"}


class TuneLoss:
    r"""Tunes the parameters of a loss from few training runs, since each says where to go next.

    :meth:`ask` gives parameters. A model is trained with them, as by :class:`TunedLoss`, and :func:`measure` looks at
    it. :meth:`tell` takes the measurement. The first parameters are the middle of the box, in coordinates that are
    logarithmic where a lower bound is positive.

    With ``"gauss_newton"`` the next ones minimise the quadratic
    :math:`c^\top d + d^\top B d / 2` of the measurement at the best trial, inside the box and a trust region around it.
    A trial in the region that is better than the best widens it by ``growth``; one that is not leaves a quarter of its
    step, at least 0.003. After a failed first trial the next ones are drawn from the box.

    With ``"paper"`` they are :func:`learn_loss` of all trials, with its cost, Eq. 6, and its constraints. Gradients are
    used where all of the trials have a Gram matrix. Without them the second parameters are drawn from the box, since
    any loss fits one model.

    Models that exist already, or checkpoints, are told before the first :meth:`ask`, with the values that they were
    trained with.

    In one run a trial is a round of it, an epoch or some steps: the same model trains on with the values that
    :meth:`ask` gives. Earlier rounds measured the model as it was, so ``window=1`` goes on from the last one alone.
    :attr:`best` then has the values of the best round, not ones that a whole run was trained with.

    Args:
        bounds: ``{name: (lower, upper)}``, of numbers or of vectors.
        method: ``"gauss_newton"`` or ``"paper"``.
        start: the first values, by name.
        radius: r of the trust region :math:`\|u - u_b\|_\infty \le r` in coordinates from 0 to 1.
        growth: by which a success widens it, up to 1.
        shrinkage: :math:`\rho`, the pull of a vector's coordinates to their mean.
        window: how many finite trials count, the last ones. ``None`` is all, 1 is for rounds of one run.
        eps: weight of gradients in Eq. 6, for ``"paper"``; see :func:`learn_loss`.
        solver: for ``"paper"``; see :func:`learn_loss`.

    Attributes:
        trials: that were told, the failed ones left out; of a window the last.
        best: the trial of the least error so far, or ``None``.
        failed: how many trials had an error that was not finite.
        radius: of the trust region now.

    Raises:
        TypeError: for bounds that are no mapping of pairs.
        ValueError: for bounds that are not finite or not in order, a start outside of them, and options out of range.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), Algorithm TuneLoss, is ``"paper"``. The
        step of ``"gauss_newton"`` is another one.

    Example:
        >>> from lossmeta.tuneloss import SquaredL2, TunedLoss, TuneLoss, measure
        >>> train, valid = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
        >>> loss = TunedLoss(torch.nn.functional.cross_entropy, {"l2": SquaredL2()})
        >>> tuner = TuneLoss({"l2": (0.01, 10.0)})
        >>> for _ in range(3):
        ...     values = tuner.ask()
        ...     loss.set(values)
        ...     model = torch.nn.Linear(4, 3)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        ...     for _ in range(50):
        ...         optimizer.zero_grad()
        ...         loss(model, *train).backward()
        ...         optimizer.step()
        ...     tuner.tell(values, measure(model, loss, values, train, valid))
        >>> list(tuner.best.values)
        ['l2']
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        method: str = "gauss_newton",
        start: Mapping[str, Any] | None = None,
        radius: float = 0.35,
        growth: float = 1.5,
        shrinkage: float = 0.5,
        window: int | None = None,
        eps: float | str = "balanced",
        solver: str = "auto",
    ) -> None:
        self.box = Box.of("TuneLoss", bounds)
        self.method = choice("TuneLoss", "method", method, METHODS)
        middle = self.box.at(np.full(self.box.size, 0.5))
        self.start = middle if start is None else self.box.entries(start)
        check_positive_and_finite("TuneLoss", "radius", radius)
        if not radius <= 1:
            raise ValueError(f"TuneLoss: radius must be at most 1, got {radius}")
        if not 1 <= growth < np.inf:
            raise ValueError(f"TuneLoss: growth must be at least 1 and finite, got {growth}")
        if not 0 <= shrinkage < np.inf:
            raise ValueError(f"TuneLoss: shrinkage must be at least 0 and finite, got {shrinkage}")
        if window is not None:
            check_at_least_one("TuneLoss", "window", window)
        self.radius, self.growth, self.shrinkage, self.window = float(radius), growth, shrinkage, window
        self.eps, self.solver = eps, solver
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self.failed = 0

    def ask(self) -> Values:
        """The next values by name, numbers or float64 arrays; the same ones until something is told.

        Raises:
            ValueError: as :func:`learn_loss` does.
        """
        if not self.trials and not self.failed:
            return self.box.named(self.start)
        if not self.trials or (self.method == "paper" and len(self.trials) == 1 and not self._has_grams()):
            return self.box.named(self._drawn())
        return self.box.named(self._gauss_newton() if self.method == "gauss_newton" else self._paper())

    def tell(self, values: Mapping[str, Any], measurement: Measurement | float) -> None:
        """What training with these values led to; they need not have been asked for.

        Args:
            values: by name, in any order.
            measurement: from :func:`measure`. Where anything in it is not finite the trial counts as failed; a NaN says
                so, too.

        Raises:
            TypeError: for a measurement that is neither a :class:`Measurement` nor a number.
            ValueError: for values of other names or out of bounds, a measurement of another number or order of
                parameters, and a finite one without what the method needs. Nothing has changed then.
        """
        entries = self.box.entries(values)
        measurement = self._checked(measurement)
        if not measurement.finite:
            centre = self._centre()
            self.failed += 1
            if centre is not None:
                self._judge(entries, centre, better=False)
            return
        self._check_needs(measurement)
        trial = Trial(self.box.named(entries), measurement)
        centre = self._centre()
        if centre is not None:
            self._judge(entries, centre, better=measurement.error < centre.measurement.error)
        self.trials = [*self.trials, trial][-self.window if self.window else 0 :]
        if self.best is None or measurement.error < self.best.measurement.error:
            self.best = trial

    def _centre(self) -> Trial | None:
        """The best trial that counts; the first of equal ones."""
        return min(self.trials, key=lambda t: t.measurement.error, default=None)

    def _judge(self, entries: Array, centre: Trial, *, better: bool) -> None:
        """Only a trial inside the trust region says something of its size."""
        unit, middle = self.box.unit(entries), self.box.unit(self.box.entries(centre.values))
        step = float(np.abs(unit - middle).max())
        if not 1e-9 < step <= self.radius + 1e-9:
            return
        self.radius = min(1.0, self.growth * self.radius) if better else max(LEAST_RADIUS, step / 4)

    # ---- The next values.

    def _drawn(self) -> Array:
        """From the box; one coordinate for all of a vector, since hundreds of independent ones would never be alike."""
        unit = np.random.default_rng(self.failed + len(self.trials)).random(self.box.size)
        for group in self.box.groups:
            unit[group] = unit[group.start]
        return self.box.at(unit)

    def _has_grams(self) -> bool:
        return all(t.measurement.gram is not None for t in self.trials)

    def _gauss_newton(self) -> Array:
        centre = self._centre()
        assert centre is not None
        found = centre.measurement
        assert found.slope is not None and found.curvature is not None
        best = self.box.entries(centre.values)
        return gauss_newton_step(self.box, best, found.slope, found.curvature, self.radius, self.shrinkage)

    def _paper(self) -> Array:
        from lossmeta.tuneloss.learn_loss import learn_loss

        found = [t.measurement for t in self.trials]
        grams = np.stack([m.gram for m in found if m.gram is not None]) if self._has_grams() else None
        learned = learn_loss(
            np.array([m.error for m in found]),
            np.stack([m.features for m in found if m.features is not None]),
            np.concatenate([[1.0], self.box.lower]),
            np.concatenate([[1.0], self.box.upper]),
            grams=grams,
            eps=self.eps,
            solver=self.solver,
        )
        return np.clip(np.asarray(learned.values, dtype=np.float64)[1:], self.box.lower, self.box.upper)

    # ---- What is told.

    def _checked(self, measurement: Measurement | float) -> Measurement:
        if not isinstance(measurement, Measurement):
            try:
                return Measurement(float(measurement))
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"TuneLoss: measurement must be a Measurement or a number, got {type(measurement).__name__}"
                ) from error
        size, names = self.box.size, list(self.box.places)
        if measurement.names is not None and list(measurement.names) != names:
            raise ValueError(
                f"TuneLoss: measurement must have the parameters {', '.join(names)}, in that order, got "
                f"{', '.join(measurement.names)}; give measure the values that ask gave"
            )
        shapes = {
            "features": (1 + size,),
            "gram": (2 + size, 2 + size),
            "slope": (size,),
            "curvature": (size, size),
        }
        for name, shape in shapes.items():
            value = getattr(measurement, name)
            if value is not None and np.shape(value) != shape:
                raise ValueError(
                    f"TuneLoss: {name} of the measurement must have shape {list(shape)}, got {list(np.shape(value))}"
                )
        return measurement

    def _check_needs(self, measurement: Measurement) -> None:
        needed: tuple[str, ...] = ("features",)
        remedy = "measure the model with lossmeta.tuneloss.measure"
        if self.method == "gauss_newton":
            needed = ("slope", "curvature")
            remedy += ", not with metric='gram'; method='paper' needs features alone"
        missing = [name for name in needed if getattr(measurement, name) is None]
        if missing:
            raise ValueError(
                f"TuneLoss: measurement must have {' and '.join(needed)} for method={self.method!r}, got one without "
                f"{' and '.join(missing)}; {remedy}"
            )

    # ---- State.

    def state_dict(self) -> dict[str, Any]:
        """Trials and the trust region, as numbers, strings, lists, dictionaries and arrays."""
        return {
            "names": {name: _size(place) for name, place in self.box.places.items()},
            "lower": self.box.lower.copy(),
            "upper": self.box.upper.copy(),
            "method": self.method,
            "radius": self.radius,
            "failed": self.failed,
            "trials": [_state_of(t) for t in self.trials],
            "best": None if self.best is None else _state_of(self.best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; arrays may have become lists, as JSON makes them.

        Raises:
            ValueError: for a state of other bounds or of another method, and a damaged one. Nothing has changed then.
        """
        try:
            own = {name: _size(place) for name, place in self.box.places.items()}
            same = list(state["names"].items()) == list(own.items()) and state["method"] == self.method
            for name, bound in (("lower", self.box.lower), ("upper", self.box.upper)):
                same = same and np.array_equal(np.asarray(state[name], dtype=np.float64), bound)
            radius, failed = float(state["radius"]), int(state["failed"])
            trials = [self._trial_of(s) for s in state["trials"]]
            best = None if state["best"] is None else self._trial_of(state["best"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"TuneLoss: state must be what state_dict gave, got one without {error}"
            ) from error
        if not same:
            raise ValueError(
                "TuneLoss: state must be of the same bounds and method, got another; make the tuner as it was"
            )
        if not LEAST_RADIUS <= radius <= 1 and radius != self.radius:
            raise ValueError(f"TuneLoss: radius of the state must lie in [{LEAST_RADIUS}, 1], got {radius}")
        self.radius, self.failed, self.trials, self.best = radius, failed, trials, best
        if self.window:
            self.trials = self.trials[-self.window :]

    def _trial_of(self, state: Mapping[str, Any]) -> Trial:
        fields = dict(state["measurement"])
        for name in ("features", "gram", "slope", "curvature"):
            if fields.get(name) is not None:
                fields[name] = np.array(fields[name], dtype=np.float64)
        if fields.get("names") is not None:
            fields["names"] = tuple(fields["names"])
        measurement = self._checked(Measurement(**fields))
        self._check_needs(measurement)
        return Trial(self.box.named(self.box.entries(state["values"])), measurement)


def _size(place: int | slice) -> int | None:
    return None if isinstance(place, int) else place.stop - place.start


def _state_of(trial: Trial) -> dict[str, Any]:
    return {"values": dict(trial.values), "measurement": trial.measurement.state_dict()}
