from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from noisy_digits import errors
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam

from lossmeta.adalfl import meta_gradient
from lossmeta.losses import LossNetwork, TransitionLoss

F64 = torch.float64


def network(**options: Any) -> LossNetwork:
    loss = LossNetwork(6, residual="cross_entropy", dtype=F64)
    nn.init.normal_(loss.output_weight, std=0.3)
    return loss


def made(classes: int = 4, **options: Any) -> TransitionLoss:
    loss = TransitionLoss(classes, dtype=F64, **options)
    nn.init.normal_(loss.transition_logits)
    return loss


def formula(loss: TransitionLoss, logits: Tensor, labels: Tensor, shaped: bool = True) -> Tensor:
    """The losses of samples, from probabilities, with nothing but the parameters of the loss."""
    t = loss.transition_logits.exp() / loss.transition_logits.exp().sum(1, keepdim=True)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    q = p @ t
    value = -q[torch.arange(len(q)), labels].log()
    if loss.shape is not None and shaped:
        first, second, third = loss.shape.parameters()

        def activation(x: Tensor) -> Tensor:
            return 0.99 * (1 + (10 * x).exp()).log() / 10 + 0.01 * x

        y = F.one_hot(labels, q.shape[1]).to(q)
        h = activation(torch.stack([y, q], -1) @ first.mT)
        value = value + (activation(h @ second.mT) @ third.mT).squeeze(-1).mean(1)
    return value


def normalized(loss: TransitionLoss, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean, with the factor by autograd at predictions that are constants."""
    value = formula(loss, logits, labels).mean()
    if not loss.normalize_slope:
        return value
    f = logits.detach().requires_grad_()
    own, corrected = (slope_of(formula(loss, f, labels, shaped), f).abs().sum() for shaped in (True, False))
    return value * corrected / own


def slope_of(losses: Tensor, f: Tensor) -> Tensor:
    return torch.autograd.grad(losses.sum(), f, create_graph=True)[0]


CASES = pytest.mark.parametrize(("shape", "normalize"), [(None, False), (network, False), (network, True)])


@CASES
def test_is_the_formula(shape: Any, normalize: bool) -> None:
    loss = made(shape=shape and shape(), normalize_slope=normalize)
    logits, labels = 2 * torch.randn(9, 4, dtype=F64), torch.randint(4, (9,))
    results = []
    for function in (loss, lambda f, y: normalized(loss, f, y)):
        f = logits.clone().requires_grad_()
        value = function(f, labels)
        (slope,) = torch.autograd.grad(value, f, create_graph=True)
        u = torch.linspace(-1, 2, 36, dtype=F64).view(9, 4)
        results.append((value, slope, torch.autograd.grad(slope, list(loss.parameters()), u)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-9, atol=1e-12)
    if normalize:
        f = logits.requires_grad_()
        corrected = slope_of(formula(loss, f, labels, False).mean(), f)
        torch.testing.assert_close(results[0][1].abs().sum(), corrected.abs().sum(), rtol=1e-12, atol=0)


def test_a_shape_starts_as_forward_correction() -> None:
    for normalize in (False, True):
        one = made()
        both = TransitionLoss(
            4,
            shape=LossNetwork(residual="cross_entropy", dtype=F64),
            normalize_slope=normalize,
            dtype=F64,
        )
        both.transition_logits.data.copy_(one.transition_logits)
        logits, labels = torch.randn(5, 4, 2, dtype=F64), torch.randint(4, (5, 2))
        torch.testing.assert_close(both(logits, labels), one(logits, labels), rtol=1e-12, atol=0)
        assert len(list(both.parameters())) == 4


def test_a_user_can_put_a_loss_on_the_probabilities_of_labels() -> None:
    loss = made(shape=network(), reduction="none")
    logits, labels = torch.randn(5, 4, dtype=F64), torch.randint(4, (5,))
    alone = copy.deepcopy(loss.shape)
    alone.reduction = "none"
    log_q = (logits.softmax(1) @ loss.transition).log()
    torch.testing.assert_close(loss(logits, labels), alone(log_q, labels), rtol=1e-12, atol=0)


def test_small_probabilities_are_exact() -> None:
    loss = TransitionLoss(3, dtype=torch.float32)
    with torch.no_grad():
        loss.transition_logits.copy_(torch.tensor([[0.0, -200, -300], [-400, 0, -500], [-600, -700, 0]]))
    logits = torch.tensor([[0.0, -1000, -1000], [-1000, -1000, 0.0]], requires_grad=True)
    value = loss(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(value.item(), 400.0)
    value.backward()
    assert logits.grad.isfinite().all() and loss.transition_logits.grad.isfinite().all()
    # The label says that the class is the one that it was flipped from: nothing to learn about the prediction.
    torch.testing.assert_close(logits.grad, torch.zeros(2, 3))


def test_where_labels_say_nothing_the_factor_is_1() -> None:
    loss = TransitionLoss(3, shape=network(), normalize_slope=True, dtype=F64)
    with torch.no_grad():
        loss.transition_logits.zero_()
    logits, labels = torch.randn(6, 3, dtype=F64, requires_grad=True), torch.randint(3, (6,))
    value = loss(logits, labels)
    torch.testing.assert_close(value, formula(loss, logits, labels).mean())
    (slope,) = torch.autograd.grad(value, logits, create_graph=True)
    assert slope.abs().max() < 1e-15
    gradients = torch.autograd.grad(slope, list(loss.parameters()), torch.randn_like(logits))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0].any()


# ---- Where it starts.


def test_starts_with_stay_on_the_diagonal() -> None:
    for classes, stay in ((2, 0.6), (10, 0.9), (7, 0.2)):
        t = TransitionLoss(classes, stay, dtype=F64).transition
        expected = torch.full((classes, classes), (1 - stay) / (classes - 1), dtype=F64)
        torch.testing.assert_close(t.detach(), expected.fill_diagonal_(stay), rtol=1e-14, atol=0)
    assert TransitionLoss(2).transition_logits.dtype == torch.float32
    assert t.requires_grad


def test_starts_from_an_estimate() -> None:
    estimate = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]], dtype=F64)
    t = TransitionLoss(3, transition=estimate, dtype=F64).transition.detach()
    assert (t - estimate).abs().max() < 1e-3
    torch.testing.assert_close(t[2], estimate[2], rtol=1e-14, atol=0)
    row = torch.tensor([1e-3 / 3, 1.0, 1e-3 / 3], dtype=F64)
    torch.testing.assert_close(t[1], row / row.sum(), rtol=1e-14, atol=0)
    # The row of a class that is never flipped can be learned as any other.
    loss = TransitionLoss(3, transition=estimate.bfloat16())
    assert loss.transition_logits.isfinite().all() and loss.transition_logits.dtype == torch.float32
    optimizer = Adam(loss.parameters(), 0.1)
    logits, labels = torch.tensor([[0.0, 9, 0]]).expand(4, 3), torch.tensor([0, 0, 1, 1])
    for _ in range(200):
        optimizer.zero_grad()
        loss(logits, labels).backward()
        optimizer.step()
    torch.testing.assert_close(loss.transition[1].detach(), torch.tensor([0.5, 0.5, 0]), rtol=0, atol=0.02)
    big = torch.full((1000, 1000), 0.0).fill_diagonal_(1)
    assert (TransitionLoss(1000, transition=big).transition.diagonal() > 0.998).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2, got 1"),
        ({"stay": 0.25}, ValueError, "stay must lie between 1/num_classes = 0.25 and 1, got 0.25"),
        ({"stay": 1.0}, ValueError, "stay must lie between 1/num_classes = 0.25 and 1, got 1.0"),
        ({"stay": math.nan}, ValueError, "stay must lie between 1/num_classes = 0.25 and 1, got nan"),
        (
            {"normalize_slope": True},
            ValueError,
            "normalize_slope must be False without shape, whose size it would take out, got True",
        ),
        ({"transition": [[1.0]]}, TypeError, "transition must be a tensor, got list"),
        (
            {"transition": torch.eye(4).long()},
            ValueError,
            "transition must be float32, float64, bfloat16 or float16, got int64",
        ),
        (
            {"transition": torch.eye(3)},
            ValueError,
            "transition must be [4, 4] for num_classes=4, got [3, 3]",
        ),
        (
            {"transition": 0.5 * torch.eye(4)},
            ValueError,
            "rows of transition must be at least 0 and sum to 1, got a least value of 0 and a sum of 0.5 in row 0; "
            "divide each row, which is one class, by its sum",
        ),
        (
            {"transition": 2 * torch.eye(4).roll(1, 1) - torch.eye(4)},
            ValueError,
            "rows of transition must be at least 0 and sum to 1, got a least value of -1 and a sum of 1 in row 0; "
            "divide each row, which is one class, by its sum",
        ),
        (
            {"transition": torch.full((4, 4), math.nan)},
            ValueError,
            "rows of transition must be at least 0 and sum to 1, got a least value of nan and a sum of nan in row 0; "
            "divide each row, which is one class, by its sum",
        ),
        ({"shape": nn.Linear(2, 2)}, TypeError, "shape must be a LossNetwork, got Linear"),
        (
            {"shape": LossNetwork()},
            ValueError,
            "shape must be LossNetwork(residual='cross_entropy'), with which the loss starts as forward correction, "
            "got residual=None",
        ),
        (
            {"shape": LossNetwork(residual="cross_entropy", normalize_slope=True, reduction="sum")},
            ValueError,
            "shape must have only options of its network, got also {'normalize_slope': True, 'reduction': 'sum'}; "
            "give normalize_slope, ignore_index and reduction to TransitionLoss",
        ),
        (
            {"shape": LossNetwork(residual="cross_entropy", weight=torch.ones(4))},
            ValueError,
            "shape must have only options of its network, got also {'weight': [1.0, 1.0, 1.0, 1.0]}; give "
            "normalize_slope, ignore_index and reduction to TransitionLoss",
        ),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"^TransitionLoss: {re.escape(message)}$"):
        TransitionLoss(**{"num_classes": 4, **options})


def test_refuses_other_classes() -> None:
    message = "TransitionLoss: pred must have 4 classes in dimension 1, as the transition has, got [2, 3]"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TransitionLoss(4)(torch.zeros(2, 3), torch.tensor([0, 1]))


def test_representation() -> None:
    assert repr(TransitionLoss(3)) == (
        "TransitionLoss(num_classes=3, normalize_slope=False, ignore_index=-100, reduction='mean')"
    )


def test_draws_its_matrix() -> None:
    pytest.importorskip("matplotlib")
    loss = TransitionLoss(3, 0.8)
    panel, bar = loss.plot().axes
    (picture,) = panel.get_images()
    assert picture.get_array().tolist() == loss.transition.tolist()
    assert (panel.get_xlabel(), panel.get_ylabel(), bar.get_ylabel()) == ("label", "class", "transition")


# ---- Learned online.


def unrolled(model: nn.Module, loss: nn.Module, train: Any, valid: Any, rate: float) -> list[Tensor]:
    """The gradient of the task loss after one step of plain SGD, through the whole step."""
    named = dict(model.named_parameters())
    value = normalized(loss, model(train[0]), train[1])
    g = torch.autograd.grad(value, list(named.values()), create_graph=True)
    after = {name: p.detach() - rate * d for (name, p), d in zip(named.items(), g, strict=True)}
    achieved = F.cross_entropy(functional_call(model, after, (valid[0],)), valid[1])
    return list(torch.autograd.grad(achieved, list(loss.parameters())))


@CASES
@pytest.mark.parametrize("backend", ["double_backward", "jvp"])
def test_meta_gradient_is_that_of_the_unrolled_step(shape: Any, normalize: bool, backend: str) -> None:
    loss = made(shape=shape and shape(), normalize_slope=normalize)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    train, valid = ((torch.randn(9, 5, dtype=F64), torch.randint(4, (9,))) for _ in range(2))
    expected = unrolled(model, loss, train, valid, 0.3)
    optimizer = SGD(model.parameters(), 0.3)
    result = meta_gradient(model, optimizer, loss, F.cross_entropy, train, valid, backend=backend)
    for ours, theirs in zip(result.gradients, expected, strict=True):
        assert theirs.abs().max() > 1e-9
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_learns_which_classes_were_flipped() -> None:
    loss, after = TransitionLoss(10), [(c + 1) % 10 for c in range(10)]
    truth = 0.6 * torch.eye(10) + 0.4 * torch.eye(10)[after]

    def distance() -> float:
        """In total variation, the mean over the classes."""
        return (loss.transition - truth).abs().sum(1).mean().item() / 2

    before = distance()
    plain, learned = errors(loss, 0.03, lambda y, _: (y + 1) % 10)
    t = loss.transition.detach()
    assert distance() < before - 0.03
    assert (t - t.diagonal().diag()).argmax(1).eq(torch.tensor(after)).sum() >= 6
    assert t[range(10), after].mean() > 0.2, "it started at 0.011"
    assert learned < plain - 0.1, (plain, learned)
