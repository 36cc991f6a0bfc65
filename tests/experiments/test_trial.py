from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lossmeta.experiments import Task, Trial
from lossmeta.experiments.trial import STREAM, seeded

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(()).item()  # noqa: NPY002


def trial(seed: int) -> Trial:
    return Trial(Task("t", lambda seed, device: None, ()), seed, CPU, None, {}, lambda share: None, Path())


def test_a_stream_gives_the_same_numbers_and_moves_no_others() -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    with trial(3).seeded(1):
        first = draw()
    with trial(3).seeded(1):
        assert draw() == first
    with trial(3).seeded(2):
        assert draw() != first
    with trial(4).seeded(1):
        assert draw() != first
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002


def test_random_numbers_go_on_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1, CPU):
        torch.rand(()).item() / 0
    assert torch.equal(state, torch.get_rng_state())


def test_a_stream_is_that_of_a_generator() -> None:
    generator = torch.Generator().manual_seed(trial(5).random_seed(2))
    assert trial(5).random_seed(2) == 5 + 2 * STREAM
    with trial(5).seeded(2):
        assert torch.equal(torch.rand(3), torch.rand(3, generator=generator))
