"""Algorithm 2: what is learned, guarded and saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_problems import LossOfEager, batches, cnn, equal, learner, mlp, relative_error, unrolled, values
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lossmeta.adalfl import DivergedError, OnlineLearner, meta_gradient, seldom_later
from lossmeta.adalfl.capture import all_finite
from lossmeta.adalfl.differentiable_step import DifferentiableStep
from lossmeta.adalfl.records import StepOptions
from lossmeta.losses import DistanceMixtureLoss, LossNetwork, ParametricCrossEntropy, TaylorLoss


def test_one_step_is_a_meta_gradient_and_adam() -> None:
    model, loss = mlp(), LossNetwork(8, dtype=torch.float64)
    other_model, other_loss = copy.deepcopy((model, loss))
    train, valid = batches()
    learner(loss, model, meta_optimizer=Adam(loss.parameters(), 1e-2)).step([train], valid)
    optimizer, meta = SGD(other_model.parameters(), 0.1, momentum=0.9), Adam(other_loss.parameters(), 1e-2)
    result = meta_gradient(other_model, optimizer, other_loss, F.cross_entropy, train, valid)
    for p, g in zip(other_loss.parameters(), result.gradients, strict=True):
        p.grad = g
    meta.step()
    assert equal(values(model), values(other_model))
    assert equal(values(loss), values(other_loss))


def test_meta_every() -> None:
    one = learner(meta_every=3)
    assert one.meta_every == 3
    changed, tasks = [], []
    for train, valid in zip(batches(6), batches(6), strict=True):
        before, weights = values(one.loss), values(one._step.model.plain)
        report = one.step([train], valid)
        changed.append(not equal(before, values(one.loss)))
        tasks.append(report.task_loss is not None)
        assert not equal(weights, values(one._step.model.plain))
    assert changed == tasks == [True, False, False, True, False, False]


def test_meta_every_as_a_function() -> None:
    asked: list[int] = []

    def two_more(step: int) -> int:
        asked.append(step)
        return 1 + len(asked)

    one = learner(meta_every=two_more)
    both = batches(14)
    due = [one.step(batch, batch).task_loss is not None for batch in both[:10]]
    assert [i for i, found in enumerate(due) if found] == asked == [0, 2, 5, 9]
    other = learner(meta_every=lambda step: 5)  # goes on where the state was
    other.load_state_dict(one.state_dict())
    assert [other.step(batch, batch).task_loss is not None for batch in both[10:]] == [False] * 4
    assert other.step(both[0], both[0]).task_loss is not None
    old = {key: value for key, value in one.state_dict().items() if key != "next_update"}
    other.load_state_dict(old)
    assert other.step(both[0], both[0]).task_loss is not None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (0, ValueError, r"what meta_every gives for step 1 must be at least 1, got 0"),
        (1.5, TypeError, r"meta_every must give an int, .* got float for step 1"),
        (True, TypeError, r"got bool for step 1"),
    ],
)
def test_a_schedule_that_does_not_say_when(given: Any, error: type[Exception], message: str) -> None:
    one = learner(meta_every=lambda step: 1 if step == 0 else given)
    first, second = batches(2)
    one.step(first, second)
    before = values(one.loss), values(one._step.model.plain)
    for _ in range(2):
        with pytest.raises(error, match=message):
            one.step(first, second)
    assert equal(before[0], values(one.loss)) and equal(before[1], values(one._step.model.plain))
    assert one.steps == 1


def test_a_step_that_fails_leaves_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    one = learner(meta_every=lambda step: 3)
    first, second = batches(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one._step, "_step", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.step(first, second)
    assert one.step(first, second).task_loss is not None
    assert one.step(first, second).task_loss is None


def test_seldom_later() -> None:
    schedule = seldom_later(period=10, most=3)
    assert [schedule(t) for t in (0, 9, 10, 19, 20, 1000)] == [1, 1, 2, 2, 3, 3]
    step, updates = 0, 0
    while step < 1600:
        step, updates = step + seldom_later()(step), updates + 1
    assert updates == 354
    for option in ({"period": 0}, {"most": 0}):
        with pytest.raises(ValueError, match=f"seldom_later: {next(iter(option))} must be at least 1, got 0"):
            seldom_later(**option)


def test_plain_steps_are_those_of_the_loss() -> None:
    one = learner(meta_every=100)
    both = batches(3)
    one.step(both[0], both[1])
    model, optimizer = copy.deepcopy((one._step.model.plain, one.optimizer))
    one.step(both[2])
    optimizer.zero_grad()
    one.loss(model(both[2][0]), both[2][1]).backward()
    optimizer.step()
    for a, b in zip(values(one._step.model.plain), values(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "loss",
    [
        lambda: TaylorLoss(order=3, dtype=torch.float64),
        lambda: ParametricCrossEntropy(3, learnable=True, dtype=torch.float64),
    ],
    ids=["taylor", "phi"],
)
def test_learns_other_losses(loss: Any) -> None:
    one = learner(loss())
    before = values(one.loss)
    assert one.step(*batches()).skipped is None
    assert not equal(before, values(one.loss))


def test_lowers_the_task_loss() -> None:
    torch.manual_seed(0)
    loss = LossNetwork(8, dtype=torch.float64)
    one = learner(loss, meta_optimizer=Adam(loss.parameters(), 1e-2))
    x, y = torch.randn(64, 1, 8, 8, dtype=torch.float64), torch.randint(3, (64,))
    x = x + y[:, None, None, None]
    history = []
    for _ in range(100):
        report = one.step((x[:32], y[:32]), (x[32:], y[32:]))
        assert report.task_loss is not None
        history.append(report.task_loss.item())
    assert min(history) < 0.8 * history[0]


def test_learning_rate() -> None:
    one = learner(learning_rate=1e-3)
    train, valid = batches()
    before = one.optimizer.param_groups[0]["lr"]
    model, optimizer = copy.deepcopy((one._step.model.plain, one.optimizer))
    expected = meta_gradient(
        model, optimizer, one.loss, F.cross_entropy, train, valid, learning_rates=True
    ).learning_rate_gradients[0]
    one.step([train], valid)
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(before - 1e-3 * expected.item())
    # A loss without parameters: Meta-LR alone.
    alone = learner(nn.CrossEntropyLoss(), learning_rate=1e-3)
    alone.step([train], valid)
    assert alone.optimizer.param_groups[0]["lr"] != before
    with pytest.raises(ValueError, match="loss must have parameters to learn, got none"):
        learner(nn.CrossEntropyLoss())


def test_a_learning_rate_that_is_a_tensor_stays_one() -> None:
    pair = batches()
    model = mlp()
    rates = []
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        other = copy.deepcopy(model)
        one = OnlineLearner(
            other, SGD(other.parameters(), rate), nn.CrossEntropyLoss(), F.cross_entropy, learning_rate=1e-3
        )
        one.step(*pair)
        rates.append(one.optimizer.param_groups[0]["lr"])
    assert rates[1] is rate
    assert rate != 0.1
    assert rates[0] == pytest.approx(float(rates[1]))


def test_a_learning_rate_of_zero_cannot_be_learned() -> None:
    model = mlp()
    first, second = list(model[1].parameters()), list(model[3].parameters())  # type: ignore[index]
    optimizer = SGD([{"params": first}, {"params": second, "lr": 0.0}], 0.1)
    loss = LossNetwork(8, dtype=torch.float64)
    with pytest.raises(
        ValueError,
        match=r"every group of optimizer must have a positive lr to start from, got 0\.0 in group 1$",
    ):
        OnlineLearner(model, optimizer, loss, F.cross_entropy, learning_rate=1e-3)
    assert OnlineLearner(model, optimizer, loss, F.cross_entropy).step(*batches()).skipped is None


def test_loss_and_learning_rate_together() -> None:
    loss = LossNetwork(8, dtype=torch.float64)
    one = learner(loss, learning_rate=1e-3, meta_optimizer=SGD(loss.parameters(), 0.5))
    train, valid = batches()
    model, optimizer = copy.deepcopy((one._step.model.plain, one.optimizer))
    before = [p.detach().clone() for p in loss.parameters()]
    expected = meta_gradient(model, optimizer, loss, F.cross_entropy, train, valid, learning_rates=True)
    one.step([train], valid)
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(
        0.1 - 1e-3 * expected.learning_rate_gradients[0].item()
    )
    for old, p, g in zip(before, loss.parameters(), expected.gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * g)


class Mixture(nn.Module):
    """Everything that can be learned, weighted by weights that are learned too."""

    def __init__(self) -> None:
        super().__init__()
        self.network = LossNetwork(8, dtype=torch.float64)
        self.classes = ParametricCrossEntropy(3, learnable=True, dtype=torch.float64)
        self.distances = DistanceMixtureLoss(learnable=True, dtype=torch.float64)
        self.weights = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def parts(self, pred: Tensor, target: Tensor) -> list[Tensor]:
        embeddings = F.normalize(pred)
        return [self.network(pred, target), self.classes(pred, target), self.distances(embeddings, target)]

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.weights.softmax(0) @ torch.stack(self.parts(pred, target))


class MixtureOfEager(Mixture):
    """In plain PyTorch, except for the distances, of which only all triplets would be plain."""

    def __init__(self, loss: Mixture) -> None:
        nn.Module.__init__(self)
        self.network, self.classes, self.distances = LossOfEager(loss.network), loss.classes, loss.distances
        self.weights = loss.weights

    def parts(self, pred: Tensor, target: Tensor) -> list[Tensor]:
        network, _, distances = super().parts(pred, target)
        z = (self.classes.phi[target] * pred.log_softmax(1)).sum(1)
        return [network, -z.sigmoid().mean(), distances]


@pytest.mark.parametrize(
    ("backend", "bound"), [("double_backward", 1e-10), ("jvp", 1e-10), ("finite_difference", 1e-6)]
)
def test_several_losses_equal_full_unrolling(backend: str, bound: float) -> None:
    model, loss = mlp(), Mixture()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    train, valid = batches()
    expected = unrolled(model, optimizer, loss, train, valid, eager=MixtureOfEager)  # type: ignore[arg-type]
    actual = meta_gradient(model, optimizer, loss, F.cross_entropy, train, valid, backend=backend).gradients
    for (name, _), a, e in zip(loss.named_parameters(), actual, expected, strict=True):
        assert e.any(), name
        assert relative_error([a], [e]) < bound, name


def test_several_losses_have_rates_of_their_own() -> None:
    loss = Mixture()
    others = [loss.classes.phi, loss.distances.phi, loss.weights]
    groups: list[dict[str, Any]] = [
        {"params": list(loss.network.parameters()), "lr": 1e-4},
        {"params": others, "lr": 1e-2},
    ]
    one = learner(loss, meta_optimizer=Adam(groups, eps=0.0))
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    one.step(*batches())
    for name, p in loss.named_parameters():
        moved = (p.detach() - before[name]).abs()
        rate = 1e-4 if name.startswith("network") else 1e-2
        # The first step of Adam is as long as its rate, where there is a gradient.
        torch.testing.assert_close(moved.nan_to_num().max(), torch.tensor(rate, dtype=torch.float64))


# ---- Bad input.

Change = Any


def of_other_length(batch: Any) -> Any:
    return batch[0], batch[1][:-1]


def empty(batch: Any) -> Any:
    return batch[0][:0], batch[1][:0]


def everything(one: OnlineLearner) -> Any:
    """Model, optimizer and learner."""
    state = one.state_dict()
    del state["backend"]  # partly text, which assert_close does not know
    return one._step.model.plain.state_dict(), one.optimizer.state_dict(), state


@pytest.mark.parametrize("backend", ["double_backward", "jvp", "finite_difference"])
@pytest.mark.parametrize(
    ("which", "change", "kind", "message"),
    [
        (0, of_other_length, ValueError, r"LossNetwork: class indices must be \[7\] for logits \[7, 3\], got \[6\]"),
        (1, of_other_length, ValueError, r"Expected input batch_size \(7\) to match target batch_size \(6\)"),
        (0, empty, ValueError, r"OnlineLearner: train_batch must hold at least one sample, got a target \[0\]"),
        (1, empty, ValueError, r"OnlineLearner: valid_batch must hold at least one sample, got a target \[0\]"),
        (0, lambda b: b[0], TypeError, r"OnlineLearner: train_batch must be a pair .*, got Tensor"),
        (1, lambda b: (*b, b[1]), TypeError, r"OnlineLearner: valid_batch must be a pair .*, got tuple of 3"),
        (0, lambda b: (b[0], b[1].float()), ValueError, r"LossNetwork: probabilities must be \[7, 3\] .*long\(\)"),
        (0, lambda b: (b[0], b[1] + 5), ValueError, r"loss_network: labels must lie in \[0, 3\), got \d at index"),
        (1, lambda b: (b[0], b[1] + 5), IndexError, "Target . is out of bounds"),
        (0, lambda b: (b[0][:, :, 1:], b[1]), RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
        (1, lambda b: (b[0][:, :, 1:], b[1]), RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
        (0, lambda b: (b[0] * float("nan"), b[1]), DivergedError, "the learned loss is nan on this batch"),
    ],
)  # fmt: skip
def test_an_unfit_batch_changes_nothing(
    which: int, change: Change, kind: type[Exception], message: str, backend: str
) -> None:
    one = learner(backend=backend)
    for pair in zip(batches(2), batches(2), strict=True):
        one.step(*pair)
    pair = batches()
    fit = list(pair)
    pair[which] = change(pair[which])
    before = copy.deepcopy(everything(one))
    random = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        one.step(*pair)
    torch.testing.assert_close(everything(one), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert one.step(*fit).skipped is None  # and it goes on


def test_an_output_that_does_not_fit_the_loss_changes_nothing() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean(1)

    one = learner(model=Pooled())
    before = copy.deepcopy(everything(one))
    with pytest.raises(
        ValueError, match=r"^LossNetwork: class indices must be \[\] for logits \[7\], got \[7\]"
    ):
        one.step(*batches())
    torch.testing.assert_close(everything(one), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["double_backward", "jvp", "finite_difference"])
def test_batches_of_changing_size(backend: str) -> None:
    one = learner(backend=backend, meta_optimizer=None)
    for size, valid_size in ((7, 3), (2, 9), (1, 1), (7, 7)):
        train, valid = (
            (torch.randn(n, 1, 8, 8, dtype=torch.float64), torch.randint(3, (n,))) for n in (size, valid_size)
        )
        model, optimizer, loss = copy.deepcopy((one._step.model.plain, one.optimizer, one.loss))
        expected = meta_gradient(model, optimizer, loss, F.cross_entropy, train, valid, backend=backend)
        report = one.step([train], valid)
        torch.testing.assert_close(report.task_loss, expected.task_loss)
        for a, b in zip(values(one._step.model.plain), values(model), strict=True):
            torch.testing.assert_close(a, b)


def test_a_meta_gradient_that_is_not_finite_is_skipped() -> None:
    one = learner()
    (x, y), (xv, yv) = batches()
    before, weights = values(one.loss), values(one._step.model.plain)
    report = one.step((x, y), (torch.full_like(xv, float("nan")), yv))
    assert report.skipped == "the task loss is not finite"
    assert one.skipped == 1
    assert equal(before, values(one.loss))
    assert not equal(weights, values(one._step.model.plain))  # the training step itself was sound
    assert one.step((x, y), (xv, yv)).skipped is None


class Scaled(nn.Module):
    """A loss whose parameter scales what it says to its slope, or does not reach it."""

    def __init__(self, value: float, reaches: bool = True) -> None:
        super().__init__()
        self.phi, self.reaches = nn.Parameter(torch.full((4,), value)), reaches

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        value = F.cross_entropy(pred, target)
        return self.phi.mean() * value if self.reaches else value + self.phi.mean()


def both_ways(one: OnlineLearner, *pair: Any) -> tuple[str | None, bool]:
    """Why the update was skipped; and whether the step that reads nothing back takes it."""
    other = copy.deepcopy(one)
    return one.step(*pair).skipped, bool(other._step_on_device(*pair)[2])


@pytest.mark.parametrize("backend", ["double_backward", "jvp", "finite_difference"])
def test_a_loss_whose_parameters_no_gradient_reaches(backend: str) -> None:
    model, loss = mlp().float(), Scaled(1.0, reaches=False)
    other = copy.deepcopy(model)
    one = learner(loss, model, backend=backend, meta_optimizer=SGD(loss.parameters(), 1.0))
    train, valid = batches(dtype=torch.float32)
    skipped, taken = both_ways(one, train, valid)
    assert skipped == "no gradient reaches the loss's parameters"
    assert one.skipped == 1
    assert not taken
    F.cross_entropy(other(train[0]), train[1]).backward()
    SGD(other.parameters(), 0.1).step()
    for a, b in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(a, b)


def test_a_large_meta_gradient_is_finite() -> None:
    model, loss = mlp().float(), Scaled(1.0)
    meta = SGD(loss.parameters(), 1e-20)
    one = OnlineLearner(
        model,
        SGD(model.parameters(), 0.1),
        loss,
        lambda pred, target: 1e22 * F.cross_entropy(pred, target),
        meta_optimizer=meta,
    )
    skipped, taken = both_ways(one, *batches(dtype=torch.float32))
    assert skipped is None
    assert taken
    assert not equal(loss.phi, torch.ones(4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_element_that_is_not_finite(value: float) -> None:
    tensors = [torch.zeros(3, 40), torch.zeros(0), torch.full((), 3e38), torch.zeros(2, dtype=torch.float64)]
    assert all_finite(tensors)
    tensors[0][1, 17] = value
    assert not all_finite(tensors)


def scaled(value: float, **options: Any) -> OnlineLearner:
    """The slope ratio is the mean of phi, and every meta-update lowers it or raises it."""
    loss = Scaled(value)
    meta = Adam(loss.parameters(), 0.1)
    return learner(loss, mlp().float(), meta_optimizer=meta, **options)


def test_slope_that_falls_too_low() -> None:
    one = scaled(1.0, min_slope=0.5)
    pair = batches(dtype=torch.float32)
    assert one.step(*pair).skipped is None
    assert one.step(*pair).skipped is None
    assert one.meta_optimizer is not None
    meta = one.meta_optimizer
    ratio = float(one.loss.phi.detach().mean())
    before, state = values(one.loss), copy.deepcopy(meta.state_dict())
    assert one.step(*pair).slope_ratio == pytest.approx(ratio)
    changed = meta.state_dict()
    assert not equal(before, values(one.loss))
    meta.param_groups[0]["lr"] = 0.05  # a scheduler's, not to be undone
    state["param_groups"][0]["lr"] = 0.05
    with torch.no_grad():
        one.loss.phi.fill_(0.4)
    for undone in (1, 2):  # and a second time, if it is below there too
        report = one.step(*pair)
        assert report.skipped is not None
        assert report.skipped.endswith("of the task loss's; the last update is undone")
        assert one.skipped == undone
        assert equal(before, values(one.loss))
        torch.testing.assert_close(meta.state_dict(), state, rtol=0, atol=0)
        one.min_slope = 10.0
    assert changed["state"][0]["step"] == 3
    one.min_slope = 0.5
    assert one.step(*pair).skipped is None
    assert meta.state_dict()["state"][0]["step"] == 3


def test_a_slope_that_starts_too_low_is_learned_all_the_same() -> None:
    one = scaled(0.4, min_slope=0.5)
    pair = batches(dtype=torch.float32)
    assert [one.step(*pair).skipped for _ in range(2)] == [None, None]
    assert not equal(values(one.loss), [torch.full((4,), 0.4)])
    with torch.no_grad():
        one.loss.phi.fill_(0.6)
    before = values(one.loss)
    assert one.step(*pair).skipped is None
    with torch.no_grad():
        one.loss.phi.fill_(0.45)
    assert "fell to 0.45" in str(one.step(*pair).skipped)
    assert equal(values(one.loss), before)


def test_slope_that_rises_too_high() -> None:
    one = scaled(1.0, max_slope=2.0)
    pair = batches(dtype=torch.float32)
    assert [one.step(*pair).skipped for _ in range(2)] == [None, None]
    with torch.no_grad():
        one.loss.phi.fill_(1.5)
    accepted = values(one.loss)
    assert one.step(*pair).skipped is None
    with torch.no_grad():
        one.loss.phi.fill_(2.5)
    assert "the slope rose to 2.5 of the task loss's; the last update is undone" in str(
        one.step(*pair).skipped
    )
    assert equal(values(one.loss), accepted)
    with pytest.raises(ValueError, match=r"max_slope must be above min_slope, got 0\.5 and 0\.5"):
        scaled(1.0, min_slope=0.5, max_slope=0.5)
    with pytest.raises(ValueError, match="max_slope must be positive and finite, got nan"):
        scaled(1.0, max_slope=float("nan"))


def test_a_slope_of_a_loss_without_parameters_has_nothing_to_undo() -> None:
    one = learner(nn.CrossEntropyLoss(), min_slope=0.5, learning_rate=1e-3)
    assert one.step(*batches()).skipped is None
    one.min_slope = 2.0
    assert one.step(*batches()).skipped is None


def test_resumes_before_an_update_that_is_undone(tmp_path: Path) -> None:
    one, two = scaled(1.0, min_slope=0.5), scaled(2.0, min_slope=0.5)
    two._step.model.plain.load_state_dict(one._step.model.plain.state_dict())
    pair = batches(dtype=torch.float32)
    for _ in range(2):
        one.step(*pair)
    torch.save(
        [one.state_dict(), one._step.model.plain.state_dict(), one.optimizer.state_dict()],
        tmp_path / "state.pt",
    )
    state, model, optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
    two.load_state_dict(state)
    two._step.model.plain.load_state_dict(model)
    two.optimizer.load_state_dict(optimizer)
    for each in (one, two):
        with torch.no_grad():
            each.loss.phi.fill_(0.4)
        assert each.step(*pair).skipped is not None
        assert each.step(*pair).skipped is None
    assert equal(values(one.loss), values(two.loss))
    assert one.meta_optimizer is not None
    assert two.meta_optimizer is not None
    torch.testing.assert_close(
        one.meta_optimizer.state_dict(), two.meta_optimizer.state_dict(), rtol=0, atol=0
    )


def test_refuses_the_state_of_another_loss() -> None:
    one, two = (learner(LossNetwork(8, leak, dtype=torch.float64)) for leak in (0.1, 0.2))
    before = copy.deepcopy(everything(one))
    with pytest.raises(
        RuntimeError, match=r"that of LossNetwork\(leak=0.1\), got that of LossNetwork\(leak=0.2\)"
    ):
        one.load_state_dict(two.state_dict())
    torch.testing.assert_close(everything(one), before, rtol=0, atol=0)


def test_resumes_in_the_same_bits(tmp_path: Path) -> None:
    pairs = list(zip(batches(6), batches(6), strict=True))
    one = learner(model=cnn())
    torch.manual_seed(1)
    for pair in pairs[:3]:
        one.step(*pair)
    saved = {
        "learner": one.state_dict(),
        "model": one._step.model.plain.state_dict(),
        "optimizer": one.optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(saved, tmp_path / "state.pt")
    for pair in pairs[3:]:
        one.step(*pair)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    two = learner(model=cnn())
    two._step.model.plain.load_state_dict(loaded["model"])
    two.optimizer.load_state_dict(loaded["optimizer"])
    two.load_state_dict(loaded["learner"])
    torch.set_rng_state(loaded["random"])
    for pair in pairs[3:]:
        two.step(*pair)
    assert two.steps == one.steps == 6
    assert equal(values(one.loss), values(two.loss))
    assert equal(values(one._step.model.plain), values(two._step.model.plain))


def test_autocast() -> None:
    model = mlp().float()
    one = learner(LossNetwork(8), model, autocast=torch.bfloat16, backend="finite_difference")
    train, valid = batches(dtype=torch.float32)
    assert one.step([train], valid).skipped is None
    assert all(p.dtype == torch.float32 for p in model.parameters())


class Upcast(nn.Module):
    """Returns float32 though it computes in what autocast says."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), activation, nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).float()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("backend", ["double_backward", "jvp", "finite_difference"])
def test_meta_gradient_under_autocast(backend: str, activation: Any) -> None:
    gradients: dict[torch.dtype | None, list[Tensor]] = {None: [], torch.bfloat16: []}
    for _ in range(8):
        model, loss = Upcast(activation()), LossNetwork(8)
        train, valid = batches(dtype=torch.float32)
        for dtype, found in gradients.items():
            other = copy.deepcopy(model)
            step = DifferentiableStep(
                other,
                SGD(other.parameters(), 0.1),
                loss,
                F.cross_entropy,
                StepOptions(backend if dtype else "jvp", autocast=dtype),
            )
            found.extend(step([train], valid).gradients)  # type: ignore[arg-type]
    assert relative_error(gradients[torch.bfloat16], gradients[None]) < 0.1


def test_float16_which_needs_a_grad_scaler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"autocast must be torch\.bfloat16, whose .* GradScaler would see"):
        learner(autocast=torch.float16)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp().float()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).half()

    one = learner(LossNetwork(8), Half())
    before = values(one._step.model.plain)
    with pytest.raises(ValueError, match=r"must run in float32 or in bfloat16, .* got float16"):
        one.step(*batches(dtype=torch.float32))
    assert equal(values(one._step.model.plain), before)


def test_says_which_backend_and_why() -> None:
    relu = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU()).double()
    assert learner(model=relu).backend.startswith("finite_difference: for ReLU and max-pooling")
    assert learner().backend == "jvp: it is exact, and costs no more than two passes of finite differences"
    assert learner(model=cnn()).backend.startswith("finite_difference: for ReLU and max-pooling")
    assert learner(backend="jvp").backend == "jvp: as asked for"


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="meta_every must be at least 1, got 0"):
        learner(meta_every=0)
    with pytest.raises(ValueError, match="learning_rate must not be negative, got -1"):
        learner(learning_rate=-1.0)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"min_slope must be positive and finite, got {bad}"):
            learner(min_slope=bad)


def test_a_meta_optimizer_of_other_parameters() -> None:
    loss = LossNetwork(8, dtype=torch.float64)
    message = (
        r"^OnlineLearner: meta_optimizer must have all trainable parameters of the loss and no others, got "
    )
    for parameters, got in (
        (
            list(copy.deepcopy(loss).parameters()),
            r"3 others, and of the loss's all but .'input_weight', 'hidden_.*",
        ),
        ([loss.input_weight, loss.output_weight], r"0 others, and of the loss's all but .'hidden_weight'\]"),
        ([*loss.parameters(), nn.Parameter(torch.zeros(1))], r"1 others, and of the loss's all but \[\]"),
    ):
        with pytest.raises(ValueError, match=f"{message}{got}; make it of loss"):
            learner(loss, meta_optimizer=Adam(parameters))
    loss.hidden_weight.requires_grad_(False)  # may be there, and stays
    before = loss.hidden_weight.clone()
    one = learner(loss, meta_optimizer=Adam(loss.parameters()))
    assert one.step(*batches()).skipped is None
    assert torch.equal(before, loss.hidden_weight)
