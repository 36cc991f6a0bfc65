from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from lossmeta.losses import ForwardCorrectedLoss, anchor_transition, gold_transition

FLIPS = torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.75, 0.25], [0.5, 0.0, 0.5]])


# ---- The loss.


def test_does_not_lose_small_probabilities() -> None:
    """Where the product of softmax and T is 0 in float32."""
    x = torch.tensor([[300.0, 0.0, 100.0]], requires_grad=True)
    loss = ForwardCorrectedLoss(torch.eye(3))(x, torch.tensor([1]))
    torch.testing.assert_close(loss, F.cross_entropy(x, torch.tensor([1])))
    only_from_the_third = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.25, 0.75]])
    loss = ForwardCorrectedLoss(only_from_the_third)(x, torch.tensor([1]))
    assert loss.item() == pytest.approx(200 - torch.tensor(0.25).log().item())


def test_a_label_that_no_class_gets_costs_infinitely_much() -> None:
    never = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    x = torch.zeros(2, 2, requires_grad=True)
    loss = ForwardCorrectedLoss(never, reduction="none")(x, torch.tensor([1, 0]))
    assert loss.tolist() == [torch.inf, 0]
    assert not torch.autograd.grad(loss.sum(), x)[0].isnan().any()


def test_the_best_model_for_wrong_labels_is_the_best_for_right_ones() -> None:
    """Theorem 2 of Patrini et al.: at the true posterior the corrected loss of noisy labels is stationary."""
    posterior = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    noisy = (posterior @ FLIPS.double())[0]
    x = posterior.log().requires_grad_()
    criterion = ForwardCorrectedLoss(FLIPS.double(), reduction="none")
    risk = (noisy * criterion(x.expand(3, 3), torch.arange(3))).sum()
    torch.testing.assert_close(torch.autograd.grad(risk, x)[0], torch.zeros(1, 3, dtype=torch.float64))


def test_few_and_many_samples_are_the_same() -> None:
    """The logarithm is that of the columns of the labels, or of the matrix."""
    x, y = torch.randn(50, 3, dtype=torch.float64), torch.randint(3, (50,))
    criterion = ForwardCorrectedLoss(FLIPS, reduction="none")
    one_by_one = torch.cat([criterion(a[None], b[None]) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(criterion(x, y), one_by_one)


def test_keeps_its_matrix() -> None:
    given = FLIPS.clone()
    criterion = ForwardCorrectedLoss(given)
    given.zero_()
    assert torch.equal(criterion.transition, FLIPS)
    other = ForwardCorrectedLoss(torch.eye(3))
    other.load_state_dict(criterion.state_dict())
    assert list(criterion.state_dict()) == ["transition"]
    assert torch.equal(other.transition, FLIPS)
    assert repr(criterion) == (
        "ForwardCorrectedLoss(num_classes=3, weighted=False, ignore_index=-100, reduction='mean')"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_matrices_of_any_precision(dtype: torch.dtype) -> None:
    rows = torch.rand(40, 40, dtype=torch.float64).softmax(1).to(dtype)
    x, y = torch.randn(5, 40), torch.randint(40, (5,))
    expected = F.nll_loss((x.double().softmax(1) @ rows.double()).log(), y)
    assert ForwardCorrectedLoss(rows)(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("transition", "kind", "message"),
    [
        ([[1.0]], TypeError, "transition must be a tensor, got list"),
        (
            torch.eye(2, dtype=torch.int64),
            ValueError,
            "transition must be float32, float64, bfloat16 or float16, got int64",
        ),
        (torch.ones(2, 3) / 3, ValueError, "transition must be [C, C] with C at least 1, got [2, 3]"),
        (torch.ones(2), ValueError, "transition must be [C, C] with C at least 1, got [2]"),
        (torch.ones(0, 0), ValueError, "transition must be [C, C] with C at least 1, got [0, 0]"),
        (
            FLIPS.T.contiguous(),
            ValueError,
            "rows of transition must be at least 0 and sum to 1, got a least value of 0 and a sum of 1.1 in row 0; "
            "divide each by its sum",
        ),
        (
            torch.tensor([[1.0, 0.0], [1.5, -0.5]]),
            ValueError,
            "rows of transition must be at least 0 and sum to 1, got a least value of -0.5 and a sum of 1 in row 1; "
            "divide each by its sum",
        ),
        (
            torch.tensor([[1.0, 0.0], [torch.nan, 1.0]]),
            ValueError,
            "rows of transition must be at least 0 and sum to 1, got a least value of nan and a sum of nan in row 1; "
            "divide each by its sum",
        ),
        (
            torch.eye(2, device="meta"),
            ValueError,
            "transition must hold values, got a tensor on the meta device",
        ),
    ],
)
def test_refuses_what_is_no_transition(transition, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape('ForwardCorrectedLoss: ' + message)}$"):
        ForwardCorrectedLoss(transition)


def test_knows_its_classes() -> None:
    message = (
        "ForwardCorrectedLoss: logits must have 3 classes in dimension 1, as transition has, got [2, 4, 5]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ForwardCorrectedLoss(FLIPS)(torch.zeros(2, 4, 5), torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^ForwardCorrectedLoss: weight must be \[3\], got \[4\]$"):
        ForwardCorrectedLoss(FLIPS, weight=torch.ones(4))


# ---- Estimates.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gold_transition_is_the_mean_of_each_class(dtype: torch.dtype) -> None:
    said = torch.randn(60, 4, dtype=torch.float64).softmax(1).to(dtype)
    labels = torch.randint(4, (60,))
    found = gold_transition(said, labels)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rows = [
        sum((p.double() for p, y in zip(said, labels, strict=True) if y == c), torch.zeros(4).double())
        for c in range(4)
    ]
    expected = torch.stack([row / row.sum() for row in rows])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    ForwardCorrectedLoss(found)
    assert torch.equal(gold_transition(said, labels.to(torch.uint8)), found)


def test_gold_transition_finds_the_flips() -> None:
    """A model that knows the noisy posterior says each row of T of a sample whose class is beyond doubt."""
    classes = torch.arange(3).repeat(5)
    torch.testing.assert_close(gold_transition(FLIPS[classes], classes), FLIPS)
    torch.testing.assert_close(anchor_transition(FLIPS[torch.tensor([0, 0, 1, 2, 1])])[1], FLIPS[1])


def test_a_class_without_clean_samples_is_taken_to_be_right() -> None:
    said = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])
    message = (
        "gold_transition: labels should hold every class, got none of [1]; the identity's rows stand in, as if these "
        "classes were labelled rightly; add clean samples of them"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        found = gold_transition(said, torch.tensor([0, 2]))
    assert caught[0].filename == __file__
    assert found.tolist() == [[0.5, 0.25, 0.25], [0, 1, 0], [0.25, 0.25, 0.5]]
    with pytest.warns(UserWarning, match=r"got none of \[0, 1, 2\]"):
        found = gold_transition(said[:0], torch.zeros(0, dtype=torch.int64))
    assert torch.equal(found, torch.eye(3))


def test_estimates_differentiate_nothing_and_change_nothing() -> None:
    logits = torch.randn(20, 3, requires_grad=True)
    said, labels = logits.softmax(1), torch.arange(20) % 3
    before = said.detach().clone()
    assert not gold_transition(said, labels).requires_grad
    assert not anchor_transition(said).requires_grad
    assert torch.equal(said, before)


def test_anchor_transition_takes_the_surest_sample() -> None:
    said = torch.randn(101, 4, dtype=torch.float64).softmax(1)
    found = anchor_transition(said)
    for c in range(4):
        torch.testing.assert_close(found[c], max(said, key=lambda p, c=c: p[c].item()))
    found = anchor_transition(said, 0.97)
    for c in range(4):
        rank = (said[:, c] <= found[c, c] + 1e-12).sum().item()
        assert rank == 98  # of 101, the first that at least 97 % do not exceed
    ForwardCorrectedLoss(found)
    assert torch.equal(anchor_transition(said[:1], 0.01), said[:1].expand(4, 4) / said[:1].sum())


def test_estimates_do_not_depend_on_the_defaults_of_torch() -> None:
    said, labels = torch.randn(20, 3).softmax(1), torch.arange(20) % 2
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with pytest.warns(UserWarning, match=r"got none of \[2\]"):
            gold = gold_transition(said, labels)
        anchor = anchor_transition(said)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert gold.device.type == anchor.device.type == "cpu"
    assert gold.dtype == anchor.dtype == torch.float32


SAID = torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([[1.0]], torch.zeros(1)), TypeError, "probabilities must be a tensor, got list"),
        ((SAID, [0, 1]), TypeError, "labels must be a tensor, got list"),
        ((SAID, torch.zeros(2)), ValueError, "labels must be int64 or uint8, got float32"),
        ((SAID, torch.zeros(3, dtype=torch.int64)), ValueError, "labels must be [2], got [3]"),
        ((SAID, torch.tensor([0, 2])), ValueError, "labels must lie in [0, 2), got 2 at index 1"),
        ((SAID, torch.tensor([-100, 1])), ValueError, "labels must lie in [0, 2), got -100 at index 0"),
        (
            (SAID[0], torch.tensor([0])),
            ValueError,
            "probabilities must be [N, C] with C at least 1, got [2]",
        ),
        (
            (torch.tensor([[2.0, 1.0]]), torch.tensor([0])),
            ValueError,
            "rows of probabilities must be at least 0 and sum to 1, got a least value of 1 and a sum of 3 in row 0; of "
            "logits take .softmax(1)",
        ),
        (
            (SAID, torch.zeros(2, dtype=torch.int64, device="meta")),
            ValueError,
            "labels and probabilities must be on the same device, got meta and cpu; move one with .to()",
        ),
    ],
)
def test_gold_transition_refuses(arguments, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape('gold_transition: ' + message)}$"):
        gold_transition(*arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([[1.0]],), TypeError, "probabilities must be a tensor, got list"),
        ((SAID[:0],), ValueError, "probabilities must hold at least one sample, got [0, 2]"),
        ((SAID, 0), ValueError, "quantile must lie in (0, 1], got 0"),
        ((SAID, 97), ValueError, "quantile must lie in (0, 1], got 97"),
        ((SAID, torch.nan), ValueError, "quantile must lie in (0, 1], got nan"),
        ((SAID, "max"), TypeError, "quantile must be a number, got str"),
        (
            (-SAID,),
            ValueError,
            "rows of probabilities must be at least 0 and sum to 1, got a least value of -0.5 and a sum of -1 in row "
            "0; of logits take .softmax(1)",
        ),
    ],
)
def test_anchor_transition_refuses(arguments, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape('anchor_transition: ' + message)}$"):
        anchor_transition(*arguments)
