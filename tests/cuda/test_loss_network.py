from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, DRY, DTYPES, check_operator, placed, rows
from torch import Tensor

from lossmeta.ops import loss_network
from lossmeta.ops.loss_network import LINKS, _operator

pytestmark = pytest.mark.cuda

# Rows of the table's kernels: by 8 and by 32 lanes in registers, with 8 and 32 slots; streamed in packs and one by one.
SHAPES = [
    (300, 20),
    (rows(512), 200),
    (rows(300), 365),
    (rows(256), 1000),
    (rows(64), 4096),
    (rows(64), 5001),
]
HALF = (torch.bfloat16, torch.float16)


def inputs(n: int, classes: int, width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    scale = 0.5 * width**-0.5
    weights = [
        0.35 * torch.randn(width, 2, dtype=torch.float64),
        scale * torch.randn(width, width, dtype=torch.float64),
        scale * torch.randn(1, width, dtype=torch.float64),
    ]
    labels = torch.randint(classes, (n,))
    labels[::9] = -100
    logits = (2 * torch.randn(n, classes, dtype=torch.float64)).requires_grad_()
    return logits, labels, [w.requires_grad_() for w in weights]


def arguments(n: int, classes: int, width: int, table_size: int) -> tuple[object, ...]:
    pred, labels, weights = inputs(n, classes, width)
    return pred, labels, *weights, None, LINKS["softmax"], True, 0.01, 10.0, False, -100, table_size


def table_bound(dtype: torch.dtype) -> float:
    """The table's slope is off by some 1e-8 of the largest for these weights; its derivatives by more."""
    return 1e-5 if dtype == torch.float64 else 1e-3


def exact_bound(dtype: torch.dtype) -> float:
    """The vectors' exponential and logarithm are off by some 2^-22."""
    return 1e-5 * (dtype != torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [7, 40, 100])
def test_table(width: int, shape: tuple[int, int]) -> None:
    check_operator(_operator, *arguments(*shape, width, 512), bounds=table_bound)


@pytest.mark.parametrize("shape", [(300, 20), (rows(64), 1000)], ids=str)
def test_table_of_the_widest_network(shape: tuple[int, int]) -> None:
    dtypes = (torch.float32, *HALF)  # float64 takes at most 256
    check_operator(_operator, *arguments(*shape, 512, 64), bounds=table_bound, dtypes=dtypes)


@pytest.mark.parametrize("shape", [(300, 20), (rows(64), 200), (rows(16), 1101)], ids=str)
@pytest.mark.parametrize("width", [7, 40, 100, 512])
def test_exact(width: int, shape: tuple[int, int]) -> None:
    dtypes = (torch.float32, *HALF) if width == 512 else DTYPES
    n = min(shape[0], 6) if DRY and width == 512 else shape[0]
    check_operator(
        _operator,
        *arguments(n, shape[1], width, 0),
        dtypes=dtypes,
        bounds=exact_bound,
    )


@pytest.mark.parametrize("link", LINKS)
def test_dense_targets(link: str) -> None:
    pred, _, weights = inputs(70, 33, 40)
    target = torch.rand(70, 33, dtype=torch.float64)
    check_operator(
        _operator, pred, target, *weights, None, LINKS[link], True, 0.01, 10.0, True, -100, 0,
        bounds=exact_bound,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(300, 20), (rows(1024), 1000)], ids=str)
@pytest.mark.parametrize("table", [512, 0])
def test_labels_on_their_own(table: int, shape: tuple[int, int]) -> None:
    pred, _, weights = inputs(*shape, 40)
    labels = torch.randint(2, shape)
    labels.view(-1)[::9] = -100
    check_operator(
        _operator, pred, labels, *weights, None, LINKS["sigmoid"], True, 0.01, 10.0, False, -100, table,
        bounds=table_bound if table else exact_bound,
    )  # fmt: skip


def test_relu() -> None:
    pred, labels, weights = inputs(300, 20, 40)
    # At a kink the two sides differ: float64 and float32 alone keep to one side of it.
    check_operator(
        _operator, pred, labels, *weights, None, LINKS["softmax"], False, 0.0, 1.0, True, -100, 0,
        dtypes=(torch.float64,),
    )  # fmt: skip


def test_misaligned() -> None:
    class Sliced:
        def __call__(self, x: Tensor, *others: object) -> object:
            return _operator(x[1:], *others)

        @staticmethod
        def reference(x: Tensor, *others: object) -> object:
            return _operator.reference(x[1:], *others)

    for classes, table in ((101, 512), (101, 0), (1001, 512)):
        pred, labels, *rest = arguments(61, classes, 40, table)
        check_operator(Sliced(), pred, labels[1:], *rest, bounds=table_bound)  # type: ignore[arg-type, index]


def test_a_batch_of_networks() -> None:
    """B > 1, by vmap."""
    pred, labels, weights = inputs(100, 20, 40)
    x, y, *w = placed((pred, labels, *weights), torch.float32)
    stacked = [torch.stack([p.detach(), 0.5 * p.detach(), -p.detach()]) for p in w]
    loss, slope = torch.func.vmap(lambda *p: loss_network(x.detach(), y, *p, link="softmax"))(*stacked)
    for k in range(3):
        one = loss_network(x.detach(), y, *(p[k] for p in stacked), link="softmax")
        torch.testing.assert_close((loss[k], slope[k]), one)


def test_half_precision_keeps_few_cotangents() -> None:
    """Backward in half precision takes much less memory than its cotangents in float32 would."""
    n, classes = (4096, 32_000) if not DRY else (50, 100)
    w = placed(inputs(1, 2, 8)[2], torch.float32)
    x = torch.randn(n, classes, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(classes, (n,), device=DEVICE)
    loss, _ = loss_network(x, y, *w, link="softmax")
    if DRY:
        loss.sum().backward()
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(loss.sum(), [x, *w])
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < x.nbytes + 0.5 * x.numel() * 4, taken


@pytest.mark.skipif(DRY, reason="the CPU refuses a bad label")
def test_bad_label_is_nan_without_gradient() -> None:
    for samples in (4, 300):
        pred, target, weights = inputs(samples, 20, 7)
        target[1] = 20
        x, y, *w = placed((pred, target, *weights), torch.float32)
        loss, slope = loss_network(x, y, *(p.detach() for p in w), link="softmax")
        assert loss[1].isnan()
        assert slope[1].isnan().all()
        assert loss[2].isfinite()
        (g,) = torch.autograd.grad(slope.sum(), x)
        assert torch.equal(g[1], torch.zeros_like(g[1]))
