"""What ALA is compared with, against loops in float64 that follow the equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta.recipes import _ala_bandit, _ala_large_margin, _ala_self_paced
from lossmeta.recipes._ala_auc import AreaUnderPrecisionRecall, pairwise_auc_roc
from lossmeta.recipes._ala_large_margin import large_margin_logits

N, C, D = 12, 4, 5


@pytest.fixture
def scores() -> Tensor:
    return 2 * torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    """Class 3 does not occur."""
    return torch.arange(N) % 3


def test_self_paced(scores: Tensor, labels: Tensor) -> None:
    losses = F.cross_entropy(scores, labels, reduction="none")
    for threshold in (0.5, 1.0, 2.0, 100.0):
        easy = [float(v) for v in losses if v < threshold]
        assert float(_ala_self_paced.chosen(losses, threshold)) == pytest.approx(sum(easy) / len(easy))
    assert float(_ala_self_paced.chosen(losses, 0.0)) == 0
    # The choice minimises the sum of v (loss - threshold) over all v in {0, 1}.
    few = losses[:6]
    sums = {}
    for choice in range(2**6):
        v = torch.tensor([choice >> i & 1 for i in range(6)], dtype=torch.float64)
        sums[choice] = float(v @ (few - 1.0))
    best = min(sums, key=sums.__getitem__)
    assert [bool(best >> i & 1) for i in range(6)] == (few < 1.0).tolist()


def test_self_paced_threshold_grows() -> None:
    assert _ala_self_paced.threshold(2.0, 0.0) == 2
    assert _ala_self_paced.threshold(2.0, 0.049) == 2
    assert _ala_self_paced.threshold(2.0, 0.5) == pytest.approx(2 * 1.3**10)
    assert _ala_self_paced.median(torch.tensor([3.0, 1.0, 2.0])) == 2


@pytest.mark.parametrize("ease", [0.0, 0.7, 5.0])
def test_large_margin(ease: float, labels: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(C, D, generator=generator, dtype=torch.float64, requires_grad=True)
    found = large_margin_logits(x, w, labels, ease)
    obtuse = 0
    for i in range(N):
        for c in range(C):
            plain = float((x[i] @ w[c]).detach())
            if c != labels[i]:
                assert found[i, c].item() == pytest.approx(plain)
                continue
            size = float(x[i].detach().norm() * w[c].detach().norm())
            angle = math.acos(plain / size)
            k = math.floor(2 * angle / math.pi)
            obtuse += k
            psi = (-1) ** k * math.cos(2 * angle) - 2 * k
            expected = (ease * size * math.cos(angle) + size * psi) / (1 + ease)
            assert found[i, c].item() == pytest.approx(expected)
    assert 0 < obtuse < N
    assert torch.autograd.gradcheck(lambda a, b: large_margin_logits(a, b, labels, ease), (x, w))


def test_large_margin_is_plain_at_first_and_without_features(labels: Tensor) -> None:
    x, w = torch.randn(N, D, dtype=torch.float64), torch.randn(C, D, dtype=torch.float64)
    torch.testing.assert_close(large_margin_logits(x, w, labels, 1e12), x @ w.T)
    assert not large_margin_logits(0 * x, w, labels, 0.0).any()
    assert _ala_large_margin.ease(0.0) == 1000
    assert _ala_large_margin.ease(0.25) == pytest.approx(1.86, abs=0.01)
    assert _ala_large_margin.ease(1.0) < 1e-5
    assert _ala_large_margin.ease(1.0, 5.0) == 5


def test_pairwise_auc_roc(scores: Tensor, labels: Tensor) -> None:
    each = []
    for c in range(3):
        pairs = [
            max(0.0, 1 - float(scores[i, c] - scores[j, c]))
            for i in range(N)
            for j in range(N)
            if labels[i] == c and labels[j] != c
        ]
        each.append(sum(pairs) / len(pairs))
    assert float(pairwise_auc_roc(scores, labels)) == pytest.approx(sum(each) / 3)
    assert float(pairwise_auc_roc(scores, torch.zeros(N, dtype=torch.int64))) == 0
    perfect = 10 * F.one_hot(labels, C).double()
    assert float(pairwise_auc_roc(perfect, labels)) == 0


def test_area_under_precision_recall(scores: Tensor, labels: Tensor) -> None:
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    loss = AreaUnderPrecisionRecall(shares, 3)
    nn.init.normal_(loss.threshold, generator=torch.Generator().manual_seed(2))
    loss.multiplier.uniform_(0, 2, generator=torch.Generator().manual_seed(3))

    def log2(z: float) -> float:
        return math.log2(1 + math.exp(-z))

    total, violations = 0.0, torch.zeros(C, 3, dtype=torch.float64)
    for c in range(C):
        for k in range(3):
            pi = float(shares[c])
            alpha = pi + (1 - pi) * (k + 1) / 4
            b = loss.threshold[c, k].item()
            missed = sum(log2(float(scores[i, c]) - b) for i in range(N) if labels[i] == c) / N
            false = sum(log2(b - float(scores[i, c])) for i in range(N) if labels[i] != c) / N
            violations[c, k] = alpha * false + (1 - alpha) * (missed - pi)
            total += missed + float(loss.multiplier[c, k] * violations[c, k])
    found = loss(scores, labels)
    assert found.item() == pytest.approx(total / (3 * C))
    before = loss.multiplier.clone()
    loss.ascend(0.5)
    torch.testing.assert_close(loss.multiplier, (before + 0.5 * violations).clamp_min(0))
    loss.ascend(1e6)
    assert bool((loss.multiplier >= 0).all())


def test_precision_holds_where_nothing_is_violated() -> None:
    """With the step function for the surrogate the constraint is the precision's."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        positive = torch.rand(30, generator=generator) < 0.3
        chosen = torch.rand(30, generator=generator) < 0.5
        pi = positive.double().mean()
        hit, false = (positive & chosen).double().mean(), (~positive & chosen).double().mean()
        missed = pi - hit
        for alpha in (0.35, 0.6):
            violation = alpha * false + (1 - alpha) * (missed - pi)
            precision = hit / (hit + false)
            assert (float(violation) <= 1e-12) == (float(precision) >= alpha - 1e-12)


def test_bandit() -> None:
    confusion = -torch.tensor([[0.8, 0.15, 0.05], [0.2, 0.7, 0.1], [0.04, 0.06, 0.9]]).log()
    likeness = {(0, 1): 0.35, (0, 2): 0.09, (1, 2): 0.16}
    mean = sum(likeness.values()) / 3
    direction = _ala_bandit.confusing_pairs(confusion)
    for (i, j), value in likeness.items():
        assert direction[i, j] == direction[j, i] == (1 if value > mean else -1)
    assert not direction.diagonal().any()
    phi = torch.eye(3)
    for _ in range(30):
        phi = _ala_bandit.moved(phi, confusion, 0.1)
    torch.testing.assert_close(phi, torch.eye(3) + direction)
