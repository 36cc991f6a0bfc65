"""The parametric cross-entropy where a row of Phi is mixed for each sample: smoothing, soft targets, no matrix."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import (
    assert_close,
    check_compiles,
    check_gradients,
    check_half,
    check_transforms,
    with_gradients,
)
from peak_memory import peak_memory
from torch import Tensor

from lossmeta.ops import LowRankPhi, parametric_cross_entropy
from lossmeta.ops.parametric_cross_entropy import _sums

REDUCTIONS = ["none", "mean", "sum"]
# More samples than classes, fewer, and other dimensions.
SHAPES = [(9, 4), (3, 23), (2, 6, 3), (2, 21, 2, 2)]
IGNORED = 1000


def formula(
    logits: Tensor,
    target: Tensor,
    phi: Tensor,
    weight: Tensor | None,
    smoothing: float,
    sigmoid: bool,
    reduction: str,
) -> Tensor:
    """ALA Eq. 6 with a matrix and targets as ``F.cross_entropy`` smooths and weighs them, from PyTorch alone."""
    classes = logits.shape[1]
    f = logits.log_softmax(1).movedim(1, -1)
    w = torch.ones(classes, dtype=f.dtype) if weight is None else weight
    if target.is_floating_point():
        y, counted = target.movedim(1, -1), None
    else:
        kept = target != IGNORED
        y = F.one_hot(target.where(kept, 0), classes).to(f.dtype)
        counted = w[target.where(kept, 0)] * kept
    y = (1 - smoothing) * y + smoothing / classes
    s = ((y * w) @ phi * f).sum(-1)
    if sigmoid:
        a = torch.ones_like(s) if weight is None else (y * w).sum(-1) / y.sum(-1)
        loss = -a / (1 + torch.exp(-s / a))
    else:
        loss = -s
    if counted is None:
        counted = torch.ones_like(loss)
    else:
        loss = loss * (target != IGNORED)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


def low_rank(classes: int, rank: int, *batch: int) -> LowRankPhi:
    return LowRankPhi(
        torch.randn(*batch, classes, dtype=torch.float64, requires_grad=True),
        torch.randn(*batch, classes, rank, dtype=torch.float64, requires_grad=True),
        torch.randn(*batch, classes, rank, dtype=torch.float64, requires_grad=True),
    )


def targets(kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "probabilities":
        return torch.rand(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    labels.view(-1)[1] = IGNORED
    return labels


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("form", ["matrix", "matrix without gradient", "identity", "diagonal", "low rank"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_is_the_matrix(shape: tuple[int, ...], form: str, kind: str) -> None:
    classes = shape[1]
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = targets(kind, shape)
    phi = low_rank(classes, 0 if form == "diagonal" else 3)
    parts = [*phi] if form in ("low rank", "diagonal") else []
    if form.startswith("matrix"):
        parts = [phi.dense().detach().requires_grad_(form == "matrix")]

    def given(parts: list[Tensor]) -> Any:
        return None if not parts else parts[0] if len(parts) == 1 else LowRankPhi(*parts)

    def dense(parts: list[Tensor]) -> Tensor:
        if not parts:
            return torch.eye(classes, dtype=torch.float64)
        return parts[0] if len(parts) == 1 else parts[0].diag() + parts[1] @ parts[2].T

    ignore_index = IGNORED if kind == "indices" else -100
    for sigmoid, weight, smoothing, reduction in itertools.product(
        (True, False), (None, torch.rand(classes, dtype=torch.float64) + 0.1), (0.0, 0.2, 1.0), REDUCTIONS
    ):

        def loss(
            x: Tensor,
            y: Tensor,
            *p: Tensor,
            s: Any = sigmoid,
            w: Any = weight,
            e: Any = smoothing,
            r: Any = reduction,
        ) -> Tensor:
            return parametric_cross_entropy(
                x,
                y,
                given([*p]),
                activation="sigmoid" if s else "identity",
                weight=w,
                ignore_index=ignore_index,
                label_smoothing=e,
                reduction=r,
            )

        def expected(
            x: Tensor,
            y: Tensor,
            *p: Tensor,
            s: Any = sigmoid,
            w: Any = weight,
            e: Any = smoothing,
            r: Any = reduction,
        ) -> Tensor:
            return formula(x, y, dense([*p]), w, e, s, r)

        assert_close(
            with_gradients(loss, logits, target, *parts), with_gradients(expected, logits, target, *parts)
        )


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("form", ["matrix", "low rank"])
@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 3, 11)], ids=str)
def test_batch_of_models_is_each_model_alone(shape: tuple[int, ...], form: str, kind: str) -> None:
    models, samples, classes = shape
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    phi = low_rank(classes, 2, models)
    parts = [*phi] if form == "low rank" else [phi.dense().detach().requires_grad_()]
    target = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    if kind == "indices":
        target = torch.randint(classes, (models, samples))
        target[1, 2] = IGNORED
    for weight, smoothing, reduction in itertools.product(
        (None, torch.rand(classes, dtype=torch.float64)), (0.0, 0.2), REDUCTIONS
    ):
        options: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        if kind == "indices":
            options["ignore_index"] = IGNORED

        def loss(x: Tensor, y: Tensor, *p: Tensor, o: Any = options) -> Tensor:
            return parametric_cross_entropy(x, y, p[0] if len(p) == 1 else LowRankPhi(*p), **o)

        def alone(x: Tensor, y: Tensor, *p: Tensor, loss: Any = loss) -> Tensor:
            return torch.stack([loss(x[b], y[b], *(t[b] for t in p)) for b in range(models)])

        assert_close(
            with_gradients(loss, logits, target, *parts), with_gradients(alone, logits, target, *parts)
        )


@pytest.mark.parametrize(
    ("target", "weight"),
    [
        ([1.0, 0.0, 0.0], [0.0, 1.0, 1.0]),  # a class of weight 0
        ([0.0, 0.0, 0.0], [1.0, 1.0, 2.0]),
        ([1.0, -1.0, 0.0], [1.0, 1.0, 2.0]),
        ([0.5, 0.5, 0.0], [1.0, -1.0, 1.0]),
        ([1.0, 1.0, 1.0], [1e-300, 0.0, 0.0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("models", [False, True])
def test_identity_needs_no_mean_weight(
    target: list[float], weight: list[float], smoothing: float, reduction: str, models: bool
) -> None:
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([target, [0.2, 0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {
        "weight": torch.tensor(weight, dtype=torch.float64),
        "label_smoothing": smoothing,
        "reduction": reduction,
    }
    identity = torch.eye(3, dtype=torch.float64)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        if not models:
            return parametric_cross_entropy(x, y, identity, activation="identity", **options)
        return parametric_cross_entropy(x[None], y[None], identity[None], activation="identity", **options)[0]

    assert_close(
        with_gradients(ours, logits, y),
        with_gradients(lambda x, y: F.cross_entropy(x, y, **options), logits, y),
    )


@pytest.mark.parametrize("phi", [torch.eye(3, dtype=torch.float64), None], ids=["matrix", "identity"])
@pytest.mark.parametrize("samples", [2, 5])
def test_signed_weights_of_smoothed_labels(phi: Tensor | None, samples: int) -> None:
    """Where the mean weight of a smoothed label is 0."""
    weight = torch.tensor([1.0, -7.0, 0.0], dtype=torch.float64)
    logits = torch.randn(samples, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(samples) % 2
    options: dict[str, Any] = {"weight": weight, "label_smoothing": 1 / 3}
    assert 2 / 3 * weight[0] + weight.sum() / 9 == 0
    assert_close(
        with_gradients(
            lambda x: parametric_cross_entropy(x, labels, phi, activation="identity", **options), logits
        ),
        with_gradients(lambda x: F.cross_entropy(x, labels, **options), logits),
    )


def test_weights_of_one_are_no_weights() -> None:
    logits, phi = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    soft = torch.tensor([[0, 0, 0], [1, 0, 0], [2, 1, 1], [-1, 1, 0]], dtype=torch.float64)
    for y, smoothing in ((soft, 0.0), (soft, 0.1), (torch.tensor([0, 1, 2, 0]), 0.1)):
        assert_close(
            *(
                with_gradients(
                    lambda x, y, w=w, e=smoothing: parametric_cross_entropy(
                        x, y, phi, weight=w, label_smoothing=e, reduction="none"
                    ),
                    logits.requires_grad_(),
                    y.requires_grad_() if y.is_floating_point() else y,
                )
                for w in (None, torch.ones(3, dtype=torch.float64))
            )
        )


def test_a_target_without_weight_has_no_loss() -> None:
    logits = torch.randn(1, 3, requires_grad=True)
    soft = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    loss, *gradients = with_gradients(
        lambda x, y: parametric_cross_entropy(x, y, torch.eye(3), weight=torch.tensor([0.0, 1.0, 1.0])),
        logits,
        soft,
    )
    assert loss == 0
    assert not gradients[0].any()
    assert gradients[1].isfinite().all()


@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("form", ["identity", "matrix", "low rank"])
def test_masked_class_without_correlation_contributes_nothing(form: str, kind: str, classes: int) -> None:
    masked = 2
    keep = [c for c in range(classes) if c != masked]
    phi = low_rank(classes, 2)
    with torch.no_grad():
        phi.diagonal[masked] = 0
        phi.left[masked] = phi.right[masked] = 0
    parts: list[Tensor] = [*phi] if form == "low rank" else [phi.dense().detach().requires_grad_()]
    parts = [] if form == "identity" else parts
    fewer = [p.detach()[keep] for p in parts]
    if form == "matrix":
        fewer = [fewer[0][:, keep]]
    logits = torch.randn(3, classes, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1])
    soft = torch.rand(3, classes, dtype=torch.float64)
    soft[:, masked] = 0
    # With weight 0 smoothing gives the class nothing either.
    weight = torch.rand(classes, dtype=torch.float64) + 0.1
    weight[masked] = 0
    for smoothing, reduction in itertools.product((0.0, 0.1), REDUCTIONS):

        def loss(x: Tensor, p: Any, y: Tensor, w: Tensor, e: float = smoothing, r: str = reduction) -> Tensor:
            phi = None if not p else p[0] if len(p) == 1 else LowRankPhi(*p)
            # The same share for each class, whatever their number.
            return parametric_cross_entropy(
                x, y, phi, weight=w, label_smoothing=e * x.shape[1] / classes, reduction=r
            )

        x = logits.clone()
        x[:, masked] = -float("inf")
        if kind == "indices":
            renumbered = torch.tensor([0, 2, 1])
            y, y_fewer = labels, renumbered
        else:
            y, y_fewer = soft, soft[:, keep]
        actual = with_gradients(lambda x, *p, y=y: loss(x, p, y, weight), x.requires_grad_(), *parts)
        assert all(t.isfinite().all() for t in actual)
        assert not actual[1][:, masked].any()
        if smoothing == 0:
            expected = with_gradients(
                lambda x, *p, y=y_fewer: loss(x, p, y, weight[keep]),
                logits[:, keep].requires_grad_(),
                *(p.requires_grad_() for p in fewer),
            )
            assert_close(actual[0], expected[0])
            assert_close(actual[1][:, keep], expected[1])
            for a, e in zip(actual[2:], expected[2:], strict=True):
                assert_close(a[keep][:, keep] if form == "matrix" else a[keep], e)


@pytest.mark.parametrize("form", ["identity", "matrix", "low rank"])
@pytest.mark.parametrize("samples", [3, 30])
def test_ignored_samples_may_hold_anything(samples: int, form: str) -> None:
    low = LowRankPhi(*(t.float() for t in low_rank(11, 2)))
    phi: Any = {"identity": None, "matrix": torch.randn(11, 11), "low rank": low}[form]
    logits, labels = torch.randn(samples, 11), torch.randint(11, (samples,))
    labels[1] = -100
    for smoothing, value in itertools.product((0.0, 0.1), (float("nan"), float("inf"), -float("inf"))):
        spoilt = logits.clone()
        spoilt[1] = value
        results = [
            with_gradients(
                lambda x, e=smoothing: parametric_cross_entropy(x, labels, phi, label_smoothing=e),
                x.requires_grad_(),
            )
            for x in (spoilt, logits.clone())
        ]
        assert_close(*results)
        assert not results[0][1][1].any()


def test_labels_of_any_dtype_that_cross_entropy_takes() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 255, 2], dtype=torch.uint8)
    for phi, smoothing in itertools.product((None, torch.eye(3)), (0.0, 0.1)):
        for x, y in ((logits, labels), (logits[0], labels[1])):
            options: dict[str, Any] = {"ignore_index": 255, "label_smoothing": smoothing}
            assert_close(
                parametric_cross_entropy(x, y, phi, activation="identity", **options),
                F.cross_entropy(x, y, **options),
            )
    for dtype in (torch.int8, torch.int16, torch.int32, torch.bool, torch.complex64):
        for phi, smoothing in itertools.product((None, torch.eye(3)), (0.0, 0.1)):
            with pytest.raises(ValueError, match=r"^parametric_cross_entropy: labels must be int64, got "):
                parametric_cross_entropy(logits, labels.to(dtype), phi, label_smoothing=smoothing)


@pytest.mark.parametrize("shape", [(2, 0), (0, 0), (2, 0, 3), (0,)], ids=str)
def test_probabilities_of_no_class(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    for reduction, phi in itertools.product(REDUCTIONS, (None, torch.zeros(0, 0))):
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
        assert_close(
            with_gradients(
                lambda x, p=phi, o=options: parametric_cross_entropy(
                    x, torch.zeros(shape), p, activation="identity", **o
                ),
                x,
            ),
            with_gradients(lambda x, o=options: F.cross_entropy(x, torch.zeros(shape), **o), x),
        )


def test_probabilities_cannot_be_ignored() -> None:
    x = torch.randn(2, 3)
    for phi in (None, torch.eye(3)):
        message = "^parametric_cross_entropy: ignore_index must be negative with probabilities, .*, got 1$"
        with pytest.raises(ValueError, match=message):
            parametric_cross_entropy(x, x.softmax(1), phi, ignore_index=1)
        parametric_cross_entropy(x, x.softmax(1), phi, ignore_index=-1)


LOW_RANK = LowRankPhi(torch.ones(5), torch.ones(5, 2), torch.ones(5, 2))
BAD_FORMS: dict[str, LowRankPhi] = {
    "phi.diagonal must be [C] or [B, C] with C = 5, got [4]": LOW_RANK._replace(diagonal=torch.ones(4)),
    "phi.diagonal must be [C] or [B, C] with C = 5, got []": LOW_RANK._replace(diagonal=torch.ones(())),
    "phi.left must be [C, r] with C = 5, got [5]": LOW_RANK._replace(left=torch.ones(5)),
    "phi.left must be [C, r] with C = 5, got [4, 2]": LOW_RANK._replace(left=torch.ones(4, 2)),
    "phi.right must be [C, r] with C = 5 and the r of phi.left, got [5, 3]": LOW_RANK._replace(
        right=torch.ones(5, 3)
    ),
    "phi.right must be of a floating-point dtype, got torch.int64": LOW_RANK._replace(
        right=torch.ones(5, 2, dtype=torch.int64)
    ),
    "phi.left and logits must be on the same device, got meta and cpu": LOW_RANK._replace(
        left=torch.ones(5, 2, device="meta")
    ),
}


@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
@pytest.mark.parametrize("message", BAD_FORMS, ids=str)
def test_bad_low_rank(message: str, kind: str) -> None:
    target = torch.rand(3, 5) if kind == "probabilities" else torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"^parametric_cross_entropy: ") as caught:
        parametric_cross_entropy(
            torch.randn(3, 5), target, BAD_FORMS[message], label_smoothing=0.1 * (kind == "smoothed")
        )
    assert str(caught.value).startswith(f"parametric_cross_entropy: {message}")


BAD_LABELS = {
    "labels must lie in [0, 5), got 7 at index 1": torch.tensor([0, 7, 1]),
    "labels must have the shape of logits without the class dimension, got [2] for logits [3, 5]": torch.tensor(
        [0, 1]
    ),
    "labels and logits must be on the same device, got meta and cpu": torch.zeros(
        3, dtype=torch.int64, device="meta"
    ),
}


@pytest.mark.parametrize("phi", [None, LOW_RANK, torch.eye(5)], ids=["identity", "low rank", "matrix"])
@pytest.mark.parametrize("message", BAD_LABELS, ids=str)
def test_bad_labels(message: str, phi: Any) -> None:
    with pytest.raises(ValueError, match=r"^parametric_cross_entropy: ") as caught:
        parametric_cross_entropy(torch.randn(3, 5), BAD_LABELS[message], phi, label_smoothing=0.1)
    assert str(caught.value).startswith(f"parametric_cross_entropy: {message}")


@pytest.mark.parametrize("form", ["identity", "matrix", "low rank"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_memory_is_that_of_the_logits(form: str, weighted: bool, smoothing: float) -> None:
    samples, classes = 4, 3000
    phi: Any = {
        "identity": None,
        "matrix": torch.eye(classes),
        "low rank": LowRankPhi(*(torch.randn(s, requires_grad=True) for s in ((classes,), (classes, 4), (classes, 4)))),
    }[form]  # fmt: skip
    weight = torch.rand(classes) if weighted else None
    labels = torch.randint(classes, (samples,))

    def make() -> Any:
        logits = torch.randn(samples, classes, requires_grad=True)
        return lambda: parametric_cross_entropy(
            logits, labels, phi, weight=weight, label_smoothing=smoothing
        ).backward()

    # Some tensors of the size of the logits, and of the factors; one of the matrix's would be 3000 times C.
    assert peak_memory(make) < 4 * classes * 20 * samples


def test_the_sum_of_rows_follows_phi_and_weight() -> None:
    classes = 12
    phi, weight = torch.randn(classes, classes, dtype=torch.float64), torch.rand(classes, dtype=torch.float64)
    logits, labels = torch.randn(3, classes, dtype=torch.float64), torch.tensor([0, 5, 11])

    def check(w: Tensor | None) -> None:
        for _ in range(2):
            actual = parametric_cross_entropy(logits, labels, phi, weight=w, label_smoothing=0.3)
            assert_close(actual, formula(logits, labels, phi, w, 0.3, True, "mean"))

    check(None)
    check(weight)
    check(None)
    phi.mul_(2)
    check(None)
    phi[3] = 1
    check(None)
    check(weight)
    weight.add_(1)
    check(weight)
    weight = weight + 1
    check(weight)
    phi.data = torch.randn(classes, classes, dtype=torch.float64)
    check(weight)
    assert phi in _sums
    phi.requires_grad_()
    with torch.no_grad():
        phi.data.add_(1)
    check(weight)
    with torch.inference_mode():
        phi = torch.randn(classes, classes, dtype=torch.float64)
        check(None)
        phi.add_(1)
        check(None)
    check(None)


def test_second_derivatives() -> None:
    phi = low_rank(5, 2)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    labels, soft = torch.tensor([0, 4, -100]), torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64) + 0.1
    for smoothing in (0.0, 0.1):
        check_gradients(
            lambda x, *p, e=smoothing: parametric_cross_entropy(
                x, labels, LowRankPhi(*p), weight=weight, label_smoothing=e
            ),
            logits,
            *phi,
        )
    check_gradients(lambda x, y: parametric_cross_entropy(x, y, None, weight=weight), logits, soft)
    matrix = phi.dense().detach().requires_grad_()
    check_gradients(
        lambda x, p: parametric_cross_entropy(x, labels, p, weight=weight, label_smoothing=0.1),
        logits,
        matrix,
    )


@pytest.mark.parametrize("form", ["identity", "matrix", "low rank"])
@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
def test_transforms(kind: str, form: str) -> None:
    classes = 5
    low = LowRankPhi(*(t.detach() for t in low_rank(classes, 2)))
    phi: Any = {"identity": None, "matrix": low.dense(), "low rank": low}[form]
    dense = torch.eye(classes, dtype=torch.float64) if form == "identity" else low.dense()
    target = (
        torch.rand(3, classes, dtype=torch.float64)
        if kind == "probabilities"
        else torch.tensor([0, 4, IGNORED])
    )
    weight = torch.rand(classes, dtype=torch.float64) + 0.1
    smoothing = 0.0 if kind == "indices" else 0.2
    ignore_index = -100 if kind == "probabilities" else IGNORED

    def loss(x: Tensor) -> Tensor:
        return parametric_cross_entropy(
            x, target, phi, weight=weight, label_smoothing=smoothing, ignore_index=ignore_index
        )

    check_transforms(
        loss,
        lambda x: formula(x, target, dense, weight, smoothing, True, "mean"),
        torch.randn(3, classes, dtype=torch.float64),
    )


def test_vmap_over_low_rank() -> None:
    phi = LowRankPhi(*(t.detach() for t in low_rank(5, 2, 3)))
    logits, labels = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(5, (3, 4))
    for smoothing in (0.0, 0.1):

        def loss(x: Tensor, y: Tensor, p: LowRankPhi, e: float = smoothing) -> Tensor:
            return parametric_cross_entropy(x, y, p, label_smoothing=e)

        expected = [
            torch.func.grad(loss, (0, 2))(x, y, LowRankPhi(*p))
            for x, y, *p in zip(logits, labels, *phi, strict=True)
        ]
        actual = torch.func.vmap(torch.func.grad(loss, (0, 2)))(logits, labels, phi)
        assert_close(actual[0], torch.stack([g for g, _ in expected]))
        for i in range(3):
            assert_close(actual[1][i], torch.stack([p[i] for _, p in expected]))
        shared = torch.func.vmap(loss, (0, 0, None))(logits, labels, LowRankPhi(*(t[0] for t in phi)))
        assert_close(shared[0], loss(logits[0], labels[0], LowRankPhi(*(t[0] for t in phi))))


def test_compiles() -> None:
    phi = low_rank(5, 2)
    logits, labels = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, -100])
    for smoothing in (0.0, 0.1):
        check_compiles(
            lambda x, *p, e=smoothing: parametric_cross_entropy(x, labels, LowRankPhi(*p), label_smoothing=e),
            logits,
            *phi,
        )
        check_compiles(
            lambda x, e=smoothing: parametric_cross_entropy(x, labels, None, label_smoothing=e), logits
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(9, 50, dtype=torch.float64, requires_grad=True), torch.randint(50, (9,))
    for smoothing in (0.0, 0.1):
        check_half(
            lambda x, e=smoothing: parametric_cross_entropy(
                x, labels, activation="identity", label_smoothing=e
            ),
            lambda x, e=smoothing: F.cross_entropy(x, labels, label_smoothing=e),
            dtype,
            logits,
        )
        loss = parametric_cross_entropy(logits.to(dtype), labels, label_smoothing=smoothing)
        assert loss.dtype == torch.float32


def test_the_gradient_keeps_its_digits_where_the_sigmoid_is_nearly_one() -> None:
    logits, labels, weight = torch.randn(4, 50), torch.randint(50, (4,)), torch.rand(50) + 0.5
    phi = LowRankPhi(torch.full((50,), -9.0), 0.01 * torch.randn(50, 2), torch.randn(50, 2))

    def gradient(dtype: torch.dtype) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            p, w = LowRankPhi(*(t.to(dtype) for t in phi)), weight.to(dtype)
            return parametric_cross_entropy(x, labels, p, weight=w, label_smoothing=0.1, reduction="sum")

        return with_gradients(loss, logits.to(dtype).requires_grad_())[1].double()

    single, expected = gradient(torch.float32), gradient(torch.float64)
    assert (expected.norm(dim=1) < 1e-8).any()
    assert ((single - expected).norm(dim=1) < 1e-4 * expected.norm(dim=1)).all()
