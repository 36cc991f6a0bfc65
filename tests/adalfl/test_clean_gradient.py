"""Clean batches in the training step: what they add, and that it is right whatever happens between the steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import two_processes
from small_problems import OPTIMIZERS, batches, cnn, equal, learner, mlp, relative_error, unrolled, values
from torch import Tensor, nn
from torch.optim import SGD

from lossmeta.adalfl import DivergedError, OnlineLearner
from lossmeta.losses import LossNetwork

WEIGHT = 0.7


def pairs(count: int) -> list[Any]:
    return list(zip(batches(count), batches(count), strict=True))


def gradients(model: nn.Module, loss: Callable[..., Tensor], batch: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(model(batch[0]), batch[1]), list(model.parameters()))


def reference_step(model: nn.Module, optimizer: Any, loss: nn.Module, train: Any, clean: Any) -> None:
    """A plain step of both losses."""
    added = [WEIGHT * g for g in gradients(model, F.cross_entropy, clean)]
    for p, g, c in zip(model.parameters(), gradients(model, loss, train), added, strict=True):
        p.grad = g + c
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("backend", ["double_backward", "jvp", "finite_difference"])
@pytest.mark.parametrize("optimizer", ["sgd", "sgd, nesterov", "adam", "rmsprop"])
@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.3}], ids=["", "clipped"])
def test_a_step_descends_both_losses(backend: str, optimizer: str, clip: dict[str, float]) -> None:
    """The clean batch of a step is the one by which the step before was judged; the first has its own."""
    model, loss = mlp(), LossNetwork(8, dtype=torch.float64)
    reference = copy.deepcopy(model)
    plain = OPTIMIZERS[optimizer](reference.parameters())
    one = OnlineLearner(
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        loss,
        F.cross_entropy,
        meta_optimizer=SGD(loss.parameters(), 1e-2),
        clean_weight=WEIGHT,
        backend=backend,
        **clip,  # type: ignore[arg-type]
    )
    steps = pairs(3)
    for (train, valid), (_, judged) in zip(steps, [steps[0], *steps], strict=False):
        added = [WEIGHT * g for g in gradients(reference, F.cross_entropy, judged)]

        def total(found: Any, added: list[Tensor] = added) -> list[Tensor]:
            both = [g + c for g, c in zip(found, added, strict=True)]
            if not clip:
                return both
            norm = torch.stack([g.norm() for g in both]).norm()
            return [g * (clip["clip_norm"] / (norm + 1e-6)).clamp(max=1) for g in both]

        phi = [p.detach().clone() for p in loss.parameters()]
        expected = unrolled(reference, plain, loss, train, valid, total)
        for p, g in zip(reference.parameters(), total(gradients(reference, loss, train)), strict=True):
            p.grad = g
        plain.step()
        one.step(train, valid)
        for a, b in zip(values(model), values(reference), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        moved = [(a - b) / 1e-2 for a, b in zip(phi, loss.parameters(), strict=True)]
        assert relative_error(moved, expected) < (1e-3 if backend == "finite_difference" else 1e-7)


def test_after_a_plain_step_the_clean_batch_has_a_pass_of_its_own() -> None:
    one = learner(meta_every=2, clean_weight=WEIGHT)
    model = copy.deepcopy(one._step.model.plain)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    steps = pairs(4)
    # Steps 0 and 2 have meta-updates: what they have computed is for 1 and 3.
    for i, clean in enumerate([0, 0, 2, 2]):
        reference_step(model, optimizer, one.loss, steps[i][0], steps[clean][1])
        one.step(*steps[i])
        for a, b in zip(values(one._step.model.plain), values(model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("change", ["weights", "loaded", "replaced"])
def test_weights_that_somebody_changes_have_a_gradient_of_their_own(change: str) -> None:
    one = learner(clean_weight=WEIGHT)
    first, second = pairs(2)
    one.step(*first)
    model = one._step.model.plain
    with torch.no_grad():
        if change == "weights":
            next(model.parameters()).mul_(1.5)
        elif change == "loaded":
            model.load_state_dict({k: 1.5 * v for k, v in model.state_dict().items()})
        else:  # out of place, as an average that is swapped in: nothing counts that
            for p in model.parameters():
                p.data = p.data * 1.5
    reference = copy.deepcopy(model)
    optimizer = SGD(reference.parameters(), 0.1, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    reference_step(reference, optimizer, one.loss, second[0], second[1])
    one.step(*second)
    for a, b in zip(values(model), values(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_clean_passes_leave_buffers_and_random_numbers_as_they_are() -> None:
    """BatchNorm's and dropout's are those of the training batches alone."""
    train, valid = pairs(1)[0]
    found = []
    for weight in (0.0, WEIGHT):
        torch.manual_seed(0)
        model = cnn()
        one = learner(model=model, clean_weight=weight)
        one.step(train, valid)
        found.append([*(b.clone() for b in model.buffers()), torch.get_rng_state()])
    assert equal(*found)


@pytest.mark.parametrize("last", ["learner", "model"])
@pytest.mark.parametrize("meta_every", [1, 2])
def test_goes_on_to_the_same_bits(last: str, meta_every: int) -> None:
    steps = pairs(6)
    whole = learner(clean_weight=WEIGHT, meta_every=meta_every)
    halves = [
        learner(
            copy.deepcopy(whole.loss),
            copy.deepcopy(whole._step.model.plain),
            clean_weight=WEIGHT,
            meta_every=meta_every,
        )
    ]
    for step in steps[:3]:
        whole.step(*step)
        halves[0].step(*step)
    saved = copy.deepcopy(
        {
            "learner": halves[0].state_dict(),
            "model": halves[0]._step.model.plain.state_dict(),
            "optimizer": halves[0].optimizer.state_dict(),
        }
    )
    new = learner(clean_weight=WEIGHT, meta_every=meta_every)
    order: dict[str, Callable[[], Any]] = {
        "learner": lambda: new.load_state_dict(saved["learner"]),
        "model": lambda: new._step.model.plain.load_state_dict(saved["model"]),
    }
    for name in sorted(order, key=lambda n: n == last):
        order[name]()
    new.optimizer.load_state_dict(saved["optimizer"])
    for step in steps[3:]:
        whole.step(*step)
        new.step(*step)
    assert equal(values(whole._step.model.plain), values(new._step.model.plain))
    assert equal(values(whole.loss), values(new.loss))


def test_a_state_from_before_there_were_clean_batches() -> None:
    one, two = learner(clean_weight=WEIGHT), learner()
    step = pairs(1)[0]
    two.step(*step)
    state = two.state_dict()
    del state["clean"]
    one.load_state_dict(state)
    assert one.step(*step).skipped is None


def test_several_batches_of_one_step() -> None:
    (first, valid), (second, _) = pairs(2)
    one = learner(clean_weight=WEIGHT)
    two = learner(copy.deepcopy(one.loss), copy.deepcopy(one._step.model.plain), clean_weight=WEIGHT)
    one.step([first, second], valid)
    joined = tuple(torch.cat(both) for both in zip(first, second, strict=True))
    two.step(joined, valid)  # type: ignore[arg-type]
    for a, b in zip(values(one._step.model.plain), values(two._step.model.plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


PROCESS = """
import torch.nn.functional as F
from torch import nn
from lossmeta.adalfl import DivergedError, OnlineLearner
from lossmeta.losses import LossNetwork

data = torch.load(f"{folder}/data.pt", weights_only=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3)).double()
loss = LossNetwork(8, dtype=torch.float64)
model.load_state_dict(data["model"])
loss.load_state_dict(data["loss"])
parallel = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
learner = OnlineLearner(parallel, optimizer, loss, F.cross_entropy, backend="jvp", clean_weight=0.7, meta_every=2)
for pair in data["pairs"]:
    learner.step(*((x[rank::2], y[rank::2]) for x, y in pair))
torch.save([*model.state_dict().values(), *loss.state_dict().values()], f"{folder}/{rank}.pt")
"""


def test_two_processes_are_one(tmp_path: Any) -> None:
    steps = [
        tuple((torch.randn(8, 1, 8, 8).double(), torch.randint(3, (8,))) for _ in range(2)) for _ in range(4)
    ]
    one = learner(backend="jvp", clean_weight=WEIGHT, meta_every=2)
    model = one._step.model.plain
    data = {"model": model.state_dict(), "loss": one.loss.state_dict(), "pairs": steps}
    torch.save(data, tmp_path / "data.pt")
    two_processes.run(PROCESS, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step in steps:
        one.step(*step)
    assert equal(*found)
    for a, b in zip([*values(model), *values(one.loss)], found[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_bad_weights(weight: float) -> None:
    with pytest.raises(ValueError, match="OnlineLearner: clean_weight must be finite and not negative, got"):
        learner(clean_weight=weight)


def test_every_step_needs_a_clean_batch() -> None:
    one = learner(clean_weight=WEIGHT, meta_every=2)
    train, valid = pairs(1)[0]
    with pytest.raises(ValueError, match="valid_batch must be given in every step"):
        one.step(train)
    one.step(train, valid)
    with pytest.raises(ValueError, match="valid_batch must be given in every step"):
        one.step(train)
    assert one.steps == 1


def test_no_capture() -> None:
    with pytest.raises(ValueError, match=r"with capture=True clean_weight must be 0, got 0\.7"):
        learner(clean_weight=WEIGHT, capture=True)


class TwoHeads(nn.Module):
    """One of them is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.idle = nn.Linear(64, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)).relu())


@pytest.mark.parametrize("meta_every", [1, 2])
def test_parameters_without_a_gradient_are_left_alone(meta_every: int) -> None:
    """As in plain training: weight decay moves only what has one."""
    model = TwoHeads().double()
    idle = model.idle.weight.detach().clone()
    optimizer = SGD(model.parameters(), 0.1, weight_decay=0.1)
    loss = LossNetwork(8, dtype=torch.float64)
    one = OnlineLearner(model, optimizer, loss, F.cross_entropy, clean_weight=WEIGHT, meta_every=meta_every)
    for step in pairs(4):
        one.step(*step)
    assert torch.equal(model.idle.weight, idle)


@pytest.mark.parametrize("meta_every", [1, 3])
def test_a_clean_batch_that_is_not_finite_moves_nothing(meta_every: int) -> None:
    one = learner(clean_weight=WEIGHT, meta_every=meta_every)
    steps = pairs(4)
    one.step(*steps[0])
    (x, y) = steps[1][1]
    broken = x * torch.nan, y
    if meta_every == 1:
        assert one.step(steps[1][0], broken).skipped == "the task loss is not finite"
    else:  # the gradient of the first meta-update is used up by the second step
        one.step(*steps[1])
        before = [values(one._step.model.plain), copy.deepcopy(one.optimizer.state_dict())]
        with pytest.raises(DivergedError, match="the task loss on the clean batch is nan"):
            one.step(steps[2][0], broken)
        after = [values(one._step.model.plain), one.optimizer.state_dict()]
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    for step in steps[2:]:
        one.step(*step)
    assert all(v.isfinite().all() for v in values(one._step.model.plain))
