from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from noisy_digits import errors
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

from lossmeta.adalfl import meta_gradient
from lossmeta.losses import LossWeighting

F64 = torch.float64
BOTH = pytest.mark.parametrize("normalize", [True, False])


def made(normalize: bool = True, **options: Any) -> LossWeighting:
    loss = LossWeighting(6, normalize_weights=normalize, dtype=F64, **options)
    for parameter in loss.parameters():
        nn.init.normal_(parameter)
    return loss


def formula(loss: LossWeighting, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean, sample by sample."""
    w1, b1, w2, b2 = loss.parameters()
    each = [-torch.log(f[y].exp() / f.exp().sum()) for f, y in zip(logits, labels, strict=True)]
    weights = []
    for value in each:
        hidden = (w1[:, 0] * value.detach() + b1).clamp(min=0)
        weights.append(1 / (1 + torch.exp(-(w2[0] * hidden).sum() - b2[0])))
    total = sum(w * value for w, value in zip(weights, each, strict=True))
    return total / (sum(weights) if loss.normalize_weights else len(each))


@BOTH
def test_is_the_formula(normalize: bool) -> None:
    loss = made(normalize)
    logits, labels = 2 * torch.randn(8, 4, dtype=F64), torch.randint(4, (8,))
    results = []
    for function in (loss, lambda f, y: formula(loss, f, y)):
        f = logits.clone().requires_grad_()
        value = function(f, labels)
        (slope,) = torch.autograd.grad(value, f, create_graph=True)
        u = torch.linspace(-1, 2, 32, dtype=F64).view(8, 4)
        results.append((value, slope, torch.autograd.grad(slope, list(loss.parameters()), u)))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-14)
    w = loss.weight_of(torch.tensor([[0.1, 2.0], [3.0, 9.0]], dtype=F64))
    one = formula(made(), logits, labels)  # another loss has other weights
    assert w.shape == (2, 2) and w.min() > 0 and w.max() < 1 and one != results[0][0]


@BOTH
def test_starts_with_weights_that_are_the_same(normalize: bool) -> None:
    loss = LossWeighting(normalize_weights=normalize)
    logits, labels = torch.randn(8, 4), torch.randint(4, (8,))
    expected = F.cross_entropy(logits, labels) * (1 if normalize else 0.5)
    torch.testing.assert_close(loss(logits, labels), expected)
    assert {n: tuple(p.shape) for n, p in loss.named_parameters()} == {
        "input_weight": (100, 1),
        "input_bias": (100,),
        "output_weight": (1, 100),
        "output_bias": (1,),
    }
    assert loss.input_weight.unique().numel() > 90 and loss.input_bias.abs().max() <= 1
    before = loss.input_bias.clone()
    loss.reset_parameters()
    assert not torch.equal(loss.input_bias, before) and not loss.output_weight.any()


def test_the_mean_weight_of_a_batch_is_1() -> None:
    loss = made(reduction="none", ignore_index=3)
    logits, labels = torch.randn(6, 3, 5, dtype=F64), torch.randint(4, (6, 5))
    plain = F.cross_entropy(logits, labels, reduction="none", ignore_index=3)
    weights = (loss(logits, labels) / plain)[labels != 3]
    torch.testing.assert_close(weights.mean().item(), 1.0)
    assert weights.std() > 0.1
    with torch.no_grad():  # the sigmoid of each underflows, their ratios do not
        loss.output_bias -= 2000
    far = (loss(logits, labels) / plain)[labels != 3]
    torch.testing.assert_close(far.mean().item(), 1.0)
    assert far.isfinite().all()


@BOTH
@pytest.mark.parametrize("backend", ["double_backward", "jvp"])
def test_meta_gradient_is_that_of_the_unrolled_step(normalize: bool, backend: str) -> None:
    loss = made(normalize)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    train, valid = ((torch.randn(9, 5, dtype=F64), torch.randint(4, (9,))) for _ in range(2))
    named = dict(model.named_parameters())
    value = formula(loss, model(train[0]), train[1])
    g = torch.autograd.grad(value, list(named.values()), create_graph=True)
    after = {name: p.detach() - 0.3 * d for (name, p), d in zip(named.items(), g, strict=True)}
    achieved = F.cross_entropy(functional_call(model, after, (valid[0],)), valid[1])
    expected = torch.autograd.grad(achieved, list(loss.parameters()))
    optimizer = SGD(model.parameters(), 0.3)
    result = meta_gradient(model, optimizer, loss, F.cross_entropy, train, valid, backend=backend)
    for ours, theirs in zip(result.gradients, expected, strict=True):
        assert theirs.abs().max() > 1e-9
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: LossWeighting(0), ValueError, "hidden must be at least 1, got 0"),
        (lambda: LossWeighting().weight_of(1.0), TypeError, "loss must be a tensor, got float"),  # type: ignore[arg-type]
        (
            lambda: LossWeighting().weight_of(torch.tensor([1])),
            ValueError,
            "loss must be float32, float64, bfloat16 or float16, got int64",
        ),
        (
            lambda: LossWeighting().plot((2.0, 1.0)),
            ValueError,
            "losses must be (lowest, highest), finite and from 0 on, got (2.0, 1.0)",
        ),
    ],
)
def test_refuses_bad_arguments(act: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^LossWeighting: {re.escape(message)}$"):
        act()


def test_representation() -> None:
    assert repr(LossWeighting(3)) == (
        "LossWeighting(hidden=3, normalize_weights=True, ignore_index=-100, reduction='mean')"
    )


def test_draws_the_weight() -> None:
    pytest.importorskip("matplotlib")
    loss = made()
    (panel,) = loss.plot((0.0, 4.0)).axes
    (line,) = panel.get_lines()
    x = torch.tensor(line.get_xdata())
    assert (x.min(), x.max()) == (0, 4)
    expected = loss.weight_of(x.double())
    torch.testing.assert_close(torch.tensor(line.get_ydata(), dtype=F64), expected, rtol=0, atol=1e-6)


def test_learns_to_leave_out_what_is_labelled_wrongly() -> None:
    loss = LossWeighting()
    plain, learned = errors(loss, 1e-3, lambda y, generator: torch.randint(10, y.shape, generator=generator))
    likely, unlikely = loss.weight_of(torch.tensor([0.5, 5.0]))
    assert unlikely < 0.2 * likely
    assert learned < plain - 0.02, (plain, learned)
