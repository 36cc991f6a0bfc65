"""Trials without a runner, and figures only where a test wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_images
import torch

from lossmeta import data, plot
from lossmeta.experiments import Task, Trial
from lossmeta.recipes import _ala_images, _noise_tasks, adalfl_outliers


@pytest.fixture
def figures() -> None:
    """Asked for by tests of figures."""
    pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _no_other_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the training."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(plot, "installed", lambda: False)


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Generated ones in the place of CIFAR-10."""
    dataset, load = tiny_images.images(), _ala_images.data.load
    monkeypatch.setattr(
        _ala_images.data, "load", lambda name, *a, **k: dataset if name == "cifar10" else load(name, *a, **k)
    )
    _ala_images._images.cache_clear()
    yield
    _ala_images._images.cache_clear()


@pytest.fixture
def make_trial(tmp_path: Path) -> Callable[..., Trial]:
    """Makes a trial of some data; its task has the settings given."""

    def make(prepared: Any, seed: int = 0, **settings: Any) -> Trial:
        task = Task("toy", lambda seed, device: prepared, (), settings)
        return Trial(task, seed, torch.device("cpu"), prepared, {}, lambda share: None, tmp_path)

    return make


@pytest.fixture
def only_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where there are no other data sets than those that come with it."""
    original = data.load

    def load(name: str, *args: Any, **options: Any) -> Any:
        if name in ("digits", "diabetes"):
            return original(name, *args, **options)
        raise FileNotFoundError(f"{name}: not here")

    monkeypatch.setattr(data, "load", load)
    pools = _noise_tasks.pool, adalfl_outliers.pool
    for pool in pools:
        pool.cache_clear()
    yield
    for pool in pools:
        pool.cache_clear()
