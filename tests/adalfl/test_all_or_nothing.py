"""A step that raises, wherever and whatever, leaves everything as before; one that goes well leaves no gradients."""

from __future__ import annotations

import copy
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_problems import batches, cnn, mlp, relative_error
from torch import Tensor, nn
from torch.optim import SGD, Adam

import lossmeta
from lossmeta.adalfl import OnlineLearner
from lossmeta.losses import LossNetwork

PACKAGE = os.path.dirname(lossmeta.__file__) + os.sep
GRAD_MODE, AUTOCAST = torch.autograd.grad_mode.__file__, torch.amp.autocast_mode.__file__


def everything(one: OnlineLearner) -> Any:
    state = one.state_dict()
    del state["backend"]
    model = one._step.model.plain
    return copy.deepcopy(
        [
            model.state_dict(),
            one.optimizer.state_dict(),
            state,
            torch.get_rng_state(),
            [p.grad for p in model.parameters()],
        ]
    )


def made(**options: Any) -> OnlineLearner:
    model, loss = cnn(), LossNetwork(8).double()
    optimizer = Adam(model.parameters(), 1e-2)
    meta = Adam(loss.parameters(), 1e-3)
    return OnlineLearner(model, optimizer, loss, F.cross_entropy, meta_optimizer=meta, **options)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "where", ["optimizer", "meta_optimizer", "after both", "model", "loss", "task loss", "rates"]
)
@pytest.mark.parametrize("meta_every", [1, 2])
def test_whatever_raises(where: str, meta_every: int, kind: type[BaseException], monkeypatch: Any) -> None:
    one = made(meta_every=meta_every, snapshot_every=1, learning_rate=1e-4, log_slope=True, clean_weight=0.5)
    for _ in range(3):
        one.step(*batches())

    def failing(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():  # not before harm is done
            for p in (*one._step.model.names, *one.loss.parameters()):
                p.add_(1)
        raise kind("failed")

    pair = batches()
    before = everything(one)
    if where == "optimizer":
        one.optimizer.step = failing
    elif where == "meta_optimizer":
        one.meta_optimizer.step = failing  # type: ignore[union-attr]
    elif where == "after both":
        one._snapshot = failing  # type: ignore[method-assign]
    elif where == "rates":
        one._step.rates.descend = failing
    elif where == "model":
        one._step.model.plain.register_forward_hook(failing)
    elif where == "loss":
        monkeypatch.setattr(type(one._step.loss), "differentiated", failing)
        monkeypatch.setattr(type(one._step.loss), "with_slope", failing)
    else:
        one._step.task_loss = failing
    # The fourth step has no meta-update with meta_every=2, but logs the slope of the task loss.
    reaches = where not in ("meta_optimizer", "rates") or meta_every == 1
    if not reaches:
        one.step(*batches())
        return
    with pytest.raises(kind, match="failed"):
        one.step(*pair)
    torch.testing.assert_close(everything(one), before, rtol=0, atol=0)


@pytest.mark.parametrize("files", [PACKAGE, GRAD_MODE, AUTOCAST], ids=["lossmeta", "grad mode", "autocast"])
def test_an_interrupt_at_every_line(files: str) -> None:
    """As Ctrl-C would: raised at each line in turn that the step runs in ``files``."""
    pair = batches()
    one = made(clean_weight=0.5)
    if files == AUTOCAST:
        one = OnlineLearner(
            one._step.model.plain, one.optimizer, one.loss, F.cross_entropy, autocast=torch.bfloat16
        )
    one.step(*batches())

    def interrupt_at(line: int) -> bool:
        count = 0

        def trace(frame: types.FrameType, event: str, arg: Any) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.startswith(files):
                return None
            # An interrupt while one is being undone is not what is meant.
            if frame.f_code.co_name in ("undo", "_all_or_nothing", "forget", "bring_back", "kept"):
                return None
            if event == "line":
                count += 1
                if count == line:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            one.step(*pair)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    line, before = 1, everything(one)
    while interrupt_at(line):
        torch.testing.assert_close(
            everything(one), before, rtol=0, atol=0, msg=lambda m, line=line: f"line {line}: {m}"
        )
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        line += 7 if files == PACKAGE else 1
    assert line > 50


def test_no_gradients_are_left() -> None:
    for options in ({}, {"meta_every": 2}):
        one = made(**options)
        for _ in range(2):
            one.step(*batches())
            assert all(p.grad is None for p in one._step.model.names)
    one = made(keep_gradients=True)
    one.step(*batches())
    assert all(p.grad is not None for p in one._step.model.names)


def test_gradients_of_before_are_named_once() -> None:
    one = made()
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train, valid = batches()
            F.cross_entropy(one._step.model.plain(train[0]), train[1]).backward()
            one.step(train, valid)
        ours = [w for w in caught if "got some in the model already" in str(w.message)]
        assert len(ours) == (1 if _ == 0 else 0)


# ---- Several batches in a step.


def pieces(batch: Any, *sizes: int) -> list[Any]:
    return list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))


@pytest.mark.parametrize("backend", ["double_backward", "jvp", "finite_difference"])
@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 2, 4)])
@pytest.mark.parametrize("accumulated", [False, True])
def test_several_batches_are_one(backend: str, sizes: tuple[int, ...], accumulated: bool) -> None:
    model, loss = mlp(), LossNetwork(8).double()
    results = []
    for split in (False, True):
        torch.manual_seed(0)
        net, phi = copy.deepcopy((model, loss))
        one = OnlineLearner(
            net, SGD(net.parameters(), 0.1, momentum=0.9), phi, F.cross_entropy,
            meta_optimizer=SGD(phi.parameters(), 0.1), backend=backend, clip_norm=0.5, log_slope=True,
        )  # fmt: skip
        reports = []
        for _ in range(3):
            train, valid = batches()
            parts = pieces(train, *sizes) if split else [train]
            if accumulated:
                for part in parts[:-1]:
                    one.accumulate(part)
                reports.append(one.step(parts[-1], valid))
            else:
                reports.append(one.step(parts, valid))
        moved = [a - b for a, b in zip(phi.parameters(), loss.parameters(), strict=True)]
        trained = [a - b for a, b in zip(net.parameters(), model.parameters(), strict=True)]
        results.append((moved, trained, [r.loss for r in reports]))
    for a, b in zip(*results, strict=True):
        assert relative_error([t.detach() for t in b], [t.detach() for t in a]) < 1e-6


def test_what_was_accumulated_survives_a_failing_step_and_no_other() -> None:
    one = made()
    with pytest.raises(TypeError, match="batch must be a pair"):
        one.accumulate(torch.ones(3))  # type: ignore[arg-type]
    train, valid = batches()
    one.accumulate(train)
    with pytest.raises(RuntimeError):
        one.step((train[0][:, :, 1:], train[1]), valid)
    assert len(one._accumulated) == 1
    one.step(train, valid)
    assert one._accumulated == []
    with pytest.raises(ValueError, match="train_batch must hold at least one batch, got none"):
        one.step([], valid)


# ---- What of the output is the prediction.


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "tensor": (lambda x: x, None),
    "logits of an object": (Output, None),
    "logits of a dict": (lambda x: {"loss": x.sum(), "logits": x}, None),
    "only tensor of a dict": (lambda x: {"out": x}, None),
    "only tensor of a tuple": (lambda x: (x, None), None),
    "a key": (lambda x: {"a": x, "b": x.detach()}, "a"),
    "an attribute": (Output, "logits"),
    "a position": (lambda x: (x.detach(), x), 1),
    "a function": (lambda x: [[x]], lambda out: out[0][0]),
}


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = mlp(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


@pytest.mark.parametrize("backend", ["double_backward", "jvp", "finite_difference"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_predictions_are_found(name: str, backend: str) -> None:
    wrap, output = OUTPUTS[name]
    model = Wrapped(wrap)
    one = OnlineLearner(
        model,
        SGD(model.parameters(), 0.1),
        LossNetwork(8).double(),
        F.cross_entropy,
        backend=backend,
        output=output,
    )
    assert one.step(*batches()).skipped is None


@pytest.mark.parametrize(
    ("wrap", "output", "named"),
    [
        (lambda x: {"a": x, "b": x}, None, "a dict of 'a', 'b'"),
        (lambda x: (x, x), None, "a tuple of 2"),
        (lambda x: (x, x), 5, "a tuple of 2"),
        (lambda x: {"a": x}, "b", "a dict of 'a'"),
        (lambda x: None, None, "a NoneType"),
        (Output, "nothing", "a Output"),
    ],
)
def test_predictions_that_are_not_found(wrap: Any, output: Any, named: str) -> None:
    model = Wrapped(wrap)
    one = OnlineLearner(
        model, SGD(model.parameters(), 0.1), LossNetwork(8).double(), F.cross_entropy, output=output
    )
    with pytest.raises(TypeError, match=f"output must say what of {named} is the prediction"):
        one.step(*batches())
