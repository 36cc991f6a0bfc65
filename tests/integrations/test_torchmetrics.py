"""Our metrics as those of torchmetrics, and theirs as ours."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from torch import Tensor

torchmetrics = pytest.importorskip("torchmetrics", reason="needs torchmetrics")

from torchmetrics import MeanSquaredError, MetricCollection  # noqa: E402
from torchmetrics.classification import (  # noqa: E402
    MulticlassAccuracy,
    MulticlassAveragePrecision,
    MulticlassConfusionMatrix,
    MultilabelAveragePrecision,
)

from lossmeta.integrations.torchmetrics import as_torchmetrics, from_torchmetrics  # noqa: E402
from lossmeta.metrics import AveragePrecision, ErrorRate, Metric  # noqa: E402

ROOT = Path(__file__).parents[2]
OURS = pytest.mark.parametrize("kind", [ErrorRate, AveragePrecision])
Batch = tuple[Tensor, Tensor]


def batches(count: int = 3, n: int = 11, c: int = 4) -> list[Batch]:
    return [(torch.rand(n, c).softmax(1), torch.randint(c, (n,))) for _ in range(count)]


def of(metric: Any, given: list[Batch]) -> Tensor:
    for batch in given:
        metric.update(*batch)
    return metric.compute()


# ---- Ours as theirs.


@OURS
def test_is_a_metric_of_torchmetrics(kind: Any) -> None:
    given, ours = batches(), kind()
    theirs = as_torchmetrics(ours)
    assert isinstance(theirs, torchmetrics.Metric)
    assert theirs.higher_is_better is kind.higher_is_better
    expected = of(kind(), given)
    assert of(theirs, given) == expected
    assert ours.compute().isnan(), "the metric that was given is left alone"
    theirs.reset()
    for batch in given:
        assert theirs(*batch) == of(kind(), [batch])
    assert theirs.compute() == expected
    assert copy.deepcopy(theirs).compute() == theirs.clone().compute() == expected
    assert pickle.loads(pickle.dumps(theirs)).compute() == expected


@OURS
def test_starts_empty(kind: Any) -> None:
    given, ours = batches(2), kind()
    of(ours, given[:1])
    assert of(as_torchmetrics(ours), given[1:]) == of(kind(), given[1:])
    assert ours.compute() == of(kind(), given[:1])
    with pytest.warns(UserWarning, match="was called before"):
        assert as_torchmetrics(ours).compute().isnan()


@OURS
def test_weights_and_options(kind: Any) -> None:
    (scores, labels), weight = batches(1)[0], torch.rand(11)
    labels[3] = -1
    theirs = as_torchmetrics(kind(ignore_index=-1))
    theirs.update(scores, labels, weight=weight)
    assert theirs.compute() == kind(ignore_index=-1)(scores, labels, weight)


@OURS
def test_bad_input_is_refused_before_it_counts(kind: Any) -> None:
    given = batches(2)
    theirs = as_torchmetrics(kind())
    theirs.update(*given[0])
    for call in (theirs.update, theirs):
        with pytest.raises(ValueError, match=f"^{kind.__name__}: labels must lie in"):
            call(given[1][0], given[1][1] + 4)
    theirs.update(*given[1])
    assert theirs.compute() == of(kind(), given)


def test_forward_refuses_what_does_not_go_together() -> None:
    theirs, (scores, labels) = as_torchmetrics(AveragePrecision()), batches(1)[0]
    theirs(scores, labels)
    with pytest.raises(ValueError, match=r"^AveragePrecision: all batches must have a weight"):
        theirs(scores, labels, torch.ones(11))


@OURS
@pytest.mark.parametrize("persistent", [True, False])
def test_state_dict(kind: Any, persistent: bool) -> None:
    given = batches()
    saved, loaded = as_torchmetrics(kind()), as_torchmetrics(kind())
    saved.persistent(persistent)
    loaded.persistent(persistent)
    of(saved, given[:2])
    state = saved.state_dict()
    assert bool(state) == persistent
    if persistent:
        loaded.load_state_dict(state)
        assert of(loaded, given[2:]) == of(kind(), given)


@OURS
def test_moves_with_its_device(kind: Any) -> None:
    theirs = as_torchmetrics(kind())
    of(theirs, batches())
    meta = theirs.to("meta")
    assert all(
        t.device.type == "meta"
        for state in meta.metric_state.values()
        for t in (state if isinstance(state, list) else [state])
    )
    half = as_torchmetrics(kind()).half()  # as a module of a model that is made half
    assert of(half, [(torch.rand(5, 3), torch.tensor([0, 1, 2, 0, 1]))]).dtype == torch.float64


def test_lists_on_the_cpu_between_batches() -> None:
    theirs, given = as_torchmetrics(AveragePrecision()), batches()
    theirs.compute_on_cpu = True
    assert of(theirs, given) == of(AveragePrecision(), given)


def test_in_a_collection_with_theirs() -> None:
    given = batches()
    collection = MetricCollection(
        {
            "error": as_torchmetrics(ErrorRate()),
            "ap": as_torchmetrics(AveragePrecision()),
            "accuracy": MulticlassAccuracy(4, average="micro"),
            "their ap": MulticlassAveragePrecision(4, average="macro"),
        },
        prefix="valid/",
    )
    for preds, target in given:
        collection.update(preds=preds, target=target)
    found = collection.compute()
    torch.testing.assert_close(found["valid/error"].float(), 1 - found["valid/accuracy"])
    torch.testing.assert_close(found["valid/ap"].float(), found["valid/their ap"])
    assert found["valid/error"] == of(ErrorRate(), given)
    collection.reset()
    for batch in given:
        assert collection(*batch)["valid/error"] == of(ErrorRate(), [batch])


def test_a_collection_does_not_share_what_only_looks_alike() -> None:
    """It lets metrics share a state that is equal after the first batch."""
    scores = torch.tensor([[2.0, -1.0], [0.7, 3.0]])
    labels = torch.tensor([[1, 0], [1, 1]])
    collection = MetricCollection(
        {name: as_torchmetrics(ErrorRate(threshold=t)) for name, t in (("low", 0.0), ("high", 0.5))}
    )
    collection.update(scores, labels)
    collection.update(torch.full((2, 2), 0.3), labels)
    found = collection.compute()
    assert (found["low"], found["high"]) == (1 / 8, 3 / 8)


def test_several_labels() -> None:
    scores, labels = torch.rand(20, 3), torch.randint(2, (20, 3))
    collection = MetricCollection(
        {"ours": as_torchmetrics(AveragePrecision()), "theirs": MultilabelAveragePrecision(3)}
    )
    found = collection(scores, labels)
    torch.testing.assert_close(found["ours"].float(), found["theirs"])


class Custom(Metric):
    """Says nothing of how it joins."""

    higher_is_better = True


def test_a_metric_that_does_not_say_how_it_joins_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^as_torchmetrics: metric must say in `joined` how its state joins over processes, got Custom$",
    ):
        as_torchmetrics(Custom())
    for wrong in (MeanSquaredError(), 3, ErrorRate):
        with pytest.raises(
            TypeError, match=r"^as_torchmetrics: metric must be a lossmeta.metrics.Metric, got "
        ):
            as_torchmetrics(wrong)  # type: ignore[arg-type]


PROCESS = """
import warnings
from lossmeta.integrations.torchmetrics import as_torchmetrics
from lossmeta.metrics import AveragePrecision, ErrorRate
warnings.simplefilter("ignore")
results = []
for case in torch.load(f"{folder}/cases.pt", weights_only=True):
    kind = {"ErrorRate": ErrorRate, "AveragePrecision": AveragePrecision}[case["kind"]]
    metric = as_torchmetrics(kind(**case["options"]))
    try:
        for batch in case["batches"][rank]:
            metric.update(*batch)
        result = [metric.compute().item()]
        metric.update(*case["last"])  # each process goes on with what it had
        result.append(metric.compute().item())
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    results.append(result)
torch.save(results, f"{folder}/{rank}.pt")
"""


def in_two_processes(folder: Path, cases: list[dict[str, Any]]) -> list[list[Any]]:
    torch.save(cases, folder / "cases.pt")
    two_processes.run(PROCESS, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_processes_join(tmp_path: Path) -> None:
    """Uneven batches, a process without any, several labels, weights; what does not go together is refused by both."""
    a, b, c, last = batches(4)
    hot = [(torch.rand(5, 2), torch.randint(2, (5, 2))) for _ in range(3)]
    weighted = [(*batch, torch.rand(11)) for batch in (a, b)]
    cases: list[dict[str, Any]] = []
    expected: list[Any] = []

    def case(kind: Any, first: list[Any], second: list[Any], last: Any, **options: Any) -> None:
        cases.append({"kind": kind.__name__, "options": options, "batches": (first, second), "last": last})
        values = [of(kind(**options), [*first, *second, *more]).item() for more in ((), (last, last))]
        expected.append(values)

    for kind in (ErrorRate, AveragePrecision):
        case(kind, [a], [b, c], last)
        case(kind, [a, b], [], last)
        case(kind, [], [a], last)
        case(kind, weighted[:1], weighted[1:], weighted[0])
        options = {"threshold": 0.5} if kind is ErrorRate else {}
        case(kind, hot[:1], [hot[1], (hot[2][0][:3], hot[2][1][:3])], hot[2], **options)
    cases += [
        {"kind": "AveragePrecision", "options": {}, "batches": pair, "last": last}
        for pair in (([a], hot[:1]), (weighted[:1], [b]), ([a], [(b[0].double(), b[1])]))
    ]
    for found in in_two_processes(tmp_path, cases):
        assert found[: len(expected)] == [pytest.approx(e, nan_ok=True) for e in expected]
        for refused in found[len(expected) :]:
            assert refused.startswith(
                "ValueError: AveragePrecision: the batches of all processes must be of one kind, got "
            )


# ---- Theirs as ours.


def test_theirs_as_ours() -> None:
    given = batches()
    ours = from_torchmetrics(MulticlassAccuracy(4, average="micro"))
    assert isinstance(ours, Metric)
    assert ours.higher_is_better is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.compute().isnan()
    for batch in given:
        assert ours(*batch).item() == pytest.approx(1 - of(ErrorRate(), [batch]).item())
    assert ours.compute().dtype == torch.float64
    assert ours.compute().item() == pytest.approx(1 - of(ErrorRate(), given).item())
    alone = copy.deepcopy(ours)
    alone.reset()
    assert alone.compute().isnan()
    assert not ours.compute().isnan()
    ours.reset()
    assert of(ours, given).item() == pytest.approx(1 - of(ErrorRate(), given).item())


def test_direction() -> None:
    assert from_torchmetrics(MeanSquaredError()).higher_is_better is False
    assert from_torchmetrics(MulticlassConfusionMatrix(3), higher_is_better=True).higher_is_better is True
    with pytest.raises(
        ValueError,
        match=r"^from_torchmetrics: higher_is_better must be given, MulticlassConfusionMatrix does not say$",
    ):
        from_torchmetrics(MulticlassConfusionMatrix(3))
    with pytest.raises(
        ValueError,
        match=r"^from_torchmetrics: higher_is_better must be False, as MeanSquaredError says, got True$",
    ):
        from_torchmetrics(MeanSquaredError(), higher_is_better=True)
    combined = from_torchmetrics(1 - MulticlassAccuracy(4, average="micro"), higher_is_better=False)
    given = batches()
    assert of(combined, given).item() == pytest.approx(of(ErrorRate(), given).item())


def test_regression() -> None:
    ours = from_torchmetrics(MeanSquaredError())
    pred, target = torch.randn(2, 9)
    assert ours(pred, target).item() == pytest.approx((pred - target).square().mean().item())


def test_what_is_not_one_number_is_refused() -> None:
    for metric, got in (
        (MulticlassAccuracy(4, average=None), r"\[4\]"),
        (MulticlassConfusionMatrix(4), r"\[4, 4\]"),
    ):
        ours = from_torchmetrics(metric, higher_is_better=True)
        with pytest.raises(
            ValueError, match=rf"^from_torchmetrics: {type(metric).__name__} must give one number, got {got}$"
        ):
            of(ours, batches())
    with pytest.raises(
        TypeError,
        match=r"^from_torchmetrics: metric must be one metric of torchmetrics, got MetricCollection",
    ):
        from_torchmetrics(MetricCollection([MeanSquaredError()]))
    with pytest.raises(TypeError, match=r"^from_torchmetrics: metric must be one metric .* got ErrorRate"):
        from_torchmetrics(ErrorRate())
    scores, labels = batches(1)[0]
    with pytest.raises(
        ValueError, match=r"^from_torchmetrics: weight must be None, MulticlassAccuracy takes none"
    ):
        from_torchmetrics(MulticlassAccuracy(4)).update(scores, labels, torch.ones(11))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MulticlassAccuracy(4, average="micro"),
        lambda: MulticlassAveragePrecision(4, average="macro"),
        lambda: 1 - MulticlassAccuracy(4, average="micro"),
        lambda: as_torchmetrics(ErrorRate()),
        lambda: as_torchmetrics(AveragePrecision()),
    ],
)
def test_state_is_that_of_every_metric_within(make: Any) -> None:
    """Also where it is not persistent, and resumed it goes on to the same value."""
    given = batches()
    metrics = [make() for _ in range(3)]
    whole, first, resumed = (
        from_torchmetrics(m, True if m.higher_is_better is None else None) for m in metrics
    )
    for batch in given:
        whole.update(*batch)
    for batch in given[:2]:
        first.update(*batch)
    resumed.load_state_dict(first.state_dict())
    first.reset()
    resumed.update(*given[2])
    assert resumed.compute() == whole.compute()


def test_there_and_back() -> None:
    given = batches()
    assert of(from_torchmetrics(as_torchmetrics(ErrorRate())), given) == of(ErrorRate(), given)


def test_without_the_library(tmp_path: Path) -> None:
    (tmp_path / "torchmetrics.py").write_text("raise ModuleNotFoundError(\"No module named 'torchmetrics'\")")
    (tmp_path / "pytorch_metric_learning.py").write_text("raise ImportError('it is broken')")
    for name, reason in (
        ("torchmetrics", "No module named 'torchmetrics'"),
        ("pytorch_metric_learning", "it is broken"),
    ):
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lossmeta.integrations.{name}"
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert result.stderr.splitlines()[-1] == (
            f"ImportError: lossmeta.integrations.{name}: {name.replace('_', '-')} must be installed, got {reason!r}; "
            'pip install "lossmeta[integrations]"'
        )


def test_example(run_example: Callable[[str], str]) -> None:
    printed = run_example("torchmetrics_metrics.py")
    shown = dict(line.split(": ") for line in printed.splitlines())
    assert float(shown["error"]) == pytest.approx(1 - float(shown["accuracy"]), abs=1e-4)
    assert 0.5 < float(shown["average precision"]) <= 1
