"""Ways to train on labels that are partly wrong, with a few that are right."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from lossmeta._batches import Batch, Loss
from lossmeta.adalfl import AveragedWeights, CleanLearner, DivergedError, Relabelling
from lossmeta.experiments import Diverged, Method, Trial, Tuned
from lossmeta.losses import (
    BootstrappingLoss,
    ForwardCorrectedLoss,
    GeneralizedCrossEntropy,
    LossWeighting,
    SymmetricCrossEntropy,
    TransitionLoss,
    gold_transition,
)
from lossmeta.recipes._noise_tasks import (
    CLEAN_ORDER,
    LOSS,
    SELECTION,
    Drawn,
    batches,
    new_model,
)

TUNING_SEEDS = (10_000, 10_001)
RATES = (0.01, 0.03, 0.1)
WEIGHT_DECAYS = (0.0, 0.005, 0.02)
CLEAN_WEIGHTS = (1.0,)
LADDERS = {
    "rate": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "weight_decay": (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
    "smoothing": (0.1, 0.3, 0.5, 0.7),
    "bootstrap": (0.6, 0.8, 0.9),
    "q": (0.3, 0.5, 0.7, 0.8, 0.9, 1.0),
    "beta": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    "share": (0.03, 0.06, 0.125, 0.25, 0.5, 1.0),
    "power": (0.25, 0.5, 0.75, 1.0, 1.25),
    "tau": (0.5, 1.0, 1.5, 2.0, 3.0),
    "margin": (0.1, 0.25, 0.5, 1.0, 2.0),
    "gamma": (0.5, 1.0, 2.0, 4.0),
    "delta": (0.02, 0.1, 0.5, 1.0, 2.0),
    "c": (0.5, 1.0, 2.0, 3.0, 5.0),
    "quantile": (0.2, 0.35, 0.5, 0.65),
}
"""What is tried beside the best, one step at a time."""
STOPS = (0.03, 0.06, 0.125, 0.25, 0.5, 1.0)
"""Shares of the training after which it may stop."""
LAST_RATES = (0.003, 0.01, 0.03, 0.1)
LAST_STEPS = (10, 50, 200)
"""On the clean samples alone."""
RATE = 0.03
"""Of the rows that are not tuned: a usual one for SGD with momentum."""
WEIGHT_DECAY = 0.005
"""Of the rows that are not tuned; chosen on other seeds, for all tasks."""

MakeLoss = Callable[..., Loss]
"""``make(trial, **parameter)``."""


@dataclass
class Best:
    """The model with the least selection error so far.

    Attributes:
        selection: its error.
        model: of that time.
        about: what it is, to be kept with the results.
    """

    selection: float = float("inf")
    model: nn.Module | None = None
    about: Mapping[str, float] | None = None

    def see(self, model: nn.Module, drawn: Drawn, **about: float) -> float:
        """Gives its error."""
        found = drawn.source.judge(model, drawn.selection)
        if found < self.selection:
            self.selection, self.model, self.about = found, copy.deepcopy(model), about
        return found


def descend(optimizer: SGD, value: Tensor) -> None:
    optimizer.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def fixed(
    label: str, make: MakeLoss, rate: float, weight_decay: float, clean_weight: float, **parameter: float
) -> Method:
    """A loss that stays as it is; stop, averaging and a last stage are chosen by this trial's selection part.

    Args:
        label: of the row.
        make: makes the loss of the noisy batch.
        rate: learning rate.
        weight_decay: of SGD.
        clean_weight: of the task loss on the clean batch.
        parameter: of the loss.
    """

    def train(trial: Trial) -> dict[str, float]:
        loss = make(trial, **parameter)

        def value(model: nn.Module, x: Tensor, y: Tensor, clean: Batch) -> Tensor:
            found = loss(model(x), y)
            return found + clean_weight * _task_loss(trial, model, clean) if clean_weight else found

        return _with_last_stage(trial, _best_stop(trial, value, rate, weight_decay))

    settings = {"rate": rate, "weight decay": weight_decay, "clean weight": clean_weight, **parameter}
    return Method(label, train, settings)


def clean_alone(label: str, rate: float, weight_decay: float) -> Method:
    """The task loss on the clean samples alone; stop and averaging by the selection part."""

    def train(trial: Trial) -> dict[str, float]:
        def value(model: nn.Module, x: Tensor, y: Tensor, clean: Batch) -> Tensor:
            return _task_loss(trial, model, clean)

        return _measured(_best_stop(trial, value, rate, weight_decay), trial.data)

    return Method(label, train, {"rate": rate, "weight decay": weight_decay, "clean alone": True})


def _best_stop(
    trial: Trial,
    value: Callable[[nn.Module, Tensor, Tensor, Batch], Tensor],
    rate: float,
    weight_decay: float,
) -> Best:
    """Of a training, with its weights as they are or averaged, by this trial's selection part."""
    drawn: Drawn = trial.data
    steps: int = trial.task.settings["steps"]
    model = new_model(trial.seed, drawn)
    optimizer = SGD(model.parameters(), rate, momentum=0.9, weight_decay=weight_decay)
    average = AveragedWeights(model)
    stops, best = {max(1, round(share * steps)) for share in STOPS}, Best()
    for step, (x, y, clean) in enumerate(_batches(trial, steps), 1):
        found = value(model, x, y, clean)
        if not found.isfinite():
            break
        descend(optimizer, found)
        average.update()
        if step in stops:
            for averaged, one in enumerate((model, average.model)):
                error = best.see(one, drawn, stop=step, averaged=averaged)
            trial.record(f"{SELECTION.name}, averaged weights", step, error)
    return best


def _task_loss(trial: Trial, model: nn.Module, batch: Batch) -> Tensor:
    found: Tensor = trial.data.source.task_loss(model(batch[0]), batch[1])
    return found


def _batches(trial: Trial, steps: int) -> Iterator[tuple[Tensor, Tensor, Batch]]:
    drawn: Drawn = trial.data
    noisy = batches(drawn.train, trial.seed, steps)
    clean = batches(drawn.clean, trial.seed, steps, CLEAN_ORDER)
    for step, ((x, y), right) in enumerate(zip(noisy, clean, strict=True)):
        trial.progress(step / steps)
        yield x, y, right


def _with_last_stage(trial: Trial, best: Best) -> dict[str, float]:
    """The best stop, or what a last stage on the clean samples makes of it."""
    drawn: Drawn = trial.data
    if best.model is None:
        raise Diverged
    start, about = best.model, best.about or {}
    for rate in LAST_RATES:
        model = copy.deepcopy(start).requires_grad_()
        optimizer = SGD(model.parameters(), rate, momentum=0.9)
        for step, batch in enumerate(batches(drawn.clean, trial.seed, max(LAST_STEPS), CLEAN_ORDER), 1):
            descend(optimizer, _task_loss(trial, model, batch))
            if step in LAST_STEPS:
                best.see(model, drawn, **about, last_rate=rate, last_steps=step)
    return _measured(best, drawn)


def _measured(best: Best, drawn: Drawn) -> dict[str, float]:
    if best.model is None:
        raise Diverged
    source = drawn.source
    found = {source.measure.name: source.judge(best.model, drawn.test), SELECTION.name: best.selection}
    return {**found, **(best.about or {})}


def learned(label: str, make: Callable[[Trial], nn.Module] | None = None, **options: Any) -> Method:
    """``CleanLearner`` with its defaults at the usual rate and decay; no stop, and nothing is chosen.

    Args:
        label: of the row.
        make: makes the loss, in the place of the default one.
        options: of the learner, of JSON's types.
    """

    def train(trial: Trial) -> dict[str, float]:
        drawn: Drawn = trial.data
        model, optimizer = _untuned(trial)
        loss = make(trial) if make else None
        learner = CleanLearner(
            model,
            optimizer,
            drawn.clean,
            loss=loss,
            task_loss=drawn.source.task_loss,
            seed=trial.random_seed(LOSS),
            **options,
        )
        return _to_the_end(trial, model, learner.averaged, lambda x, y, _: learner.step((x, y)))

    return Method(label, train, {"rate": RATE, "weight decay": WEIGHT_DECAY, **options, "loss": label})


def without_clean(label: str) -> Method:
    """As :func:`learned`, with a tenth of the samples whose labels may be wrong in the place of the clean ones.

    They teach the loss, and nothing else.
    """

    def train(trial: Trial) -> dict[str, float]:
        drawn: Drawn = trial.data
        inputs, labels = drawn.train
        count = len(labels) // 10
        held_out, rest = (inputs[:count], labels[:count]), (inputs[count:], labels[count:])
        model, optimizer = _untuned(trial)
        learner = CleanLearner(model, optimizer, held_out, clean_weight=0.0, seed=trial.random_seed(LOSS))
        return _to_the_end(
            replace(trial, data=replace(drawn, train=rest)),
            model,
            learner.averaged,
            lambda x, y, _: learner.step((x, y)),
        )

    return Method(label, train, {"rate": RATE, "weight decay": WEIGHT_DECAY, "loss": label})


def drawn_labels(label: str) -> Method:
    """Cross-entropy on the labels that ``CleanLearner`` draws, with nothing learned beside; as :func:`learned`."""

    def train(trial: Trial) -> dict[str, float]:
        drawn: Drawn = trial.data
        model, optimizer = _untuned(trial)
        average = AveragedWeights(model)
        relabelling = Relabelling(drawn.source.classes, seed=trial.random_seed(LOSS), device=trial.device)

        def step(x: Tensor, y: Tensor, clean: Batch) -> None:
            with torch.no_grad():
                found = relabelling.draw(average.model(x), y)
            descend(
                optimizer,
                F.cross_entropy(model(x), found.labels) + F.cross_entropy(model(clean[0]), clean[1]),
            )
            average.update()
            relabelling.learn(found)

        return _to_the_end(trial, model, average.model, step)

    return Method(label, train, {"rate": RATE, "weight decay": WEIGHT_DECAY, "loss": label})


def _untuned(trial: Trial) -> tuple[nn.Module, SGD]:
    model = new_model(trial.seed, trial.data)
    return model, SGD(model.parameters(), RATE, momentum=0.9, weight_decay=WEIGHT_DECAY)


def _to_the_end(
    trial: Trial, model: nn.Module, averaged: nn.Module, step: Callable[[Tensor, Tensor, Batch], Any]
) -> dict[str, float]:
    drawn: Drawn = trial.data
    steps: int = trial.task.settings["steps"]
    judge, found = drawn.source.judge, {}
    for i, (x, y, clean) in enumerate(_batches(trial, steps), 1):
        try:
            step(x, y, clean)
        except DivergedError as error:
            raise Diverged from error
        if i in (steps // 4, steps // 2):
            found[f"error after {i}"] = judge(averaged, drawn.test)
            trial.record("error", i, found[f"error after {i}"])
    at_the_end = judge(averaged, drawn.test)
    trial.record("error", steps, at_the_end)
    return {
        drawn.source.measure.name: at_the_end,
        SELECTION.name: judge(averaged, drawn.selection),
        "not averaged": judge(model, drawn.test),
        **found,
    }


def flips(trial: Trial) -> nn.Module:
    """What the classes' labels name, learned from nine tenths right."""
    drawn: Drawn = trial.data
    return TransitionLoss(drawn.source.classes).to(trial.device)


def weights(trial: Trial) -> nn.Module:
    """What a sample of some loss weighs."""
    with trial.seeded(LOSS):
        return LossWeighting().to(trial.device)


# ---- Losses of the noisy batch.


def cross_entropy(trial: Trial) -> Loss:
    return F.cross_entropy


def smoothed(trial: Trial, smoothing: float) -> Loss:
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def bootstrapped(trial: Trial, bootstrap: float) -> Loss:
    return BootstrappingLoss(bootstrap)


def generalized(trial: Trial, q: float) -> Loss:
    return GeneralizedCrossEntropy(q)


def symmetric(trial: Trial, beta: float) -> Loss:
    """The size of the reversed part alone counts: 4 beta (1 - p), as log 0 is -4."""
    return SymmetricCrossEntropy(1.0, beta)


def gold_corrected(trial: Trial, share: float) -> Loss:
    """Flips estimated from what a network says of the clean samples that trained on the wrong labels.

    ``share``: of the steps, at a rate of 0.03.
    """
    key = gold_corrected, share
    if key not in trial.scratch:
        drawn: Drawn = trial.data
        model = new_model(trial.seed, drawn)
        optimizer = SGD(model.parameters(), 0.03, momentum=0.9)
        for x, y in batches(drawn.train, trial.seed, max(1, round(share * trial.task.settings["steps"]))):
            descend(optimizer, F.cross_entropy(model(x), y))
        with torch.no_grad():
            said = model(drawn.clean[0]).softmax(1)
        trial.scratch[key] = gold_transition(said, drawn.clean[1])
    return ForwardCorrectedLoss(trial.scratch[key])


def tuned(label: str, make: MakeLoss, **grid: tuple[float, ...]) -> Tuned:
    """At the rate, weight decay and parameters that are best on other seeds, found from a grid on.

    Args:
        label: of the row.
        make: makes the loss.
        grid: values of each parameter of the loss to begin with; ``clean_weight`` is that of the clean batches.
    """
    start = {"rate": RATES, "weight_decay": WEIGHT_DECAYS, "clean_weight": CLEAN_WEIGHTS, **grid}

    def method(rate: float, weight_decay: float, **parameter: float) -> Method:
        values = {"rate": rate, "decay": weight_decay, **parameter}
        text = ", ".join(f"{name} {v:g}" for name, v in values.items())
        return fixed(f"{label}, {text}", make, rate, weight_decay, **parameter)

    return _tuned(label, method, start)


def clean_alone_tuned(label: str) -> Tuned:
    """The clean samples alone, as :func:`tuned`."""

    def method(rate: float, weight_decay: float) -> Method:
        return clean_alone(f"{label}, rate {rate:g}, decay {weight_decay:g}", rate, weight_decay)

    return _tuned(label, method, {"rate": RATES, "weight_decay": WEIGHT_DECAYS})


def _tuned(label: str, method: Callable[..., Method], start: Mapping[str, tuple[float, ...]]) -> Tuned:
    def at(values: tuple[float, ...]) -> Method:
        return method(**dict(zip(start, values, strict=True)))

    def beside(best: Method) -> tuple[Method, ...]:
        here = tuple(best.settings[name.replace("_", " ")] for name in start)
        found = []
        for i, name in enumerate(start):
            ladder = LADDERS.get(name, start[name])
            place = ladder.index(here[i])
            found += [
                at((*here[:i], value, *here[i + 1 :])) for value in ladder[max(place - 1, 0) : place + 2]
            ]
        return tuple(found)

    candidates = tuple(at(values) for values in itertools.product(*start.values()))
    return Tuned(label, candidates, SELECTION.name, TUNING_SEEDS, beside=beside)
