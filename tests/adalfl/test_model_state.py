"""What passes over a model move beside its weights is brought back."""

from __future__ import annotations

import pytest
import torch
from small_problems import cnn
from torch import nn

from lossmeta._model_state import ModelState, RandomState, evaluating

CPU = torch.device("cpu")


def test_buffers_and_random_numbers_are_brought_back_whatever_happens() -> None:
    model = cnn()
    before = {name: b.clone() for name, b in model.named_buffers()}
    random = torch.get_rng_state()
    state = ModelState(model, CPU)

    @state.kept()
    def interrupted() -> None:
        model(torch.randn(7, 1, 8, 8, dtype=torch.float64))
        assert not state.random.equals(RandomState(CPU))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert state.random.equals(RandomState(CPU))


def test_buffers_that_the_model_replaced_take_the_old_values() -> None:
    model = nn.Module()
    model.register_buffer("mean", torch.zeros(3))
    state = ModelState(model, CPU)
    model.mean = torch.ones(3)
    state.bring_back()
    assert not model.mean.any()


def test_every_module_returns_to_its_own_mode() -> None:
    model = cnn()
    model[1].eval()  # a frozen BatchNorm

    @evaluating(model)
    def interrupted() -> None:
        assert not any(m.training for m in model.modules())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True, True]
