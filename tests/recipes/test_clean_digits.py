from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmeta.experiments import Trial, run_folder
from lossmeta.losses import ParametricCrossEntropy
from lossmeta.recipes import clean_digits, recipes
from lossmeta.recipes._digits import CLASSES, digits

CPU = torch.device("cpu")


def start(output: Path, **options: Any) -> int:
    recipe = recipes()["clean-digits"]
    return recipe.run(
        **{"size": "small", "seeds": 2, "steps": 20, "device": "cpu", "output": output, **options}
    )


def measured(folder: Path) -> list[tuple[Any, ...]]:
    return [(t.method, t.seed, t.measures) for t in run_folder.read(folder).trials]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "deep" / "clean"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lossmeta.plot.installed", lambda: False)
        assert start(output) == 0
    assert torch.get_num_threads() == threads
    return output


def test_every_method_runs_with_every_seed(folder: Path) -> None:
    run = run_folder.read(folder)
    assert run.header.environment["torch"] == torch.__version__
    assert run.header.settings["steps"] == 20
    assert [(t.method, t.seed) for t in run.trials] == [
        (method.label, seed) for seed in range(2) for method in clean_digits.METHODS
    ]
    assert all(0 < t.measures["error"] < 1 and 0 < t.measures["average precision"] < 1 for t in run.trials)


def test_same_seeds_give_the_same_results(folder: Path, tmp_path: Path) -> None:
    assert start(tmp_path) == 0
    assert measured(folder) == measured(tmp_path)
    first, second = (measured(folder)[i][2] for i in (0, len(clean_digits.METHODS)))
    assert first != second, "seeds must differ"


def test_split_is_disjoint_and_fixed_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits()
    tagged = torch.arange(len(labels), dtype=torch.float32)[:, None]
    monkeypatch.setattr(clean_digits, "digits", lambda: (tagged, labels))
    parts = clean_digits.split(1, CPU)
    rows = torch.cat([inputs[:, 0] for inputs, _ in parts.values()])
    assert len(rows) == len(rows.unique()) == len(images) == 1797
    again, other = clean_digits.split(1, CPU), clean_digits.split(2, CPU)
    assert torch.equal(parts["test"][0], again["test"][0])
    assert not torch.equal(parts["test"][0], other["test"][0])
    assert torch.equal(parts["test"][1], labels[parts["test"][0][:, 0].long()])


def test_methods_share_weights_and_batches(make_trial: Callable[..., Trial]) -> None:
    trials = [make_trial(clean_digits.split(0, CPU), seed) for seed in (0, 0, 1)]
    weights = [clean_digits.new_model(trial).state_dict()["0.weight"] for trial in trials]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    epochs = [
        torch.cat([labels for _, labels in clean_digits.batches(trial, epoch)])
        for trial, epoch in ((trials[0], 0), (trials[1], 0), (trials[0], 1))
    ]
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[0].sort().values, epochs[2].sort().values)


def test_random_state_is_untouched(make_trial: Callable[..., Trial]) -> None:
    state = torch.get_rng_state()
    clean_digits.new_model(make_trial(None))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_is_adapted_after_every_epoch(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial(clean_digits.split(0, CPU), steps=18 * 2 + 3)
    steps, epochs = [], []
    clean_digits.train(
        trial, lambda train, validation: steps.append(len(train[1])), lambda: epochs.append(len(steps))
    )
    assert steps == [*[50] * 17, 47] * 2 + [50] * 3
    assert epochs == [18, 36]


def test_confusions_are_penalised() -> None:
    loss = ParametricCrossEntropy(CLASSES)
    # Class 1 takes class 3 for itself with probability 0.4; class 9 does not occur.
    probabilities = torch.full((9, 10), 1e-6)
    probabilities.fill_diagonal_(1)
    probabilities[1, 1], probabilities[1, 3] = 0.6, 0.4
    clean_digits.penalise_confusions(loss, probabilities.log(), torch.arange(9))
    phi = loss.phi
    assert torch.equal(phi.diagonal(), torch.ones(10))
    assert torch.equal(phi, phi.T)
    assert phi[1, 3].item() == pytest.approx(-0.2, abs=1e-4)
    others = phi - torch.eye(10)
    others[1, 3] = others[3, 1] = 0
    assert others.abs().max() < 1e-4
