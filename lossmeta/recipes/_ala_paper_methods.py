"""The rows of the ALA paper's tables of CIFAR-10: fixed losses, losses by rule, its controller, and what to compare it with."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta.ala import ClassCorrelation, Controller, Policy, Population, Robust, Smoothing
from lossmeta.ala.space import Coordinates
from lossmeta.experiments import Method, Task, Trial, Tuned
from lossmeta.metrics import ErrorRate, Metric
from lossmeta.ops import class_confusion, parametric_cross_entropy
from lossmeta.recipes import _ala_bandit, _ala_large_margin, _ala_self_paced
from lossmeta.recipes._ala_auc import AreaUnderPrecisionRecall, pairwise_auc_roc
from lossmeta.recipes._ala_images import ImageFit, Setting, split
from lossmeta.recipes._ala_methods import TUNING_SEEDS, Fit, Shuffled
from lossmeta.recipes._ala_pbt import Member, exploit_and_explore
from lossmeta.recipes._ala_tasks import CLASSES, CLEAN, DIGITS, SEARCH, SELECTION, Drawn
from lossmeta.recipes._ala_tasks import draw as draw_digits
from lossmeta.recipes._ala_tasks import task as digits_task

NOISE = 0.1  # of the identity, in the paper's random matrix
DUAL = 0.1  # of the learning rate, that of the multipliers
FIRST_RUN, DIGITS_RUN = 50, 51  # children whose networks only serve to learn a policy

Make = Callable[..., Method]
Then = Callable[[Method], Method]


def tuned(
    label: str,
    setting: Setting,
    make: Make,
    grid: Mapping[str, tuple[float, ...]],
    then: Then | None = None,
) -> Method | Tuned:
    """The method at the settings that suit it best on other seeds, by the validation part.

    Where there is only one setting, the method at that one.

    Args:
        label: of the row.
        setting: the size.
        make: makes a candidate, called with a label and what the grid has.
        grid: values by name; all combinations are tried.
        then: makes the row of the best candidate, where that is another method.
    """
    candidates = []
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        text = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in given.items())
        candidates.append(make(f"{make('', **given).settings['kind']}, {text}", **given))
    if len(candidates) == 1:
        only = then(candidates[0]) if then else candidates[0]
        return Method(label, only.train, only.settings)
    return Tuned(label, tuple(candidates), SELECTION.name, TUNING_SEEDS[: setting.tuning_seeds], then)


# ---- Fixed losses and losses by rule. Each has what a step costs, and what happens after a window.


@dataclass
class Rule:
    """A loss that needs no search.

    Attributes:
        fit: the training.
    """

    fit: ImageFit

    def __post_init__(self) -> None:
        """What is needed before the first step."""

    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def after(self, step: int) -> None:
        """Called after every step."""


class CrossEntropy(Rule):
    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.fit.model(x), y)


class SelfPaced(Rule):
    """Plain steps at first, to have losses to begin with; Kumar et al. do so too."""

    def __post_init__(self) -> None:
        self.first: float | None = None

    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        share = step / self.fit.steps
        losses = F.cross_entropy(self.fit.model(x), y, reduction="none")
        if share < 1 / _ala_self_paced.ROUNDS:
            return losses.mean()
        if self.first is None:
            train = self.fit.drawn.train
            known = F.cross_entropy(self.fit.predicted(train), train[1], reduction="none")
            self.first = _ala_self_paced.median(known)
        return _ala_self_paced.chosen(losses, _ala_self_paced.threshold(self.first, share))


@dataclass
class LargeMargin(Rule):
    """L-Softmax in the last layer, which has no bias then.

    Attributes:
        least_ease: of the margin.
    """

    least_ease: float = 0.0

    def __post_init__(self) -> None:
        *before, last = self.fit.model.children()
        self.body, self.last = torch.nn.Sequential(*before), last
        last.bias.requires_grad_(False)  # zero, as it was made

    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        ease = _ala_large_margin.ease(step / self.fit.steps, self.least_ease)
        logits = _ala_large_margin.large_margin_logits(self.body(x), self.last.weight, y, ease)
        return F.cross_entropy(logits, y)


class Matrix(Rule):
    """Eq. 6 under a matrix that stays the identity."""

    def __post_init__(self) -> None:
        self.phi = self.fixed()

    def fixed(self) -> Tensor:
        return torch.eye(CLASSES, device=self.fit.drawn.train[0].device)

    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        return parametric_cross_entropy(self.fit.model(x), y, self.phi)

    def after(self, step: int) -> None:
        if (step + 1) % self.fit.setting.window == 0:
            self.decide()

    def decide(self) -> None:
        """After every window."""

    def confusion(self) -> Tensor:
        """Eq. 7, on the validation part."""
        logits, labels = self.fit.predicted(self.fit.drawn.valid), self.fit.drawn.valid[1]
        sums, counts = class_confusion(logits, labels)
        return (sums / counts[:, None]).to(self.phi)


class RandomMatrix(Matrix):
    """The identity with noise of standard deviation 0.1 on every entry, drawn anew after every window."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.fit.trial.random_seed(SEARCH))
        self.decide()

    def decide(self) -> None:
        noise = NOISE * torch.randn(CLASSES, CLASSES, generator=self.generator)
        self.phi = self.fixed() + noise.to(self.fit.drawn.train[0].device)


class ConfusionMatrix(Matrix):
    """The confusions of Eq. 7 as they stand, over the largest: they reward what is unlikely."""

    def decide(self) -> None:
        confusion = self.confusion()
        self.phi = confusion / confusion.max()


class LikenessMatrix(Matrix):
    """What the confusions of Eq. 7 say of probability: their exponentials, 1 on the diagonal of a perfect model."""

    def decide(self) -> None:
        self.phi = (-self.confusion()).exp()


@dataclass
class Bandit(Matrix):
    """Raises Phi of pairs that are confused, and lowers it for the others.

    Attributes:
        step_size: of a decision, in units of 0.1.
    """

    step_size: float = 1.0

    def decide(self) -> None:
        self.phi = _ala_bandit.moved(self.phi, self.confusion(), 0.1 * self.step_size)


class PairwiseAUCROC(Rule):
    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        return pairwise_auc_roc(self.fit.model(x), y)


class AUCPR(Rule):
    """Multipliers move at a tenth of the learning rate, as in the authors' code."""

    def __post_init__(self) -> None:
        labels = self.fit.drawn.train[1]
        self.saddle = AreaUnderPrecisionRecall(labels.bincount(minlength=CLASSES) / len(labels))
        self.fit.optimizer.add_param_group({"params": [self.saddle.threshold], "lr": self.fit.rate})

    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.saddle(self.fit.model(x), y)
        return found

    def after(self, step: int) -> None:
        self.saddle.ascend(DUAL * self.fit.optimizer.param_groups[-1]["lr"])


ONE_AGAINST_REST = (PairwiseAUCROC, AUCPR)


def by_rule(
    label: str,
    kind: Callable[..., Rule],
    rate: float,
    *,
    with_validation: bool = False,
    networks: int = 1,
    **options: float,
) -> Method:
    """Training under a rule's loss; of several networks the best on the validation part is reported."""

    def train(trial: Trial) -> dict[str, float]:
        fits = []
        for child in range(networks):
            fit = ImageFit(trial, rate, child, kind in ONE_AGAINST_REST)
            rule = kind(fit, **options)
            for i, x, y in fit.batches(with_validation):
                fit.step(rule.loss(i, x, y))
                rule.after(i)
            fits.append(fit)
        return best_of(fits).measures()

    settings = {"rate": rate, "with validation": with_validation, "networks": networks, **options}
    return Method(label, train, {"kind": getattr(kind, "__name__", ""), **settings})


def best_of(fits: list[ImageFit]) -> ImageFit:
    """By the validation part."""
    return max(fits, key=lambda fit: fit.selection())


# ---- The paper's controller.


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
        children: networks that share the policy.
        best: whether the network that is best on the validation part is reported, or the first one.
        reward: ``"metric"``, ``"loss"``, which is the cross-entropy, or ``"chance"``.
        rewarded_on: ``"valid"`` or ``"train"``.
        policy: where it comes from: ``None`` for the start, ``"first run"`` for a run with another network on the same
            data, ``"digits"`` for a run on those.
        learn: whether it learns.
        options: further ones of the controller.
    """

    children: int = 1
    best: bool = True
    reward: str = "metric"
    rewarded_on: str = "valid"
    policy: str | None = None
    learn: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def method(self, label: str, rate: float, step_size: float) -> Method:
        def train(trial: Trial) -> dict[str, float]:
            policy = self._policy(trial, rate, step_size)
            fits = [ImageFit(trial, rate, child) for child in range(self.children)]
            controller = self._controller(fits[0], step_size, policy)
            run_controlled(controller, fits)
            chosen = best_of(fits) if self.best else fits[0]
            moved = controller.losses[fits.index(chosen)].values
            far = torch.cat([moved["diagonal"] - 1, moved["pairs"]]).abs().mean().item()
            return {**chosen.measures(), "distance from the identity": far, "ties": controller.ties}

        described = {k: v for k, v in vars(self).items() if k != "options"} | dict(self.options)
        kind = "Controller, random reward" if self.reward == "chance" else "Controller"
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
            ClassCorrelation(CLASSES),
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
        key = self.policy, rate, step_size
        if key not in trial.scratch:
            with trial.seeded(SEARCH):
                if self.policy == "digits":
                    trial.scratch[key] = digits_policy(trial, step_size)
                else:
                    fit = ImageFit(trial, rate, FIRST_RUN)
                    controller = Adaptive()._controller(fit, step_size, None)
                    run_controlled(controller, [fit])
                    trial.scratch[key] = controller.policy
        known: Policy = trial.scratch[key]
        policy = Policy(known.features, hidden=known.hidden, history=known.history, parts=known.parts)
        policy.load_state_dict(known.state_dict())
        return policy


def run_controlled(controller: Controller, fits: list[Any]) -> None:
    """Each network under a loss of its own, on the same batches."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Controller: the metric")
        for i, x, y in fits[0].batches():
            for fit, loss in zip(fits, controller.losses, strict=True):
                if fit is not fits[0]:
                    fit.schedule(i)
                fit.step(loss(fit.model(x), y))
            controller.step([fit.model for fit in fits])


def digits_policy(trial: Trial, step_size: float) -> Policy | None:
    """Of a network of one hidden layer on the digits, at a learning rate of 0.1."""
    task = digits_task(DIGITS, CLEAN, min(trial.task.settings["steps"], DIGITS.steps))
    drawn: Drawn = draw_digits(DIGITS, CLEAN, trial.seed, trial.device)
    fit = Fit(Trial(task, trial.seed, trial.device, drawn, {}, lambda share: None, trial.folder), 0.1)
    window = min(5, fit.steps)
    controller = Controller(
        ClassCorrelation(CLASSES),
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


# ---- Populations.


def population_based_training(label: str, rate: float, networks: int) -> Method:
    """The best network on the validation part is reported."""

    def train(trial: Trial) -> dict[str, float]:
        generator = torch.Generator().manual_seed(trial.random_seed(SEARCH))
        space = ClassCorrelation(CLASSES)
        start = torch.zeros(Coordinates(space).size, dtype=torch.float64)
        fits = [ImageFit(trial, rate, child) for child in range(networks)]
        members = [Member(fit, space, start) for fit in fits]
        losses = [member.loss() for member in members]
        for i, x, y in fits[0].batches():
            for fit, loss in zip(fits, losses, strict=True):
                if fit is not fits[0]:
                    fit.schedule(i)
                fit.step(loss(fit.model(x), y))
            if (i + 1) % fits[0].setting.window == 0 and i + 1 < fits[0].steps:
                for replaced in exploit_and_explore(members, [fit.selection() for fit in fits], generator):
                    losses[replaced] = members[replaced].loss()
        return best_of(fits).measures()

    return Method(label, train, {"kind": "PBT", "rate": rate, "networks": networks})


def population(
    label: str, rate: float, *, children: int = 8, learning_rate: bool = True, shuffled: bool = False
) -> Method:
    """Ours, which adapts q of the generalised cross-entropy and label smoothing."""

    def train(trial: Trial) -> dict[str, float]:
        fit = ImageFit(trial, rate)
        metric = fit.new_metric()
        controller = Population(
            fit.model,
            fit.optimizer,
            Robust() * Smoothing(),
            Shuffled(metric, trial.random_seed(SEARCH) + 1) if shuffled else metric,
            split(fit.drawn.valid),
            steps=fit.steps,
            window=min(20, fit.steps),
            children=children,
            learning_rate=learning_rate,
            seed=trial.random_seed(SEARCH),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Population: ")
            for _, x, y in fit.batches():
                controller.step((x, y))
        return {**fit.measures(), **{name: v.item() for name, v in controller.values.items()}}

    settings = {"rate": rate, "children": children, "learning rate": learning_rate, "shuffled": shuffled}
    return Method(label, train, {"kind": "Population", **settings})
