"""How far the estimates of ``lossmeta.diagnose`` are off where the wrong labels are known."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta import data, experiments
from lossmeta._batches import Batch
from lossmeta.diagnosis import Diagnosis, diagnose, out_of_fold
from lossmeta.experiments import Measure, Method, Task, Trial
from lossmeta.recipes._digits import CLASSES, digits

CLEAN, ROWS = 100, 1700
WEAK_PIXELS = (20, 28, 36, 44, 26, 35)  # six in the middle of an 8 x 8 image
ITERATIONS = 200  # of logistic regression
TREES = 50


def _share(name: str) -> Measure:
    return Measure(name, higher_is_better=None, percent=True, digits=1)


MEASURES = (
    _share("true"),
    _share("estimated"),
    Measure("estimated minus true", higher_is_better=None, percent=True, digits=1),
    _share("in the interval"),
    _share("concentration"),
    _share("suspects that are wrong"),
    _share("wrong ones found"),
    _share("error on clean samples"),
)


@dataclass(frozen=True)
class Noisy:
    """One seed's rows, of which some have a wrong label, and clean ones.

    Attributes:
        inputs: ``[N, D]``.
        labels: as they are given.
        true_labels: which no method sees but to be judged.
        clean: rows with right labels.
    """

    inputs: Tensor
    labels: Tensor
    true_labels: Tensor
    clean: Batch


def mnist() -> Batch:
    """The training images at 14 x 14, as rows of shades in [0, 1], and their labels."""
    images, labels = data.load("mnist").train
    return F.avg_pool2d(images[:10_000].float() / 255, 2).flatten(1), labels[:10_000]


def weak_digits() -> Batch:
    """Digits of which six pixels are left."""
    images, labels = digits()
    return images[:, list(WEAK_PIXELS)], labels


def task(name: str, source: Callable[[], Batch], noise: str, share: float) -> Task:
    """Rows of a source of which a share is redrawn over all classes (``"even"``) or moves to the next (``"pairs"``)."""

    def prepare(seed: int, device: torch.device) -> Noisy:
        inputs, labels = source()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        clean, rows = order[:CLEAN], order[CLEAN:][:ROWS]
        true = labels[rows]
        changed = torch.rand(len(rows), generator=generator) < share
        drawn = torch.randint(CLASSES, true.shape, generator=generator)
        other = drawn if noise == "even" else (true + 1) % CLASSES
        given = torch.where(changed, other, true)
        return Noisy(inputs[rows].double(), given, true, (inputs[clean].double(), labels[clean]))

    settings = {"noise": noise, "share": share, "rows": ROWS, "clean": CLEAN}
    return Task(name, prepare, MEASURES, settings)


TASKS = (
    *(
        task(f"digits, {100 * share:.0f} % of the labels redrawn", digits, "even", share)
        for share in (0.0, 0.2, 0.4, 0.6)
    ),
    *(
        task(f"digits, {100 * share:.0f} % taken for the next class", digits, "pairs", share)
        for share in (0.2, 0.4)
    ),
    task("six pixels of the digits, right labels", weak_digits, "even", 0.0),
    task("six pixels of the digits, 40 % of the labels redrawn", weak_digits, "even", 0.4),
    task("MNIST, right labels", mnist, "even", 0.0),
    task("MNIST, 40 % of the labels redrawn", mnist, "even", 0.4),
    task("MNIST, 40 % taken for the next class", mnist, "pairs", 0.4),
)


def regression(iterations: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=iterations)


def forest(_: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(TREES)


def fit(model: Any, inputs: Any, labels: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lbfgs failed to converge")  # near enough
        model.fit(inputs, labels)


def method(label: str, make: Callable[[int], Any], iterations: int, *, in_sample: bool = False) -> Method:
    def measure(trial: Trial) -> dict[str, float]:
        drawn: Noisy = trial.data
        inputs, labels = drawn.inputs.numpy(), drawn.labels.numpy()
        seed = trial.random_seed(0)
        whole = make(iterations).set_params(random_state=seed)
        fit(whole, inputs, labels)
        if in_sample:
            p = whole.predict_proba(inputs)
        else:
            p = out_of_fold(lambda: make(iterations), fit, inputs, labels, seed=seed).numpy()
        clean_inputs, clean_labels = drawn.clean
        clean = (whole.predict_proba(clean_inputs.numpy()), clean_labels)
        return judged(drawn, diagnose(p, drawn.labels, clean=clean))

    return Method(label, measure, {"iterations": iterations})


def judged(drawn: Noisy, found: Diagnosis) -> dict[str, float]:
    """The measures, and the bound from the clean samples."""
    wrong = drawn.labels != drawn.true_labels
    true = float(wrong.double().mean())
    suspected = torch.zeros_like(wrong)
    suspected[found.labels.suspects] = True
    hits = int((suspected & wrong).sum())
    low, high = found.labels.interval
    assert found.clean is not None
    least, most = found.clean.interval
    return {
        "true": true,
        "estimated": found.labels.share,
        "estimated minus true": found.labels.share - true,
        "in the interval": float(low <= true <= high),
        "concentration": found.labels.concentration,
        "suspects that are wrong": hits / max(1, int(suspected.sum())),
        "wrong ones found": hits / max(1, int(wrong.sum())),
        "error on clean samples": found.clean.error,
        "even": float(found.labels.spread == "even"),
        "class to class": float(found.labels.spread == "class to class"),
        "at least, by clean samples": found.clean.wrong_at_least,
        "its lower end": least,
        "its upper end": most,
    }


LEGEND = f"""\
Confident learning's estimate of the share of wrong labels, from the probabilities of a model that was trained on the \
other four of five folds, or on all rows (in sample). In the interval: how often the interval of 95 %, which knows of \
chance alone, has the true share. Concentration: the share of wrong labels in the most frequent wrong label of their \
class. {ROWS} rows; the error on {CLEAN} clean samples is that of a model trained on all rows."""


class Diagnose:
    """The recipe."""

    name = "diagnose"
    about = (
        "Estimates of wrong labels against the truth: even noise, pairs of classes, a weak model, in sample"
    )

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        iterations = ITERATIONS if steps is None else steps
        methods = (
            method("logistic regression, out of fold", regression, iterations),
            method("random forest, out of fold", forest, iterations),
            method("logistic regression, in sample", regression, iterations, in_sample=True),
            method("random forest, in sample", forest, iterations, in_sample=True),
        )
        return experiments.run(
            self.name,
            TASKS,
            methods,
            seeds=seeds,
            device=device,
            folder=output,
            settings={"iterations": iterations, "device": device},
            about=self.about,
            legend=LEGEND,
            threads=1,
        )


RECIPES = (Diagnose(),)
