"""Training with a few labels that are right: the pieces, the whole, and what is refused."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from small_problems import equal, values
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from lossmeta.adalfl import PAPER_META_RATE, AveragedWeights, CleanLearner, OnlineLearner, learn_with_clean
from lossmeta.losses import LossNetwork, TaylorLoss

Pair = tuple[Tensor, Tensor]


def network(inputs: int = 6, classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes))


def data(count: int, classes: int = 3) -> Pair:
    return torch.randn(count, 6), torch.arange(count) % classes


def made(model: nn.Module | None = None, clean: Any = None, **options: Any) -> CleanLearner:
    model = model or network()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    return CleanLearner(model, optimizer, data(30) if clean is None else clean, **options)


# ---- The average.


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def test_the_average_is_the_formula_s() -> None:
    model = WithBuffers().double()
    average = AveragedWeights(model, 0.7)
    expected = [v.clone() for v in values(model)]
    for step in range(12):
        model(torch.randn(4, 6).double())
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        average.update()
        d = min(0.7, (step + 1) / (step + 10))
        expected = [
            d * a + (1 - d) * v if v.is_floating_point() else v
            for a, v in zip(expected, values(model), strict=True)
        ]
    for a, b in zip(values(average.model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert values(average.model)[-3] == 12 or any(
        v.dtype == torch.int64 and v == 12 for v in values(average.model)
    )
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())
    average.give()
    assert equal(values(model), values(average.model))
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_an_average_goes_on_from_its_state() -> None:
    model = network()
    one, two = AveragedWeights(model), AveragedWeights(model)
    for _ in range(3):
        nn.init.normal_(model[0].weight)
        one.update()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    nn.init.normal_(model[0].weight)
    one.update()
    two.update()
    assert equal(values(one.model), values(two.model))


def test_averages_of_half_precision_weights_move() -> None:
    """By less than such a number can tell from one step to the next."""
    model = nn.Linear(4, 4).bfloat16()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    one = AveragedWeights(model)
    for _ in range(20):
        one.update()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.2)
    two = AveragedWeights(model)
    for i in range(3000):
        one.update()
        if i == 100:
            two.load_state_dict(copy.deepcopy(one.state_dict()))
        elif i > 100:
            two.update()
    for a, b in zip(values(one.model), values(two.model), strict=True):
        torch.testing.assert_close(a, torch.full_like(a, 1.2), rtol=1e-2, atol=0)
        assert torch.equal(a, b)


def test_a_model_that_changes_is_followed_or_refused() -> None:
    model = WithBuffers()
    average = AveragedWeights(model, decay=0.0)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
    average.update()
    assert equal(values(average.model), values(model))
    before = values(average.model)
    model.register_buffer("more", torch.ones(2))
    with pytest.raises(
        ValueError, match=r"must keep its parameters and buffers .* got a change of \['more'\]"
    ):
        average.update()
    assert equal(values(average.model), before) and average.steps == 1


def test_parameters_that_are_no_floats_are_copied() -> None:
    model = nn.Linear(2, 2)
    model.table = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    average = AveragedWeights(model)
    model.table.fill_(7)
    average.update()
    assert average.model.table.tolist() == [7, 7, 7]  # type: ignore[operator]


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_bad_decays(decay: float) -> None:
    with pytest.raises(ValueError, match=r"AveragedWeights: decay must"):
        AveragedWeights(network(), decay)


def test_a_model_that_cannot_be_copied() -> None:
    model = network()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"must be one that copy\.deepcopy copies, got Sequential"):
        AveragedWeights(model)


# ---- The whole.


def noisy_digits(seed: int) -> tuple[Pair, Pair, Pair]:
    x, y = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    inputs, labels = inputs[order], labels[order]
    wrong = labels[200:1100].clone()
    redrawn = torch.rand(900, generator=generator) < 0.5
    wrong[redrawn] = torch.randint(10, (int(redrawn.sum()),), generator=generator)
    return (inputs[200:1100], wrong), (inputs[:100], labels[:100]), (inputs[1100:], labels[1100:])


def test_it_beats_plain_training_on_wrong_labels() -> None:
    train, clean, (x, y) = noisy_digits(0)
    errors = []
    for learned in (False, True):
        torch.manual_seed(0)
        model = network(64, 10)
        optimizer = SGD(model.parameters(), 0.03, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(TensorDataset(*train), 64, shuffle=True, generator=generator)
        if learned:
            learn_with_clean(model, optimizer, loader, clean, epochs=30)
        else:
            for _, (inputs, labels) in itertools.product(range(30), loader):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
        errors.append(float((model(x).argmax(1) != y).double().mean()))
    assert errors[1] < 0.6 * errors[0]


def test_its_steps_are_those_of_the_pieces() -> None:
    """An OnlineLearner with clean batches, and an average."""
    clean = [data(7) for _ in range(3)]
    one = made(clean=clean, relabel=False)
    model, loss = copy.deepcopy((one.learner._step.model.plain, one.loss))
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    pieces = OnlineLearner(
        model, optimizer, loss, F.cross_entropy,
        meta_optimizer=Adam(loss.parameters(), 3e-3, fused=True), clean_weight=1.0,
    )  # fmt: skip
    average = AveragedWeights(model)
    for i in range(7):
        batch = data(8)
        one.step(batch)
        pieces.step(batch, clean[i % 3])
        average.update()
    assert equal(values(one.averaged), values(average.model))
    assert equal(values(one.loss), values(loss))
    trained = one.learner._step.model.plain
    assert equal(values(trained), values(model)) and not equal(values(trained), values(one.averaged))
    one.finish()
    assert equal(values(trained), values(average.model))
    assert all(p.grad is None for p in trained.parameters())


def test_a_pair_is_gone_through_whole_in_a_new_order_each_time() -> None:
    inputs = torch.arange(12.0)[:, None].expand(12, 6)
    one = made(clean=(inputs, torch.arange(12) % 3), batch_size=4)
    rounds = [torch.cat([next(one._clean)[0][:, 0] for _ in range(3)]) for _ in range(3)]
    for found in rounds:
        assert found.sort().values.tolist() == list(range(12))
    assert not torch.equal(rounds[0], rounds[1]) and not torch.equal(rounds[1], rounds[2])
    again = made(clean=(inputs, torch.arange(12) % 3), batch_size=4)
    assert torch.equal(torch.cat([next(again._clean)[0][:, 0] for _ in range(3)]), rounds[0])
    larger = made(clean=(inputs[:5], torch.arange(5) % 3))
    assert len(next(larger._clean)[1]) == 5


@pytest.mark.parametrize("loader", [False, True])
def test_goes_on_to_the_same_bits(loader: bool) -> None:
    """Of a pair it keeps the place; where a loader stands is its owner's to keep."""
    clean = data(20)
    source: Any = DataLoader(TensorDataset(*clean), 20) if loader else clean
    model = WithBuffers()
    whole, half, new = (made(copy.deepcopy(model), source, batch_size=8) for _ in range(3))
    batches = [data(8) for _ in range(8)]
    for batch in batches:
        whole.step(batch)
    for batch in batches[:5]:
        half.step(batch)

    def parts(one: CleanLearner) -> tuple[Any, ...]:
        return one.learner._step.model.plain, one.learner.optimizer, one

    for a, b in zip(parts(new), parts(half), strict=True):
        a.load_state_dict(copy.deepcopy(b.state_dict()))
    for batch in batches[5:]:
        new.step(batch)
    assert equal(values(new.averaged), values(whole.averaged))
    assert equal(values(new.loss), values(whole.loss))


def test_steps_are_taken_as_they_are_asked_for() -> None:
    one = made()
    reports = one.steps([data(8), data(8)], epochs=2)
    assert one.learner.steps == 0
    next(reports)
    assert one.learner.steps == 1
    assert len(list(reports)) == 3


def test_the_last_stage_is_on_clean_batches_alone() -> None:
    clean = [data(7)]
    one = made(clean=clean)
    for _ in range(3):
        one.step(data(8))
    model = copy.deepcopy(one.averaged).requires_grad_().train()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(one.learner.optimizer.state_dict()))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(clean[0][0]), clean[0][1]).backward()
        optimizer.step()
    one.finish(last_stage=2)
    assert equal(values(one.learner._step.model.plain), values(model))
    with pytest.raises(ValueError, match="last_stage must not be negative, got -1"):
        one.finish(last_stage=-1)


def test_global_random_numbers_stay_as_they_are() -> None:
    model = network()
    before = torch.get_rng_state()
    one = made(model)
    one.step(data(8))
    # data() draws; what is drawn by the learner is not
    torch.set_rng_state(before)
    data(30)
    data(8)
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    made(model).step(data(8))
    assert torch.equal(torch.get_rng_state(), expected)


# ---- Defaults of the rate.


def test_the_meta_rate_depends_on_the_loss() -> None:
    def rate(loss: nn.Module) -> float:
        model = network()
        learner = OnlineLearner(model, SGD(model.parameters(), 0.1), loss, F.cross_entropy)
        assert learner.meta_optimizer is not None
        return learner.meta_optimizer.param_groups[0]["lr"]

    assert rate(LossNetwork(residual="cross_entropy", normalize_slope=True)) == 3e-3
    assert rate(LossNetwork(residual="cross_entropy")) == PAPER_META_RATE == 1e-5
    assert rate(LossNetwork()) == rate(TaylorLoss()) == PAPER_META_RATE
    assert made().learner.meta_optimizer.param_groups[0]["lr"] == 3e-3  # type: ignore[union-attr]
    assert made(meta_rate=0.01).learner.meta_optimizer.param_groups[0]["lr"] == 0.01  # type: ignore[union-attr]


@pytest.mark.parametrize("rate", [1e-3, 3e-3])
@pytest.mark.parametrize("guard", [False, True])
def test_what_may_collapse_is_warned_of(rate: float, guard: bool) -> None:
    model, loss = network(), LossNetwork(residual="cross_entropy")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        OnlineLearner(
            model, SGD(model.parameters(), 0.1), nn.ModuleList([loss])[0], F.cross_entropy,
            meta_optimizer=Adam(loss.parameters(), rate), guard=guard,
        )  # fmt: skip
    said = [
        w for w in caught if "without normalize_slope must have a meta rate below 0.003" in str(w.message)
    ]
    assert len(said) == (rate == 3e-3 and not guard)
    assert all(w.filename == __file__ for w in said)


# ---- Bad input.


@pytest.mark.parametrize(
    ("clean", "kind", "message"),
    [
        (None, ValueError, "clean must be a pair .* or batches, got None; give some samples whose labels are known"),
        (3, TypeError, "clean must be a pair .* or batches, got int"),
        (torch.ones(3), TypeError, "clean must be a pair .* or batches, got Tensor"),
        ((torch.ones(0, 6), torch.ones(0).long()), ValueError, "clean must hold at least one sample"),
        ((torch.ones(4, 6), torch.ones(3).long()), ValueError, r"as many labels, got \[4, 6\] and \[3\]"),
        (((torch.ones(3, 6),), torch.ones(3).long()), ValueError, "one tensor of inputs and as many labels, got tuple"),
        ((torch.ones(3, 6), torch.tensor([0, 1, 3])), ValueError, r"lie in \[0, 3\), the model's classes, got 3 at"),
        ((torch.ones(3, 6), torch.tensor([0, -1, 2])), ValueError, r"must lie in \[0, 3\).*got -1 at index 1"),
    ],
)  # fmt: skip
def test_clean_data_that_is_none(clean: Any, kind: type[Exception], message: str) -> None:
    model = network()
    with pytest.raises(kind, match=message):
        CleanLearner(model, SGD(model.parameters(), 0.1), clean)


@pytest.mark.parametrize("batches", [[], [data(3), (torch.ones(2, 6), torch.tensor([0, 7]))]])
def test_clean_batches_that_are_none(batches: Any) -> None:
    one = made(clean=batches)
    before = values(one.learner._step.model.plain)
    message = r"must lie in \[0, 3\)" if batches else "clean must hold at least one batch, got none"
    if batches:
        one.step(data(8))
        before = values(one.learner._step.model.plain)
    with pytest.raises(ValueError, match=message):
        one.step(data(8))
    assert equal(values(one.learner._step.model.plain), before)


@pytest.mark.parametrize("batches", [False, True])
def test_classes_without_a_clean_sample_are_named_once(batches: bool) -> None:
    x, y = data(8)
    keep = y != 1
    clean: Any = [(x[keep], y[keep])] if batches else (x[keep], y[keep])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one = made(clean=clean)
        for _ in range(4):
            one.step(data(8))
    said = [
        w
        for w in caught
        if "CleanLearner: clean must have samples of every class, got none of [1]" in str(w.message)
    ]
    assert len(said) == 1


def test_labels_that_do_not_count_and_other_shapes() -> None:
    """Ignored ones; a class in every place; yes or no; each is what its task loss takes."""
    x, y = data(9)
    y[::4] = -100
    made(clean=(x, y)).step(data(8))
    ignoring = nn.CrossEntropyLoss(ignore_index=255)
    made(clean=(x, torch.where(y < 0, 255, y)), task_loss=ignoring).step(data(8))

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    def of_tokens(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f.flatten(0, 1), y.flatten())

    tokens = torch.randn(8, 2, 6), torch.randint(5, (8, 2))
    loss = LossNetwork(residual="cross_entropy", normalize_slope=True)

    class OfTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = loss

        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return self.inner(f.flatten(0, 1), y.flatten())

    made(Sequence(), tokens, loss=OfTokens(), task_loss=of_tokens).step(tokens)


def test_a_task_loss_of_its_own_needs_a_loss() -> None:
    x = torch.randn(8, 6)
    with pytest.raises(ValueError, match="loss must be given with a task_loss of its own"):
        made(clean=(x, torch.randn(8, 3)), task_loss=F.mse_loss)
    loss = LossNetwork(link="identity", residual="squared_error", normalize_slope=True)
    made(clean=(x, torch.randn(8, 3)), task_loss=F.mse_loss, loss=loss).step((x, torch.randn(8, 3)))


def test_lists_of_a_loader_are_pairs() -> None:
    one = made()
    x, y = data(2)
    with pytest.raises(TypeError, match="forward"):  # of two inputs; and not two steps
        list(one.steps([[[x, x], [y, y]]]))  # type: ignore[list-item]
    assert one.learner.steps == 0


def test_the_guard_brings_the_average_back_too() -> None:
    one = made(clean=[data(8)])
    for _ in range(12):
        one.step(data(8))
    guard, meta = one.learner._guard, one.learner.meta_optimizer
    assert guard is not None and meta is not None and guard.kept is not None
    kept = copy.deepcopy(guard.kept[1])
    for _ in range(3):
        one.step(data(8))
    guard.undo(meta)
    assert equal(one.learner._step.model.plain.state_dict().values(), kept[1].values())
    assert equal(one.averaged.state_dict().values(), kept[2]["model"].values())


def test_a_model_in_evaluation_mode() -> None:
    one = made()
    one.learner._step.model.plain.eval()
    with pytest.raises(
        ValueError, match=r"the model must be in training mode, got one in evaluation mode; call model"
    ):
        one.step(data(8))
    assert one.learner.steps == 0


def test_a_model_without_parameters() -> None:
    with pytest.raises(ValueError, match="CleanLearner: the model must have trainable parameters, got none"):
        CleanLearner(nn.Identity(), SGD(network().parameters(), 0.1), data(6))


def test_batches_of_one_sample() -> None:
    one = made()
    assert one.step(data(1)).skipped is None
    two = made(WithBuffers())
    before = values(two.learner._step.model.plain)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        two.step(data(1))
    assert equal(values(two.learner._step.model.plain), before)


def test_targets_that_are_tuples_are_named() -> None:
    one = made()
    x, y = data(8)
    with pytest.raises(TypeError, match="LossNetwork: target must be a tensor, got tuple"):
        one.step((x, (y, y)))  # type: ignore[arg-type]
    assert one.learner.steps == 0


def test_training_data_without_a_batch() -> None:
    one = made()
    with pytest.raises(
        ValueError, match=r"train_batches must hold at least one batch .* got none in epoch 0"
    ):
        list(one.steps([]))
    with pytest.raises(ValueError, match="got none in epoch 1"):
        list(one.steps(iter([data(8)]), epochs=2))
    with pytest.raises(ValueError, match="epochs must be"):
        list(one.steps([data(8)], epochs=0))


def test_a_rate_beside_an_optimizer_that_has_its_own() -> None:
    loss = LossNetwork(residual="cross_entropy", normalize_slope=True)
    with pytest.raises(ValueError, match="meta_rate must be left out with a meta_optimizer"):
        made(loss=loss, meta_optimizer=Adam(loss.parameters()), meta_rate=1e-3)
    with pytest.raises(ValueError, match="CleanLearner: meta_rate must be positive and finite, got 0"):
        made(meta_rate=0.0)
