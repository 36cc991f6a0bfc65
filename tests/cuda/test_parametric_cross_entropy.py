from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, DRY, placed, rows
from on_device import check_operator as check_exactly
from torch import Tensor

from lossmeta.ops import debug, parametric_cross_entropy
from lossmeta.ops.parametric_cross_entropy import _operator

pytestmark = pytest.mark.cuda


def check_operator(*args: object) -> None:
    """The gradient holds e^-z, so that it is off by the rounding of z, a sum over the classes."""
    check_exactly(*args, bounds=lambda dtype: 2e-5 * (dtype != torch.float64))  # type: ignore[arg-type]


# Few classes; several parts of the losses and of the gradient of Phi; a warp a row, packed and not; classes strided.
SHAPES = [(128, 10), (9000, 10), (600, 6), (rows(4096), 1000), (300, 101), (8, 100, 33)]


def labels_of(kind: str, shape: tuple[int, ...], classes: int) -> Tensor:
    labels = torch.randint(classes, shape)
    if kind == "skewed":
        labels = torch.where(torch.rand(shape) < 0.9, 1 % classes, labels)
    return torch.full(shape, classes - 1) if kind == "one class" else labels


def logits_of(*shape: int) -> Tensor:
    return (2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def phi_of(*shape: int) -> Tensor:
    phi = torch.eye(shape[-1], dtype=torch.float64) + 0.1 * torch.randn(shape, dtype=torch.float64)
    return phi.requires_grad_()


@pytest.mark.parametrize("kind", ["random", "skewed", "one class"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_labels(shape: tuple[int, ...], kind: str) -> None:
    classes = shape[1]
    labels = labels_of(kind, (shape[0], *shape[2:]), classes)
    labels.view(-1)[::7] = -100
    weight = torch.rand(classes, dtype=torch.float64) + 0.5
    reduction = {"random": 1, "skewed": 2, "one class": 0}[kind]
    check_operator(
        _operator,
        logits_of(*shape),
        labels,
        phi_of(classes, classes),
        weight,
        -100,
        kind != "one class",
        reduction,
    )


@pytest.mark.parametrize("classes", [101, 104])
def test_misaligned(classes: int) -> None:
    """``logits[1:]``: no row starts at a multiple of 16 bytes, or only some do."""
    labels, phi = torch.randint(classes, (300,)), phi_of(classes, classes)

    class Sliced:
        def __call__(self, x: Tensor, *others: object) -> object:
            return _operator(x.flatten()[1 : 1 + 300 * classes].view(300, classes), *others)

        @staticmethod
        def reference(x: Tensor, *others: object) -> object:
            return _operator.reference(x.flatten()[1 : 1 + 300 * classes].view(300, classes), *others)

    check_operator(Sliced(), logits_of(301, classes), labels, phi, None, -100, True, 1)  # type: ignore[arg-type]


def test_models() -> None:
    check_operator(
        _operator, logits_of(4, 300, 12), torch.randint(12, (4, 300)), phi_of(4, 12, 12), None, -100, True, 1
    )


@pytest.mark.parametrize(
    "shape", [(33, 10), (17, 1001), (8, 4100), (8, 4099), (5, 40, 7), (rows(64), 50257)], ids=str
)
def test_a_row_of_phi_for_each_sample(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, dtype=torch.float64).softmax(1).requires_grad_()
    check_operator(_operator, logits_of(*shape), None, q, None, -100, True, 1)


def test_a_block_for_each_row() -> None:
    classes = 4100 if not DRY else 300
    check_operator(
        _operator,
        logits_of(20, classes),
        torch.randint(classes, (20,)),
        phi_of(classes, classes),
        None,
        -100,
        False,
        1,
    )


@pytest.mark.slow
def test_more_elements_than_an_int32_counts() -> None:
    """17,000 × 128,256 in bfloat16, with a row of Phi each; judged by some rows, one of them around element 2^31."""
    n, classes = (17_000, 128_256) if not DRY else (40, 300)
    if not DRY and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory on the GPU")
    x = torch.randn(n, classes, dtype=torch.bfloat16, device=DEVICE)
    q = torch.rand(n, classes, dtype=torch.bfloat16, device=DEVICE)
    q /= classes
    middle = 2**31 // classes if not DRY else n // 2
    chosen = torch.tensor([0, 1, middle - 1, middle, middle + 1, n - 2, n - 1], device=DEVICE)
    leaf = x.requires_grad_()
    loss = _operator(leaf, None, q, None, -100, True, 0)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    few = x.detach()[chosen].double().requires_grad_()
    expected = _operator.reference(few, None, q[chosen].double(), None, -100, True, 0)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), few)
    torch.testing.assert_close(loss[chosen].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient[chosen].double(), expected_gradient, rtol=1e-2, atol=1e-9)
    assert gradient.isfinite().all()


def test_no_memory_for_parts_that_are_not_there() -> None:
    """The gradient of a large Phi needs room for itself, not for a second one."""
    classes = 8000 if not DRY else 100
    x, y, phi = placed(
        (
            torch.randn(64, classes).requires_grad_(),
            torch.randint(classes, (64,)),
            torch.eye(classes).requires_grad_(),
        )
    )
    loss = parametric_cross_entropy(x, y, phi)
    if DRY:
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(loss, phi)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * phi.nbytes


@pytest.mark.skipif(DRY, reason="the CPU refuses a bad label")
def test_bad_label() -> None:
    logits = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    target, phi = torch.tensor([0, 7, 1], device=DEVICE), torch.eye(5, device=DEVICE)
    loss = parametric_cross_entropy(logits, target, phi, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(loss.nan_to_num().sum(), logits)
    assert grad[1].abs().max() == 0
    with (
        debug(),
        pytest.raises(ValueError, match=r"labels must lie in \[0, 5\), got 7 at index 1"),
    ):
        parametric_cross_entropy(logits, target, phi)
