"""A recipe of a few milliseconds: a number is drawn, and each method adds its own to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmeta import experiments
from lossmeta.experiments import Measure, Method, Task, Trial, Tuned

MEASURES = (
    Measure("error", higher_is_better=False, percent=True, digits=2),
    Measure("precision", higher_is_better=True, digits=3),
    Measure("selection error", higher_is_better=False, shown=False),
    Measure("rate", higher_is_better=None, digits=2),
)


class Toy:
    """Starts the recipe; what a test changes are its attributes. ``trained`` lists what was trained."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, str, int]] = []
        self.prepared: list[tuple[str, int]] = []
        self.before: Callable[[Trial, str], None] = lambda trial, label: None
        rates = tuple(self.method(f"plain, rate {rate:g}", rate=rate) for rate in (0.3, 0.1, 1.0))
        self.tuned = Tuned("plain, tuned rate", rates, by="selection error", seeds=(100, 101))
        self.methods: list[Method | Tuned] = [self.method("plain", rate=0.3), self.tuned]
        self.tasks = [self.task("first")]

    def method(self, label: str, *, rate: float = 0.1, **settings: Any) -> Method:
        """Its error is least at rate 0.1."""

        def train(trial: Trial) -> dict[str, float | None]:
            self.before(trial, label)
            self.trained.append((trial.task.name, label, trial.seed))
            trial.progress(0.5)
            error = trial.data + abs(rate - 0.1) + 0.001 * torch.rand(()).item()
            return {
                "error": error,
                "precision": 1 - error,
                "selection error": error,
                "rate": rate,
                "also": 7,
            }

        return Method(label, train, {"rate": rate, **settings})

    def task(self, name: str, **settings: Any) -> Task:
        def prepare(seed: int, device: torch.device) -> float:
            self.prepared.append((name, seed))
            return 0.1 + 0.01 * torch.rand(()).item()

        return Task(name, prepare, MEASURES, settings)

    def __call__(self, folder: Path, **options: Any) -> int:
        defaults: dict[str, Any] = {
            "seeds": 3,
            "device": "cpu",
            "settings": {"size": "small"},
            "reference": self.methods[0].label,
        }
        return experiments.run("toy", self.tasks, self.methods, folder=folder, **{**defaults, **options})


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def figures() -> None:
    """For a test that wants them."""
    pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of a test's time."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("lossmeta.plot.installed", lambda: False)
