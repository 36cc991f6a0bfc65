"""What the sweep runs: every operator at the sizes that take each of its paths on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gpu.case import ALL, FLOAT32, USUAL, Case, Draw, misaligned
from lossmeta.ops import (
    LowRankPhi,
    adjusted_cross_entropy,
    class_confusion,
    distance_mixture,
    focal_weighting,
    gaussian_curvature,
    loss_network,
    parametric_cross_entropy,
    perturb,
    pwl_penalty,
    pwl_statistics,
)
from lossmeta.ops._operator import OPERATORS
from lossmeta.ops.loss_network import LINKS
from lossmeta.ops.pwl_penalty import with_slope

Make = Callable[[Draw], dict[str, Tensor]]

BEYOND_INT32 = 2**31  # elements


def all_cases() -> list[Case]:
    """Cheap ones of every operator first, then the large ones."""
    cases = [
        *_parametric_cross_entropy(),
        *_adjusted_cross_entropy(),
        *_class_confusion(),
        *_loss_network(),
        *_distance_mixture(),
        *_focal_weighting(),
        *_perturb(),
        *_pwl_penalty(),
        *_pwl_statistics(),
        *_gaussian_curvature(),
    ]
    return sorted(cases, key=lambda case: case.large)


def _reference(operator: str, *options: Any) -> Callable[..., Any]:
    """The operator's formula in plain PyTorch."""

    def theirs(*tensors: Tensor | None) -> Any:
        return OPERATORS[operator].reference(*tensors, *options)

    return theirs


# ---- Parametric cross-entropy.


def formula(
    logits: Tensor,
    target: Tensor,
    phi: Tensor,
    *,
    activation: str = "sigmoid",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """ALA Eq. 6 for logits [N, C] with every option of ``torch.nn.functional.cross_entropy``, by dense targets."""
    classes = logits.shape[1]
    indices = not target.dtype.is_floating_point
    kept = (
        target != ignore_index if indices else torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    )
    dense = one_hot(target.where(kept, 0), classes).to(logits.dtype) if indices else target
    weights = torch.ones(classes, dtype=logits.dtype, device=logits.device) if weight is None else weight
    smooth = ((1 - label_smoothing) * dense + label_smoothing / classes) * weights
    unweighted = (1 - label_smoothing) * dense.sum(1) + label_smoothing
    mean_weight = smooth.sum(1) / unweighted
    z = ((smooth / mean_weight[:, None]) @ phi * logits.log_softmax(1)).sum(1)
    loss = -mean_weight * (z.sigmoid() if activation == "sigmoid" else z)
    loss = loss.where(kept, 0)
    if reduction == "none":
        return loss
    number = weights[target.where(kept, 0)].where(kept, 0).sum() if indices else len(logits)
    return loss.sum() if reduction == "sum" else loss.sum() / number


def _logits(
    *shape: int, skew: float = 0.0, ignored: bool = False, scale: float = 2.0, models: bool = False
) -> Make:
    """Logits, labels and a Phi near the identity for them; ``shape`` [N, C], [N, C, d] or of models [B, N, C]."""

    def make(draw: Draw) -> dict[str, Tensor]:
        sizes = [draw.size(n) for n in shape]
        axis = 2 if models else 1
        classes = sizes[axis]
        target = draw.labels(classes, *sizes[:axis], *sizes[axis + 1 :], skew=skew)
        if ignored:
            target = target.where(draw.uniform(*target.shape, dtype=torch.float32) > 0.1, -100)
        phi = draw.normal(*sizes[: models * 1], classes, classes, dtype=draw.wide, scale=0.3)
        phi.diagonal(dim1=-2, dim2=-1).add_(1)
        return {
            "logits": draw.normal(*sizes, scale=scale).requires_grad_(),
            "target": target,
            "phi": phi.requires_grad_(),
        }

    return make


def _with_weight(make: Make) -> Make:
    def weighted(draw: Draw) -> dict[str, Tensor]:
        inputs = make(draw)
        return {**inputs, "weight": draw.uniform(inputs["phi"].shape[-1], dtype=draw.wide) + 0.5}

    return weighted


def _sliced(make: Make) -> Make:
    """``logits[1:]``, whose rows start at no multiple of 16 bytes."""

    def sliced(draw: Draw) -> dict[str, Tensor]:
        inputs = make(draw)
        inputs["logits"] = inputs["logits"].detach()[1:].requires_grad_()
        return {**inputs, "target": inputs["target"][1:].clone()}

    return sliced


def _probabilities(samples: int, classes: int) -> Make:
    def make(draw: Draw) -> dict[str, Tensor]:
        inputs = _logits(samples, classes)(draw)
        target = draw.normal(*inputs["logits"].shape, dtype=draw.wide).softmax(1)
        return {**inputs, "target": target.requires_grad_()}

    return make


def _without_matrix(samples: int, classes: int, rank: int | None = None) -> Make:
    def make(draw: Draw) -> dict[str, Tensor]:
        inputs = _logits(samples, classes, ignored=True)(draw)
        count = inputs.pop("phi").shape[0]
        if rank is not None:
            inputs["diagonal"] = (draw.uniform(count, dtype=draw.wide) + 0.5).requires_grad_()
            for side in ("left", "right"):
                inputs[side] = draw.normal(count, rank, dtype=draw.wide, scale=0.1).requires_grad_()
        return inputs

    return make


def _rows(samples: int, classes: int) -> Make:
    """Logits, and for each sample its row of Phi, as soft targets come to the operator."""

    def make(draw: Draw) -> dict[str, Tensor]:
        sizes = draw.size(samples), draw.size(classes)
        return {
            "logits": draw.normal(*sizes).requires_grad_(),
            "rows": draw.uniform(*sizes, dtype=draw.wide).div_(sizes[1]).requires_grad_(),
        }

    return make


def _ends(samples: int, classes: int) -> Tensor:
    """Rows at the start, around element 2^31, and at the end."""
    middle = min(BEYOND_INT32 // classes, samples - 4)
    return torch.cat(
        [torch.arange(8), torch.arange(middle - 4, middle + 4), torch.arange(samples - 8, samples)]
    )


def _many_classes(dtype: torch.dtype) -> Mapping[str, float]:
    """With so many classes z is some -10 to -20, and what is e^z is off by as much as z is rounded by."""
    error = 1e-11 if dtype == torch.float64 else 2e-5
    return dict.fromkeys(("loss", *(f"gradient of {name}" for name in ("logits", "phi", "rows"))), error)


def _parametric_cross_entropy() -> list[Case]:
    operator = "parametric_cross_entropy"
    kinds = {"none": 0, "mean": 1, "sum": 2}

    def case(
        name: str, make: Make, reduction: str = "mean", activation: str = "sigmoid", **more: Any
    ) -> Case:
        """The operator with labels and without further options."""
        options = (None, -100, activation == "sigmoid", kinds[reduction])
        return Case(
            operator,
            name,
            make,
            lambda x, y, phi: parametric_cross_entropy(x, y, phi, activation=activation, reduction=reduction),
            _reference(operator, *options),
            ("loss",),
            **more,
        )

    def general(name: str, make: Make, own_bits: bool = True, **options: Any) -> Case:
        """By the formula above; the inputs beyond logits, target and Phi are the weight."""

        def with_options(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda x, y, phi, weight=None: function(x, y, phi, weight=weight, **options)

        functions = with_options(parametric_cross_entropy), with_options(formula)
        return Case(operator, name, make, *functions, ("loss",), dtypes=ALL, own_bits=own_bits)

    def without_matrix(name: str, make: Make, **options: Any) -> Case:
        """Phi as the identity or of low rank; the inputs beyond logits and target are its parts."""

        def ours(x: Tensor, y: Tensor, *parts: Tensor) -> Tensor:
            return parametric_cross_entropy(x, y, LowRankPhi(*parts) if parts else None, **options)

        def theirs(x: Tensor, y: Tensor, *parts: Tensor) -> Tensor:
            identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            return formula(x, y, LowRankPhi(*parts).dense() if parts else identity, **options)

        return Case(operator, name, make, ours, theirs, ("loss",), dtypes=ALL, own_bits=False)

    def by_rows(name: str, samples: int, classes: int, reduction: str, **more: Any) -> Case:
        options = (None, -100, True, kinds[reduction])
        return Case(
            operator,
            name,
            _rows(samples, classes),
            lambda x, rows: OPERATORS[operator](x, None, rows, *options),
            lambda x, rows: OPERATORS[operator].reference(x, None, rows, *options),
            ("loss",),
            floors=_many_classes,
            **more,
        )

    labels = _logits(1000, 100, ignored=True)
    return [
        case("128×10", _logits(128, 10), dtypes=ALL),
        case("20000×10", _logits(20000, 10), dtypes=ALL),
        case("20000×10, identity, sum", _logits(20000, 10), "sum", "identity"),
        case("20000×10, 90 % one class", _logits(20000, 10, skew=0.9)),
        case("9000×33, one class", _logits(9000, 33, skew=1.0)),
        case("300×1001", _logits(300, 1001), dtypes=ALL),
        case("logits[1:] of 301×1001", _sliced(_logits(301, 1001)), dtypes=ALL),
        misaligned(case("300×1000", _logits(300, 1000), dtypes=ALL)),
        misaligned(case("600×10", _logits(600, 10))),
        case("8×100×33", _logits(8, 100, 33), dtypes=ALL),
        case("8×100×33, none", _logits(8, 100, 33, ignored=True), "none"),
        case("4 models, 500×100", _logits(4, 500, 100, models=True), dtypes=ALL),
        case("4 models, 9000×10, none", _logits(4, 9000, 10, models=True, ignored=True), "none"),
        case("512×200, logits to ±100", _logits(512, 200, scale=30.0), activation="identity"),
        general("1000×100, weights", _with_weight(labels)),
        general("1000×100, weights, identity, sum", _with_weight(labels), activation="identity", reduction="sum"),
        general("1000×100, smoothing", labels, own_bits=False, label_smoothing=0.1),
        general(
            "1000×100, smoothing, weights, none",
            _with_weight(labels),
            own_bits=False,
            label_smoothing=0.1,
            reduction="none",
        ),
        general("60×1001, smoothing", _logits(60, 1001, ignored=True), own_bits=False, label_smoothing=0.1),
        without_matrix("60×1001, Φ: none, smoothing", _without_matrix(60, 1001), label_smoothing=0.1),
        without_matrix("60×1001, Φ: rank 8", _without_matrix(60, 1001, 8)),
        without_matrix("60×1001, Φ: rank 8, smoothing", _without_matrix(60, 1001, 8), label_smoothing=0.1),
        general("1000×100, probabilities", _probabilities(1000, 100), own_bits=False),
        general(
            "1000×100, probabilities, weights, smoothing",
            _with_weight(_probabilities(1000, 100)),
            own_bits=False,
            label_smoothing=0.2,
        ),
        case("8192×1000", _logits(8192, 1000)),
        by_rows("64×50257, a row of Φ per sample", 64, 50257, "mean"),
        misaligned(by_rows("64×5001, a row of Φ per sample", 64, 5001, "none")),
        by_rows("8192×32000, a row of Φ per sample", 8192, 32000, "mean", large=True, gibibytes=40),
        case(
            "8192×32000",
            _logits(8192, 32000),
            dtypes=FLOAT32,
            floors=_many_classes,
            large=True,
            checks=False,
            gibibytes=64,
        ),
        by_rows(
            "17000×128256, a row of Φ per sample",
            17000,
            128256,
            "none",
            dtypes=(torch.bfloat16,),
            large=True,
            by_row=("logits", "rows"),
            pick=_ends,
            checks=False,
            gibibytes=56,
        ),
    ]  # fmt: skip


# ---- Adjusted cross-entropy.

ADJUSTMENTS = ("shift", "exponent", "smoothing")


def _adjusted(
    *shape: int, names: Sequence[str] = ADJUSTMENTS, ignored: bool = False, scale: float = 2.0
) -> Make:
    """Logits of models [B, N, C], or [N, C], their labels and the parameters ``names``."""

    def make(draw: Draw) -> dict[str, Tensor]:
        *batch, samples, classes = (draw.size(n) for n in shape)
        labels = draw.labels(classes, samples)
        if ignored:
            labels = labels.where(draw.uniform(samples, dtype=torch.float32) > 0.1, -100)
        parameters = {
            "shift": draw.normal(*batch, classes, dtype=draw.wide),
            "exponent": draw.uniform(*batch, dtype=draw.wide),
            "smoothing": draw.uniform(*batch, dtype=draw.wide) / 2,
        }
        return {
            "logits": draw.normal(*batch, samples, classes, scale=scale).requires_grad_(),
            "labels": labels,
            **{name: parameters[name].requires_grad_() for name in names},
        }

    return make


def _rounded_slopes(dtype: torch.dtype) -> Mapping[str, float]:
    """The gradient of the shift is the sum of slopes that were rounded to bfloat16, and may cancel."""
    return {"gradient of shift": 5e-2} if dtype == torch.bfloat16 else {}


def _adjusted_cross_entropy() -> list[Case]:
    operator = "adjusted_cross_entropy"

    def case(
        name: str, *shape: int, names: Sequence[str] = ADJUSTMENTS, more: Any = None, **kind: Any
    ) -> Case:
        def ours(x: Tensor, y: Tensor, *values: Tensor) -> Tensor:
            return adjusted_cross_entropy(x, y, **dict(zip(names, values, strict=True)))

        def theirs(x: Tensor, y: Tensor, *values: Tensor) -> Any:
            given = dict(zip(names, values, strict=True))
            return OPERATORS[operator].reference(x, y, *(given.get(n) for n in ADJUSTMENTS), -100, False)

        make = _adjusted(*shape, names=names, **kind)
        return Case(operator, name, make, ours, theirs, ("loss",), floors=_rounded_slopes, **(more or {}))

    everywhere = {"dtypes": ALL}
    return [
        case("8 models, 64×10", 8, 64, 10, more=everywhere),
        case("8 models, 64×10, shift", 8, 64, 10, names=("shift",), more=everywhere),
        case("20000×10, ignored", 20000, 10, ignored=True, more=everywhere),
        case("3 models, 9000×33", 3, 9000, 33, ignored=True),
        case("4 models, 500×100", 4, 500, 100, more=everywhere),
        case("300×1001, exponent", 300, 1001, names=("exponent",), more=everywhere),
        case("512×200, logits to ±100", 512, 200, scale=30.0),
        misaligned(case("300×1000", 300, 1000, more=everywhere)),
        misaligned(case("8 models, 64×12", 8, 64, 12)),
        case("64×5001", 64, 5001, more=everywhere),
        case("8192×1000, no parameters", 8192, 1000, names=()),
        case("8192×1000", 8192, 1000),
        case("10⁶×10", 1_000_000, 10, more={"large": True, "gibibytes": 4}),
        case(
            "8192×32000",
            8192,
            32000,
            more={"dtypes": FLOAT32, "large": True, "checks": False, "gibibytes": 40},
        ),
    ]


# ---- Class confusion.


def _validation(
    samples: int, classes: int, skew: float = 0.0, ignored: bool = False, sums: bool = False
) -> Make:
    def make(draw: Draw) -> dict[str, Tensor]:
        sizes = draw.size(samples), draw.size(classes)
        labels = draw.labels(sizes[1], sizes[0], skew=skew)
        if ignored:
            labels = labels.where(draw.uniform(sizes[0], dtype=torch.float32) > 0.1, -100)
        inputs = {"logits": draw.normal(*sizes, scale=3.0), "labels": labels}
        if sums:
            inputs["sums"] = draw.uniform(sizes[1], sizes[1], dtype=torch.float64)
            inputs["counts"] = draw.integers(1000, sizes[1])
        return inputs

    return make


def _class_confusion() -> list[Case]:
    operator = "class_confusion"

    def case(name: str, make: Make, **more: Any) -> Case:
        return Case(
            operator, name, make, class_confusion, _reference(operator, -100), ("sums", "counts"), **more
        )

    def accumulated(x: Tensor, y: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return class_confusion(x, y, sums=sums.clone(), counts=counts.clone())

    def added(x: Tensor, y: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        more_sums, more_counts = OPERATORS[operator].reference(x, y, -100)
        return sums + more_sums, counts + more_counts

    def accumulating(name: str, make: Make, **more: Any) -> Case:
        return Case(operator, name, make, accumulated, added, ("sums", "counts"), **more)

    return [
        case("10⁴×100", _validation(10_000, 100), dtypes=ALL),
        case("20000×10, 90 % one class", _validation(20_000, 10, skew=0.9), dtypes=ALL),
        case("5000×37, every class empty but one", _validation(5000, 37, skew=1.0)),
        case("3000×100, ignored", _validation(3000, 100, ignored=True)),
        accumulating("10⁴×10, added to sums", _validation(10_000, 10, sums=True), dtypes=ALL),
        accumulating("3000×1000, added to sums", _validation(3000, 1000, sums=True)),
        misaligned(case("3000×104", _validation(3000, 104), dtypes=ALL)),
        misaligned(case("600×5001", _validation(600, 5001))),
        case("8192×1000", _validation(8192, 1000)),
        case("8192×1000, 90 % one class", _validation(8192, 1000, skew=0.9)),
        case("10⁶×10", _validation(1_000_000, 10), large=True, gibibytes=4),
        # Its sums are 8 GB.
        case("600×32000", _validation(600, 32_000), dtypes=FLOAT32, large=True, checks=False, gibibytes=60),
    ]  # fmt: skip


# ---- Loss network.

MOST_ACTIVATIONS = 2**24  # of a hidden layer in the reference, at a time
# Multiplications of a hidden layer, N·C·H²: what a case takes is a hundred times as many, most of them in float64.
MOST_PRODUCTS = {"exact": 3e10, "table": 2e11}


def _network(
    width: int,
    samples: int,
    classes: int,
    *,
    dense: bool = False,
    several: bool = False,
    ignored: bool = False,
    gain: float = 1.0,
) -> Make:
    def make(draw: Draw) -> dict[str, Tensor]:
        n, c, h = draw.size(samples), draw.size(classes), draw.size(width)
        target = draw.normal(n, c, dtype=draw.wide) if dense else draw.labels(c, n)
        if several:
            target = draw.labels(2, n, c)
        if ignored:
            target = target.where(draw.uniform(*target.shape, dtype=torch.float32) > 0.1, -100)
        inputs = {"pred": draw.normal(n, c, scale=2.0).requires_grad_(), "target": target}
        for name, shape in (("w1", (h, 2)), ("w2", (h, h)), ("w3", (1, h))):
            weight = draw.normal(*shape, dtype=draw.wide, scale=gain / shape[1] ** 0.5)
            inputs[name] = weight.requires_grad_()
        return inputs

    return make


def _affordable(width: int, samples: int, classes: int, kind: str) -> int:
    """As many samples as can be paid for."""
    return max(1, min(samples, int(MOST_PRODUCTS[kind] / (classes * width**2))))


def _table_floors(dtype: torch.dtype) -> Mapping[str, float]:
    """The stated errors of the table, and in float32 that of a curvature from differences of neighbouring nodes."""
    double = dtype == torch.float64
    weights = 1e-6 if double else 1e-4
    return {
        "loss": 1e-9 if double else 2e-6,
        "slope": 1e-7 if double else 1e-5,
        "gradient of pred": 1e-4 if double else 1e-3,
        **{f"gradient of {name}": weights for name in ("w1", "w2", "w3")},
    }


def _network_chunk(inputs: Mapping[str, Tensor]) -> int:
    return max(1, MOST_ACTIVATIONS // (inputs["pred"].shape[1] * len(inputs["w1"])))


def _loss_network() -> list[Case]:
    operator = "loss_network"

    def case(
        name: str,
        make: Make,
        *,
        exact: bool,
        link: str = "softmax",
        hidden: str = "smooth_leaky_relu",
        output: str = "linear",
        table_size: int = 512,
        **more: Any,
    ) -> Case:
        options: dict[str, Any] = {
            "link": link,
            "hidden": hidden,
            "output": output,
            "exact": exact,
            "table_size": table_size,
        }
        flags = (None, LINKS[link], hidden != "relu", 0.01, 10.0, output == "softplus", -100, 0)
        return Case(
            operator,
            f"{name}, {'exact' if exact else 'table'}",
            make,
            lambda *tensors: loss_network(*tensors, **options),
            _reference(operator, *flags),
            ("loss", "slope"),
            by_row=("pred", "target"),
            chunk=_network_chunk,
            **more,
        )

    sizes = [(300, 20), (512, 200), (300, 365), (1024, 1000), (64, 50257), (64, 32000)]
    cases = []
    for samples, classes in sizes:
        for width in (40, 100, 512):
            for exact in (False, True):
                n = _affordable(width, samples, classes, "exact" if exact else "table")
                large = n * classes * width**2 > 1e9
                floors: dict[str, Any] = {} if exact else {"floors": _table_floors}
                name = f"H {width}, {n}×{classes}"
                cases.append(case(name, _network(width, n, classes), exact=exact, large=large, **floors))
    table: dict[str, Any] = {"exact": False, "floors": _table_floors}
    small = _network(40, 300, 20)
    cases += [
        case("H 40, 300×21, float64", _network(40, 300, 21), dtypes=(torch.float64,), **table),
        case("H 100, 100×33, float64", _network(100, 100, 33), exact=True, dtypes=(torch.float64,)),
        # The weights' mixed derivative alone, as a meta-gradient asks for it.
        case("H 40, 300×20, slope alone", small, pulled=("slope",), **table),
        case("H 40, 40×20, slope alone", _network(40, 40, 20), pulled=("slope",), exact=True),
        case("H 40, 300×20, loss alone", small, pulled=("loss",), **table),
        case("H 40, 300×20, ignored", _network(40, 300, 20, ignored=True), **table),
        case("H 40, 40×20, ignored", _network(40, 40, 20, ignored=True), exact=True),
        # So coarse that it is refused, and the exact kernels run behind their gate.
        case("H 40, 300×20, table refused", _network(40, 300, 20, gain=1.5), exact=False, table_size=16),
        case("H 40, 60×30, dense target", _network(40, 60, 30, dense=True), exact=True),
        case("H 40, 60×3, identity link", _network(40, 60, 3, dense=True), exact=True, link="identity"),
        case("labels, H 40, 60×30", _network(40, 60, 30, several=True), exact=True, link="sigmoid"),
        case("labels, H 40, 60×30, dense target", _network(40, 60, 30, dense=True), exact=True, link="sigmoid"),
        case("labels, H 40, 300×21", _network(40, 300, 21, several=True), link="sigmoid", **table),
        case("labels, H 40, 512×1000, ignored", _network(40, 512, 1000, several=True, ignored=True),
             link="sigmoid", **table),
        misaligned(case("labels, H 40, 300×21", _network(40, 300, 21, several=True), link="sigmoid", **table)),
        case("H 33, 60×30, relu, softplus", _network(33, 60, 30), exact=True, hidden="relu", output="softplus"),
        misaligned(case("H 40, 300×24", _network(40, 300, 24), **table)),
        misaligned(case("H 40, 300×301", _network(40, 300, 301), **table)),
        misaligned(case("H 40, 40×24", _network(40, 40, 24), exact=True)),
        misaligned(case("H 100, 6×2000", _network(100, 6, 2000), exact=True)),
    ]  # fmt: skip
    return cases


# ---- Metric learning.


def _embeddings(count: int, dims: int, *, classes: int, phi: Sequence[float], triplets: int = 0) -> Make:
    """Embeddings, labels or triplets without an anchor as its own negative, and the coefficients."""

    def make(draw: Draw) -> dict[str, Tensor]:
        m, d = draw.size(count), draw.size(dims)
        inputs = {"embeddings": draw.normal(m, d, scale=d**-0.5).requires_grad_()}
        if triplets:
            t = draw.size(triplets)
            anchor, positive, other = draw.integers(m, t), draw.integers(m, t), draw.integers(m - 1, t)
            inputs["triplets"] = torch.stack([anchor, positive, (anchor + 1 + other) % m], 1)
        else:
            inputs["labels"] = draw.labels(classes, m)
        coefficients = torch.tensor(phi, dtype=draw.wide, device=draw.device)
        return {**inputs, "phi": coefficients.requires_grad_()}

    return make


MIXTURE = (1.0, 0.3, 0.0, 0.2, 0.7, 1.0, 0.0, 0.4, 0.1, 0.6)


def _distance_mixture() -> list[Case]:
    operator = "distance_mixture"
    outputs = ("loss", "terms")

    def case(name: str, make: Make, form: str, reduction: str = "mean", **more: Any) -> Case:
        how = {"none": 0, "mean": 1, "sum": 2}[reduction]
        by_labels = form == "labels"

        def ours(x: Tensor, items: Tensor, phi: Tensor) -> Any:
            given = (None, items) if by_labels else (items, None)
            return distance_mixture(x, given[0], phi, labels=given[1], reduction=reduction)

        def theirs(x: Tensor, items: Tensor, phi: Tensor) -> Any:
            given = (None, phi, items) if by_labels else (items, phi, None)
            return OPERATORS[operator].reference(x, *given, 1e-3, how)

        return Case(operator, f"{name}, {form}", make, ours, theirs, outputs, **more)

    cases = []
    for count, dims in ((128, 128), (128, 600), (1000, 128), (1000, 600)):
        triplets = _embeddings(count, dims, classes=count // 4, phi=MIXTURE, triplets=8192)
        labels = _embeddings(count, dims, classes=count // 4, phi=MIXTURE)
        dtypes = ALL if count == 128 else USUAL
        cases.append(case(f"{count}×{dims}, 8192", triplets, "triplets", dtypes=dtypes))
        large = {"large": True, "gibibytes": 45} if count * dims > 500_000 else {}
        cases.append(case(f"{count}×{dims}", labels, "labels", dtypes=dtypes, **large))
    few = _embeddings(50, 33, classes=4, phi=MIXTURE, triplets=300)
    cases += [
        case("50×33, 300, none", few, "triplets", "none", dtypes=ALL),
        case("70×33, none", _embeddings(70, 33, classes=4, phi=MIXTURE), "labels", "none", dtypes=ALL),
        misaligned(case("50×32, 301", _embeddings(50, 32, classes=4, phi=MIXTURE, triplets=301), "triplets")),
        misaligned(case("70×32", _embeddings(70, 32, classes=4, phi=MIXTURE), "labels")),
    ]  # fmt: skip
    return cases


def _focal_weighting() -> list[Case]:
    operator = "focal_weighting"

    def case(name: str, make: Make, reduction: str = "mean", **more: Any) -> Case:
        how = {"none": 0, "mean": 1, "sum": 2}[reduction]
        return Case(
            operator,
            name,
            make,
            lambda x, y, phi: focal_weighting(x, y, phi, reduction=reduction),
            _reference(operator, 1.0, how),
            ("loss",),
            **more,
        )

    def embeddings(count: int, dims: int) -> Make:
        return _embeddings(count, dims, classes=count // 4, phi=(0.7, 3.0))

    return [
        case("128×128", embeddings(128, 128), dtypes=ALL),
        case("128×600", embeddings(128, 600), dtypes=ALL),
        case("1000×128", embeddings(1000, 128)),
        case("70×33, none", embeddings(70, 33), "none", dtypes=ALL),
        misaligned(case("70×32", embeddings(70, 32))),
        case("1000×600", embeddings(1000, 600), large=True, gibibytes=45),
    ]


# ---- Landscapes and regularisers.


def _directions(points: int, count: int, parameters: int) -> Make:
    def make(draw: Draw) -> dict[str, Tensor]:
        b, k, p = draw.size(points), draw.size(count), draw.size(parameters)
        return {
            "base": draw.normal(p),
            "directions": draw.normal(k, p),
            "coefficients": draw.normal(b, k, dtype=draw.wide),
        }

    return make


def _perturb() -> list[Case]:
    def case(name: str, make: Make, **more: Any) -> Case:
        return Case("perturb", name, make, perturb, _reference("perturb"), ("points",), **more)

    def into(base: Tensor, directions: Tensor, coefficients: Tensor) -> Tensor:
        out = base.new_empty(len(coefficients), len(base) + 3)[:, 1:-2]
        return perturb(base, directions, coefficients, out=out)

    return [
        case("16 points, 2 directions, 10⁶", _directions(16, 2, 1_000_000), dtypes=ALL),
        case("17 points, 70 directions, 1031", _directions(17, 70, 1031), dtypes=ALL),
        misaligned(case("5 points, 3 directions, 4096", _directions(5, 3, 4096), dtypes=ALL)),
        replace(case("5 points, 3 directions, 4096, out", _directions(5, 3, 4096)), ours=into),
    ]


def _weights(count: int, knots: int, spacing: str) -> Make:
    """Weights and a table for them, of a penalty that rises on either side of 0: in its value nothing cancels. No knot
    is a number of half precision: no weight lies on one."""

    def make(draw: Draw) -> dict[str, Tensor]:
        steps = torch.arange(knots, dtype=draw.wide, device=draw.device) - knots // 2 + 1 / 3
        places = {
            "uniform": steps * (4 / max(knots, 1)),
            "logarithmic": steps.sign() * torch.exp2(20 * steps.abs() / max(knots, 1) - 9),
            "clustered": 0.5 + steps * 1e-5,  # several in one bucket
        }
        at, slopes = places[spacing].sort().values, draw.normal(knots + 1, dtype=draw.wide).abs_()
        is_left = torch.arange(knots + 1, device=draw.device) < (at < 0).sum()
        return {
            "theta": draw.normal(draw.size(count)).requires_grad_(),
            "knots": at,
            "slopes": slopes.where(~is_left, -slopes),
        }

    return make


def _pwl_penalty() -> list[Case]:
    def case(name: str, make: Make, **more: Any) -> Case:
        theirs = _reference("pwl_penalty", True)
        return Case("pwl_penalty", name, make, pwl_penalty, theirs, ("value",), **{"dtypes": ALL, **more})

    def added(theta: Tensor, knots: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return with_slope(theta, knots, slopes, add_to=torch.ones_like(theta))

    def added_by_autograd(theta: Tensor, knots: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        leaf = theta.detach().requires_grad_()
        value = OPERATORS["pwl_penalty"].reference(leaf, knots, slopes, True)
        return value.detach(), torch.ones_like(leaf) + torch.autograd.grad(value, leaf)[0]

    def fixed(make: Make) -> Make:
        return lambda draw: {name: t.detach() for name, t in make(draw).items()}

    return [
        case("no knots, 1031", _weights(1031, 0, "uniform")),
        case("2 knots, 204800", _weights(204_800, 2, "uniform")),
        case("200 knots, 204800", _weights(204_800, 200, "uniform")),
        case("200 knots by size, 33003", _weights(33_003, 200, "logarithmic")),
        case("13 close knots, 33003", _weights(33_003, 13, "clustered")),
        case("10⁴ knots, 33003", _weights(33_003, 10_000, "uniform"), dtypes=USUAL),
        misaligned(case("20 knots, 4096", _weights(4096, 20, "logarithmic"))),
        Case(
            "pwl_penalty",
            "200 knots, 33003, added",
            fixed(_weights(33_003, 200, "uniform")),
            added,
            added_by_autograd,
            ("value", "gradient"),
            dtypes=ALL,
        ),
        case("200 knots, 10⁷", _weights(10_000_003, 200, "uniform"), large=True, gibibytes=4, dtypes=USUAL),
    ]


def _parameters(count: int, knots: int, gradients: int) -> Make:
    def make(draw: Draw) -> dict[str, Tensor]:
        p, x = draw.size(count), draw.size(knots)
        # Multiples of 1/64: some parameters lie on knots, in every dtype.
        theta = draw.normal(p, dtype=draw.wide).mul_(64).round_().div_(64).to(draw.dtype)
        steps = torch.arange(x, dtype=draw.wide, device=draw.device) - x // 2
        return {
            "theta": theta,
            "gradients": draw.normal(gradients, p),
            "knots": steps / (64 if x > 300 else 16),
        }

    return make


def _pwl_statistics() -> list[Case]:
    def case(name: str, make: Make, **more: Any) -> Case:
        return Case(
            "pwl_statistics",
            name,
            make,
            pwl_statistics,
            _reference("pwl_statistics"),
            ("features", "gram", "cross"),
            dtypes=ALL,
            precision=torch.float64,  # it adds in float64 whatever it is given
            **more,
        )

    return [
        case("50 knots, 33003", _parameters(33_003, 50, 3)),
        case("800 knots, 33003", _parameters(33_003, 800, 3)),
        misaligned(case("50 knots, 4096", _parameters(4096, 50, 2))),
        case("50 knots, 10⁶", _parameters(1_000_003, 50, 5), large=True, gibibytes=4),
        case("800 knots, 10⁶", _parameters(1_000_003, 800, 2), large=True, gibibytes=4),
    ]


def _gaussian_curvature() -> list[Case]:
    def surface(rows: int, columns: int) -> Make:
        return lambda draw: {"surface": draw.normal(draw.size(rows), draw.size(columns))}

    def case(name: str, make: Make) -> Case:
        return Case(
            "gaussian_curvature",
            name,
            make,
            lambda f: gaussian_curvature(f, 0.5, 2.0),
            _reference("gaussian_curvature", 0.5, 2.0),
            ("curvature",),
            dtypes=ALL,
        )

    return [
        case("513×300", surface(513, 300)),
        case("3×1000", surface(3, 1000)),
        case("2048×2048", surface(2048, 2048)),
        misaligned(case("513×304", surface(513, 304))),
    ]
