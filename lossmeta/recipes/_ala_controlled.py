"""Training under the ALA paper's controller, and the start of its policy in another run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta.ala import ClassCorrelation, Controller, Policy
from lossmeta.experiments import Method, Trial
from lossmeta.metrics import ErrorRate, Metric
from lossmeta.recipes._ala_curves import Watch, Watching
from lossmeta.recipes._ala_images import ImageFit, best_of, split
from lossmeta.recipes._ala_methods import Fit, record_values, record_window
from lossmeta.recipes._ala_tasks import CLASSES, CLEAN, DIGITS, SEARCH, Drawn, draw, task

FIRST_RUN = 50  # the child whose network only serves to learn a policy


# With nothing negative off the diagonal classes can only be merged.
LOWEST = {"paper": -1.0, "merging": 0.0}


class Chance(Metric):
    """A number drawn by chance, whatever the scores."""

    higher_is_better = True

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        return torch.rand(len(scores), generator=self.generator, dtype=torch.float64)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """As a metric: lower is better."""
    return F.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Adaptive:
    """Training under the controller.

    Attributes:
        space: a key of ``LOWEST``.
        children: networks that share the policy.
        best: whether the network that is best on the validation part is reported, or the first one.
        reward: ``"metric"``, ``"loss"``, which is the cross-entropy, or ``"chance"``.
        rewarded_on: ``"valid"`` or ``"train"``.
        policy: where it comes from: ``None`` for the start, ``"first run"`` for a run with another network on the same
            data, ``"digits"`` for a run on those.
        learn: whether it learns.
        options: further ones of the controller.
    """

    space: str = "paper"
    children: int = 1
    best: bool = True
    reward: str = "metric"
    rewarded_on: str = "valid"
    policy: str | None = None
    learn: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def method(
        self,
        label: str,
        rate: float,
        step_size: float,
        *,
        watching: Watching | None = None,
        finally_: Callable[[Trial, Controller], None] = lambda trial, controller: None,
    ) -> Method:
        """As a row.

        Args:
            label: of it.
            rate: learning rate.
            step_size: of Phi, in units of 0.1.
            watching: see :func:`by_rule`; of the first network.
            finally_: called when training ends.
        """

        def train(trial: Trial) -> dict[str, float]:
            policy = self._policy(trial, rate, step_size)
            fits = [ImageFit(trial, rate, child) for child in range(self.children)]
            controller = self._controller(fits[0], step_size, policy)
            run_controlled(controller, fits, watching(fits[0]) if watching else None)
            if controller.windows and controller.paths is not None:
                record_values(trial, controller.schedule())
            finally_(trial, controller)
            chosen = best_of(fits) if self.best else fits[0]
            moved = controller.losses[fits.index(chosen)].values
            far = torch.cat([moved["diagonal"] - 1, moved["pairs"]]).abs().mean().item()
            return {**chosen.measures(), "distance from the identity": far, "ties": controller.ties}

        described = {k: v for k, v in vars(self).items() if k != "options"} | dict(self.options)
        kind = "Controller" + (", random reward" if self.reward == "chance" else "")
        kind += ", Phi >= 0" if self.space == "merging" else ""
        return Method(label, train, {"kind": kind, "rate": rate, "step_size": step_size, **described})

    def _controller(self, fit: ImageFit, step_size: float, policy: Policy | None) -> Controller:
        metric: Any = fit.new_metric()
        options: dict[str, Any] = dict(self.options)
        if self.reward == "loss":
            metric, options["higher_is_better"] = cross_entropy, False
        elif self.reward == "chance":
            metric = Chance(fit.trial.random_seed(SEARCH) + 1)
        if self.rewarded_on == "train":
            options["rewarded_on"] = split(fit.drawn.train)
        return Controller(
            ClassCorrelation(CLASSES, lowest=LOWEST[self.space]),
            metric,
            split(fit.drawn.valid),
            steps=fit.steps,
            children=self.children,
            window=min(fit.setting.window, fit.steps),
            evaluations=min(fit.setting.evaluations, fit.steps),
            step_size=step_size,
            policy=policy,
            learn=self.learn,
            seed=fit.trial.random_seed(SEARCH),
            **options,
        )

    def _policy(self, trial: Trial, rate: float, step_size: float) -> Policy | None:
        """Learned once for all methods of a seed that begin with it, who get copies."""
        if self.policy is None:
            return None
        key = self.policy, self.space, rate, step_size
        if key not in trial.scratch:
            with trial.seeded(SEARCH):
                if self.policy == "digits":
                    trial.scratch[key] = digits_policy(trial, self.space, step_size)
                else:
                    fit = ImageFit(trial, rate, FIRST_RUN)
                    controller = Adaptive(self.space)._controller(fit, step_size, None)
                    run_controlled(controller, [fit])
                    trial.scratch[key] = controller.policy
        known: Policy = trial.scratch[key]
        policy = Policy(known.features, hidden=known.hidden, history=known.history, parts=known.parts)
        policy.load_state_dict(known.state_dict())
        return policy


def run_controlled(controller: Controller, fits: list[Any], watch: Watch | None = None) -> None:
    """Each network under a loss of its own, on the same batches; ``watch`` sees the first."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Controller: the metric")
        for i, x, y in fits[0].batches():
            for fit, loss in zip(fits, controller.losses, strict=True):
                if fit is not fits[0]:
                    fit.schedule(i)
                value = loss(fit.model(x), y)
                fit.step(value)
                if watch and fit is fits[0]:
                    watch(i, value)
            record_window(fits[0].trial, i + 1, controller.step([fit.model for fit in fits]))


def digits_policy(trial: Trial, space: str, step_size: float) -> Policy | None:
    """Of a network of one hidden layer on the digits, at a learning rate of 0.1."""
    digits = task(DIGITS, CLEAN, min(trial.task.settings["steps"], DIGITS.steps))
    drawn: Drawn = draw(DIGITS, CLEAN, trial.seed, trial.device)
    fit = Fit(Trial(digits, trial.seed, trial.device, drawn, {}, lambda share: None, trial.folder), 0.1)
    window = min(5, fit.steps)
    controller = Controller(
        ClassCorrelation(CLASSES, lowest=LOWEST[space]),
        ErrorRate(),
        drawn.valid,
        steps=fit.steps,
        window=window,
        evaluations=min(2, window),
        step_size=step_size,
        seed=trial.random_seed(SEARCH),
    )
    run_controlled(controller, [fit])
    return controller.policy
