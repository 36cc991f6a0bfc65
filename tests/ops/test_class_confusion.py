from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from contract import assert_close, check_compiles, check_half, check_opcheck, check_strides, check_threads
from hypothesis import given
from torch import Tensor

from lossmeta.ops import class_confusion
from lossmeta.ops.class_confusion import _accumulate, _operator

# One class; few classes (lanes across samples); one vector and its neighbours; unaligned; several vectors; more than a
# chunk of samples; more samples of a class than a block of rows.
SHAPES = [
    (1, 1),
    (5, 2),
    (128, 10),
    (2500, 10),
    (17, 16),
    (16, 17),
    (3, 100),
    (7, 257),
    (400, 19),
    (40, 1000),
]


def formula(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """ALA Eq. 7 by a loop over samples, in float64 from probabilities: independent of the operator."""
    classes = logits.shape[1]
    sums, counts = torch.zeros(classes, classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.int64)
    for row, label in zip(logits.detach().double(), labels.tolist(), strict=True):
        if label != ignore_index:
            p = (row - row.max()).exp()
            sums[label] -= (p / p.sum()).log()
            counts[label] += 1
    return sums, counts


def inputs(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(shape, dtype=dtype), torch.randint(shape[1], shape[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels = inputs(shape, dtype)
    sums, counts = class_confusion(logits, labels)
    assert (sums.dtype, counts.dtype) == (torch.float64, torch.int64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close((sums, counts), formula(logits, labels), rtol=tolerance, atol=tolerance)
    assert_close(_operator.reference(logits, labels, -100), (sums, counts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [7, 60])
@pytest.mark.parametrize("ignore_index", [-100, 3, 1000])
def test_ignored_samples_are_left_out(classes: int, ignore_index: int) -> None:
    logits, labels = inputs((90, classes))
    labels[::4] = ignore_index
    logits[::4] = float("nan")
    logits[labels == ignore_index] = float("nan")
    kept = labels != ignore_index
    actual = class_confusion(logits, labels, ignore_index=ignore_index)
    assert_close(actual, formula(logits[kept], labels[kept]), rtol=1e-6, atol=1e-6)
    assert actual[1].sum() == kept.sum()


@pytest.mark.parametrize("classes", [10, 100])
def test_batches_accumulate_in_place(classes: int) -> None:
    logits, labels = inputs((3000, classes))
    sums, counts = torch.zeros(classes, classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.int64)
    for x, y in zip(logits.split(700), labels.split(700), strict=True):
        returned = class_confusion(x, y, sums=sums, counts=counts)
        assert returned[0] is sums and returned[1] is counts
    assert_close((sums, counts), class_confusion(logits, labels), rtol=1e-6, atol=1e-6)


def test_sums_stay_exact_where_float32_would_not() -> None:
    # 2^24 + 1 is no float32: a sum in it would stop growing.
    logits, labels = torch.zeros(8, 2), torch.zeros(8, dtype=torch.int64)
    sums, counts = torch.full((2, 2), 2.0**30, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    class_confusion(logits, labels, sums=sums, counts=counts)
    assert_close(sums[0] - 2.0**30, torch.full((2,), 8 * math.log(2.0)).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [5, 40])
def test_infinite_and_nan_logits(classes: int, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.randn(9, classes, dtype=dtype)
    labels = torch.tensor([0, 1, 1, 2, 2, 3, 3, 4, 4])
    logits[0, 1] = logits[1, -1] = -inf
    logits[3, 1] = inf
    logits[5, 2] = nan
    logits[7] = -inf
    logits[2] *= 1e4
    logits[6] += 1e5
    sums, counts = class_confusion(logits, labels)
    log_probability = torch.log_softmax(logits, 1).double()
    expected = torch.zeros(classes, classes, dtype=torch.float64).index_add(0, labels, -log_probability)
    assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    assert sums[0, 1] == inf and sums[1, -1] == inf and sums[2:5].isnan().sum() == 2 * classes + classes
    assert counts.sum() == 9


def test_a_common_offset_does_not_cancel() -> None:
    # Integers plus 2^22: exact in float32, so the offset must drop out exactly too.
    for classes in (10, 40):
        logits = torch.randint(-8, 8, (50, classes)).float()
        labels = torch.randint(classes, (50,))
        assert_close(
            class_confusion(logits + 2.0**22, labels), class_confusion(logits, labels), rtol=0, atol=0
        )


@pytest.mark.parametrize("classes", [1, 5, 40])
def test_empty(classes: int) -> None:
    logits, labels = torch.randn(0, classes), torch.zeros(0, dtype=torch.int64)
    sums, counts = class_confusion(logits, labels)
    assert torch.equal(sums, torch.zeros(classes, classes, dtype=torch.float64))
    assert torch.equal(counts, torch.zeros(classes, dtype=torch.int64))
    class_confusion(logits, labels, sums=sums.fill_(2), counts=counts.fill_(3))
    assert (sums == 2).all() and (counts == 3).all()


def test_no_gradient() -> None:
    logits, labels = inputs((6, 5))
    expected = class_confusion(logits, labels)
    logits.requires_grad_()
    sums, counts = class_confusion(logits, labels)
    assert not sums.requires_grad
    class_confusion(logits, labels, sums=sums, counts=counts)
    assert_close((sums / 2, counts // 2), expected)
    gradient = torch.func.grad(lambda x: (x**2).sum() + class_confusion(x, labels)[0].sum())(logits.detach())
    assert_close(gradient, 2 * logits.detach())


@pytest.mark.parametrize("shape", [(6, 5), (7, 33)], ids=str)
def test_opcheck(shape: tuple[int, int]) -> None:
    logits, labels = inputs(shape)
    check_opcheck(_operator, logits, labels, -100)
    sums, counts = class_confusion(logits, labels)
    check_opcheck(_accumulate, sums, counts, logits, labels, -100)


def test_compiles() -> None:
    logits, labels = inputs((6, 5))
    check_compiles(lambda x: class_confusion(2 * x, labels), logits)

    def accumulated(x: Tensor) -> tuple[Tensor, Tensor]:
        sums, counts = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
        for part, y in zip(x.split(3), labels.split(3), strict=True):
            class_confusion(part.sin(), y, sums=sums, counts=counts)
        return sums * 2, counts + 1

    check_compiles(accumulated, logits, rtol=1e-6, atol=1e-6)  # the two sines differ in their last bit


def test_compiled_code_changes_the_given_statistics() -> None:
    logits, labels = inputs((6, 5))
    statistics = class_confusion(logits, labels)
    sums, counts = (s.clone() for s in statistics)
    step = torch.compile(lambda x, s, c: class_confusion(x, labels, sums=s, counts=c), fullgraph=True)
    step(logits, sums, counts)
    step(logits, sums, counts)
    assert_close((sums, counts), (3 * statistics[0], 3 * statistics[1]))


def test_vmap_over_models() -> None:
    logits, labels = torch.randn(3, 20, 6), torch.randint(6, (3, 20))
    sums, counts = torch.func.vmap(class_confusion)(logits, labels)
    for b in range(3):
        assert_close((sums[b], counts[b]), class_confusion(logits[b], labels[b]), rtol=1e-6, atol=1e-6)


def test_strides() -> None:
    logits, labels = inputs((30, 7))
    check_strides(class_confusion, logits, labels)
    expected = class_confusion(logits, labels)
    sums, counts = torch.zeros(7, 14, dtype=torch.float64).t()[::2], torch.zeros(14, dtype=torch.int64)[::2]
    class_confusion(logits, labels, sums=sums, counts=counts)
    assert_close((sums, counts), expected)


@pytest.mark.parametrize("shape", [(5000, 10), (3000, 100), (500, 1000)], ids=str)
def test_threads(shape: tuple[int, int]) -> None:
    logits, labels = inputs(shape)
    check_threads(lambda x: class_confusion(x, labels), logits)
    labels[: shape[0] // 2] = 1  # a class that is most of the samples
    check_threads(lambda x: class_confusion(x, labels), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(50, 7), (90, 50)], ids=str)
def test_half_precision(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels = inputs(shape, torch.float64)

    def composition(x: Tensor) -> Tensor:
        return torch.zeros(shape[1], shape[1], dtype=x.dtype).index_add(0, labels, -torch.log_softmax(x, 1))

    check_half(lambda x: class_confusion(x, labels)[0], composition, dtype, logits)


def test_autocast() -> None:
    logits, labels = inputs((6, 5))
    with torch.autocast("cpu", torch.bfloat16):
        half = logits @ torch.eye(5)
        assert half.dtype == torch.bfloat16
        sums, _ = class_confusion(half, labels)
    assert_close(sums, class_confusion(half.float(), labels)[0])


@given(data=st.data())
def test_properties(data: st.DataObject) -> None:
    samples, classes = data.draw(st.integers(0, 120)), data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    scale = data.draw(st.sampled_from([0.1, 1.0, 30.0]))
    logits = (scale * torch.randn(samples, classes, generator=generator, dtype=torch.float64)).to(dtype)
    # From all samples in one class to all over the place, some of them ignored.
    top = data.draw(st.integers(1, classes))
    labels = torch.randint(-1, top, (samples,), generator=generator)
    sums, counts = class_confusion(logits, labels, ignore_index=-1)
    expected = _operator.reference(logits.double(), labels, -1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close((sums, counts), expected, rtol=tolerance, atol=tolerance * scale)
    # Streaming, in any split, is the same sum.
    cut = data.draw(st.integers(0, samples))
    partial = class_confusion(logits[:cut], labels[:cut], ignore_index=-1)
    class_confusion(logits[cut:], labels[cut:], sums=partial[0], counts=partial[1], ignore_index=-1)
    assert_close(partial, (sums, counts), rtol=tolerance, atol=1e-12)


BAD = {
    "logits must be float32, float64, bfloat16 or float16, got int64": {
        "logits": torch.zeros(3, 5, dtype=torch.int64)
    },
    "logits must be [N, C] with at least one class, got [5]": {"logits": torch.zeros(5)},
    "logits must be [N, C] with at least one class, got [3, 0]": {"logits": torch.zeros(3, 0)},
    "labels must be int64, got int32": {"labels": torch.zeros(3, dtype=torch.int32)},
    "labels must be [3], got [2]": {"labels": torch.zeros(2, dtype=torch.int64)},
    "labels must be [3], got [3, 1]": {"labels": torch.zeros(3, 1, dtype=torch.int64)},
    "labels must lie in [0, 5), got 5 at index 1": {"labels": torch.tensor([0, 5, 7])},
    "labels must lie in [0, 5), got -1 at index 2": {"labels": torch.tensor([0, 0, -1])},
    "sums must be float64, got float32": {"sums": torch.zeros(5, 5)},
    "sums must be [5, 5], got [5, 4]": {"sums": torch.zeros(5, 4, dtype=torch.float64)},
    "counts must be int64, got float64": {"counts": torch.zeros(5, dtype=torch.float64)},
    "counts must be [5], got [4]": {"counts": torch.zeros(4, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", BAD, ids=str)
def test_bad_arguments(message: str) -> None:
    arguments = {
        "logits": torch.randn(3, 5),
        "labels": torch.tensor([0, 1, 2]),
        "sums": torch.zeros(5, 5, dtype=torch.float64),
        "counts": torch.zeros(5, dtype=torch.int64),
        **BAD[message],
    }
    with pytest.raises(ValueError, match=r"^class_confusion: ") as caught:
        class_confusion(**arguments)
    text = str(caught.value)
    assert text.startswith(f"class_confusion: {message}")
    assert ".cpp" not in text and ".h:" not in text
    for name in ("sums", "counts"):  # nothing was added
        assert not arguments[name].any()
    if set(BAD[message]) <= {"logits", "labels"}:
        with pytest.raises(ValueError, match=r"^class_confusion: ") as caught:
            class_confusion(arguments["logits"], arguments["labels"])
        assert str(caught.value).startswith(f"class_confusion: {message}")


def test_mixed_devices() -> None:
    logits, labels = inputs((3, 5))
    sums, counts = class_confusion(logits, labels)
    with pytest.raises(ValueError, match=r"^class_confusion: labels and logits must be on the same device"):
        class_confusion(logits, labels.to("meta"))
    with pytest.raises(ValueError, match=r"^class_confusion: counts and sums must be on the same device"):
        class_confusion(logits, labels, sums=sums, counts=counts.to("meta"))


def test_expanded_statistics_are_refused_before_anything_is_written() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    counts = torch.zeros(3, dtype=torch.int64)
    expanded = torch.zeros(1, 3, dtype=torch.float64).expand(3, 3)
    with pytest.raises(
        ValueError, match=r"^class_confusion: sums is written in place and must not be expanded"
    ):
        class_confusion(logits, labels, sums=expanded, counts=counts)
    assert counts.tolist() == [0, 0, 0]


def test_statistics_that_a_graph_needs_are_not_changed_silently() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    sums, counts = class_confusion(logits, labels)
    w = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
    loss = (w * sums).sum()
    versions = sums._version, counts._version
    class_confusion(logits, labels, sums=sums, counts=counts)
    assert sums._version > versions[0] and counts._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="class_confusion: sums must not require grad"):
        class_confusion(logits, labels, sums=sums.requires_grad_(), counts=counts)


def test_sums_without_counts() -> None:
    logits, labels = inputs((3, 5))
    with pytest.raises(
        ValueError, match="class_confusion: sums and counts go together, got sums without counts"
    ):
        class_confusion(logits, labels, sums=torch.zeros(5, 5, dtype=torch.float64))
    with pytest.raises(
        ValueError, match="class_confusion: sums and counts go together, got counts without sums"
    ):
        class_confusion(logits, labels, counts=torch.zeros(5, dtype=torch.int64))
