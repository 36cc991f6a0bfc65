"""What the controller measures, who is rewarded for what, and how entries move."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from controllers import Told, equal, made, network, restless, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_problem import CLASSES, Counted, data, margin

from lossmeta.ala import (
    ClassCorrelation,
    DistanceMixture,
    FocalWeighting,
    LogitAdjustment,
    LossSpace,
    Robust,
)
from lossmeta.metrics import ErrorRate

# ---- Rewards (Eq. 4 and 5).


@given(
    st.integers(1, 6),
    st.floats(0.05, 1.0),
    st.booleans(),
    st.lists(st.floats(-3, 3).map(lambda v: round(v, 2)), min_size=18, max_size=18),
)
def test_the_discounted_sum_and_its_sign(
    window: int, discount: float, higher: bool, values: list[float]
) -> None:
    controller = made(
        metric=Told(*values), window=window, evaluations=window, discount=discount, higher_is_better=higher
    )
    reports = run(controller, 3 * window)
    assert len(reports) == 3 and controller.windows == 3
    sums = []
    for w, report in enumerate(reports):
        weights = [discount ** (window - j) for j in range(1, window + 1)]
        found = math.fsum(g * values[w * window + j] for j, g in enumerate(weights))
        direction = 1 if higher else -1
        assert report.metric.shape == (1, 1)
        assert report.metric.item() == pytest.approx(direction * found / math.fsum(weights), abs=1e-9)
        sums.append(found)
        if w == 0:
            assert report.reward is None
        elif abs(sums[w] - sums[w - 1]) > 1e-9:
            assert report.reward is not None
            assert report.reward.tolist() == [math.copysign(1, direction * (sums[w] - sums[w - 1]))]


@pytest.mark.parametrize(
    ("window", "discount", "evaluations"),
    [(200, 0.9, 4), (10, 1.0, 5), (7, 0.5, 3), (4, 0.9, 1), (5, 0.9, 4), (50, 0.97, 7), (20, 1e-3, 3)],
)
def test_fewer_evaluations(window: int, discount: float, evaluations: int) -> None:
    """Each stands for as large a part of the weights: the last step, and where the next part begins before it."""
    weights = [discount ** (window - j) for j in range(1, window + 1)]
    expected: list[int] = []
    for part in range(evaluations):
        behind, j = 0.0, window
        while j > 1 and behind + weights[j - 1] <= part / evaluations * math.fsum(weights) * (1 + 1e-9):
            behind += weights[j - 1]
            j -= 1
        expected.append(min(j, expected[-1] - 1) if expected else window)
    metric = Told(1.0, 5.0, 2.0)
    controller = made(metric=metric, window=window, evaluations=evaluations, discount=discount)
    asked, model = [], network()
    for step in range(1, window + 1):
        before = metric.asked
        report = controller.step(model)
        asked += [step] * (metric.asked - before)
        assert (report is None) == (step < window)
    assert asked == sorted(expected)
    assert report is not None
    assert report.metric.item() == pytest.approx(sum(([1.0, 5.0, 2.0] * 3)[:evaluations]) / evaluations)


@given(st.integers(1, 60), st.floats(1e-6, 1.0), st.data())
def test_as_many_evaluations_as_asked_for(window: int, discount: float, drawn: st.DataObject) -> None:
    evaluations = drawn.draw(st.integers(1, window))
    measured = made(window=window, discount=discount, evaluations=evaluations).measured
    assert len(measured) == evaluations and window in measured and min(measured) >= 1


def test_the_first_window_has_the_defaults() -> None:
    controller = made(window=3, evaluations=1)
    model = network()
    for _ in range(2):
        controller.step(model)
        assert controller.policy is None
        assert controller.values["diagonal"].tolist() == [1.0] * 3 and not controller.values["pairs"].any()
    report = controller.step(model)
    assert report is not None and report.reward is None and controller.policy is not None
    assert report.entropy == pytest.approx(math.log(3), rel=0.05)
    assert any(v.any() for v in (controller.values["diagonal"] - 1, controller.values["pairs"]))


def test_several_metrics_with_weights() -> None:
    first, second = Told(1, 2, 3, 3, 2), Told(5, 4, 5, 6, 6)
    controller = made(metric=[(first, 3.0), (second, 1.0)])
    rewards = [r.reward for r in run(controller, 5)][1:]
    assert [r.item() for r in rewards if r is not None] == [0.5, 1.0, 0.25, -0.75]
    assert run(controller, 1)[0].metric.tolist() == [[1.0], [5.0]]


def test_metrics_that_cancel_are_no_tie() -> None:
    controller = made(metric=[(Told(1, 2, 3), 1.0), (Told(3, 2, 1), 1.0)])
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports = [controller.step(model) for _ in range(3)]
    assert reports[2] is not None and reports[2].reward is not None
    assert reports[2].reward.item() == 0 and controller.ties == 0


def test_rewarded_on_other_data() -> None:
    """The metric there, the statistics on the validation data."""
    valid, other = data(40, 1), data(15, 2)
    seen = []

    class Seen(Robust):
        def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
            seen.append((prediction, target))
            return super().statistics(prediction, target, values)

    controller = made(Seen(), margin, valid, rewarded_on=other)
    model = network().eval()
    (report,) = run(controller, 1, model)
    assert report.metric.item() == pytest.approx(margin(model(other[0]), other[1]).item())
    torch.testing.assert_close(seen[0][0], model(valid[0]).detach())
    assert torch.equal(seen[0][1], valid[1])


@pytest.mark.parametrize(
    "kind", ["metric", "function", "other library", "loader", "batches", "list", "mapping"]
)
def test_kinds_of_metrics_and_of_validation_data(kind: str) -> None:
    x, y = valid = data(40, 1)
    metric: Any = ErrorRate()
    options: dict[str, Any] = {}
    given_data: Any = valid
    if kind == "function":
        metric, options = (lambda p, t: (p.argmax(1) != t).float().mean()), {"higher_is_better": False}
    if kind == "other library":
        with pytest.raises(ValueError, match="higher_is_better must be given, Counted does not say"):
            made(metric=Counted())
        metric, options = Counted(), {"higher_is_better": False}
    if kind == "loader":
        given_data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 15)
    if kind in ("batches", "list"):
        given_data = list(zip(x.split(15), y.split(15), strict=True)) if kind == "batches" else [x, y]
    if kind == "mapping":
        given_data = ({"input": x}, y)
    controller = made(metric=metric, valid=given_data, **options)
    model = network().eval()
    (report,) = run(controller, 1, model)
    expected = (model(x).argmax(1) != y).double().mean()
    assert report.metric.item() == pytest.approx(-expected.item(), abs=1e-7)
    if kind == "other library":
        assert metric.all == 0


def test_outputs_of_models() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x, "scores": self.inner(x)}

    model = Model()
    reference = run(made(), 1, model.inner)[0].metric
    for output in ("scores", lambda found: found["scores"]):
        assert torch.equal(run(made(output=output), 1, model)[0].metric, reference)
    with pytest.raises(TypeError, match="Controller: the model must return a tensor, or output must say"):
        made().step(model)


# ---- Children.


def test_children_have_their_own_losses_and_share_a_policy() -> None:
    controller = made(children=3, seed=4)
    models = [network(i).eval() for i in range(3)]
    (report,) = run(controller, 1, models)
    x, y = data(40, 1)
    expected = torch.stack([margin(m(x), y) for m in models]).double()
    torch.testing.assert_close(report.metric[0], expected.detach())
    pairs = [loss.values["pairs"].tolist() for loss in controller.losses]
    assert len({str(p) for p in pairs}) > 1
    assert controller.values["pairs"].tolist() == pairs[0]
    assert controller.learner is not None and controller.policy is controller.learner.policy
    run(controller, 1, models)
    assert len(controller.learner.memory) == 3
    with pytest.raises(ValueError, match="with 3 children the loss must be one of losses"):
        controller(models[0](x), y)
    loss = controller.losses[1](models[1](x), y)
    assert loss == controller.space(
        models[1](x), y, {k: v.float() for k, v in controller.losses[1].values.items()}
    )


def test_children_are_rewarded_for_what_they_did() -> None:
    controller = made(metric=Told(1, 5, 2, 4), children=2)
    second = run(controller, 2)[1]
    assert second.reward is not None and second.reward.tolist() == [1, -1]


def test_a_wrong_number_of_models() -> None:
    controller = made(children=2)
    for models in (network(), [network()], [network()] * 3):
        with pytest.raises(ValueError, match=r"model must be 2 models, one of each child, got \d"):
            controller.step(models)
    assert controller.steps_done == 0


def test_a_child_that_diverges_leaves_the_others_their_rewards() -> None:
    nan = float("nan")
    controller = made(metric=Told(nan, 1, nan, 2, nan, 1), children=2)
    reports = run(controller, 3)
    assert [r.reward[1].item() for r in reports[1:] if r.reward is not None] == [1, -1]
    assert controller.skipped == 3 and not controller.losses[0]._u.any()
    assert controller.learner is not None and len(controller.learner.memory) == 2


def test_what_the_policy_sees() -> None:
    """Of each child its own statistics, where its entries stand, and how far the training is."""
    controller = restless(window=3, children=2, steps=24, valid=data(40, 1))
    models = [network(0).eval(), network(1).eval()]
    assert controller.space.parameters[0].policy == "class pairs"
    seen, places = [], []
    for _ in range(8):
        places.append([[controller.losses[i].values[n] for n in ("diagonal", "pairs")] for i in range(2)])
        run(controller, 3, models)
        seen.append([e.states["class pairs"] for e in controller.pending if e is not None])
    x, y = data(40, 1)
    for window, (found, stood) in enumerate(zip(seen, places, strict=True)):
        for state, (diagonal, pairs), model in zip(found, stood, models, strict=True):
            assert state.shape == (6, 24) and state[:, -1].tolist() == pytest.approx([(window + 1) / 8] * 6)
            expected = torch.cat([(diagonal - 0.1) / 1.9 * 2 - 1, pairs])
            torch.testing.assert_close(state[:, -2], expected.float())
            if window == 0:
                statistics = controller.space.statistics(model(x), y, {})
                both = torch.cat([statistics["diagonal"], statistics["pairs"]])
                now = (both - both.mean(0)) / both.std(0, correction=0)
                torch.testing.assert_close(state[:, :2], now, rtol=1e-3, atol=1e-3)
    assert seen[-1][0][:, -1].tolist() == [1.0] * 6
    run(controller, 3, models)
    assert all(e is not None and (e.states["class pairs"][:, -1] == 1).all() for e in controller.pending)


# ---- Actions.


@given(
    st.sampled_from([0.1, 0.37, 1.0, 4.0]),
    st.integers(0, 100),
    st.sampled_from(["correlation", "mixture", "focal", "product"]),
)
def test_every_entry_moves_by_a_step_or_stays_or_is_stopped_by_its_bounds(
    step_size: float, seed: int, kind: str
) -> None:
    spaces: dict[str, LossSpace] = {
        "correlation": ClassCorrelation(CLASSES),
        "mixture": DistanceMixture(),
        "focal": FocalWeighting(),
        "product": Robust() * LogitAdjustment(torch.ones(3)),
    }
    controller = made(spaces[kind], step_size=step_size, seed=seed)
    model = network()
    for _ in range(6):
        before = controller.values
        run(controller, 1, model)
        for p in spaces[kind].parameters:
            start, end = before[p.name].reshape(-1), controller.values[p.name].reshape(-1)
            assert (end >= p.low - 1e-12).all() and (end <= p.high + 1e-12).all()
            options = torch.stack(
                [(start + a * step_size * p.scale).clamp(p.low, p.high) for a in (-1, 0, 1)]
            )
            assert ((options - end).abs() < 1e-12).any(0).all()


def test_the_matrix_stays_symmetric() -> None:
    space = ClassCorrelation(4)
    valid = (torch.randn(30, 4), torch.randint(4, (30,)))
    controller = made(space, valid=valid)
    run(controller, 5, nn.Linear(4, 4))
    v = controller.values
    phi = space.matrix(v["diagonal"], v["pairs"])
    assert torch.equal(phi, phi.T) and v["pairs"].unique().numel() > 1
    assert (phi - torch.diag(phi.diag())).abs().max() <= 1 and phi.diag().min() >= 0.1


def test_entries_without_statistics_stay() -> None:
    """Without any sample of the last class, and with one of a single class."""
    x, y = data(40, 1)
    controller = made(valid=(x[y < 2], y[y < 2]))
    run(controller, 8)
    rows, columns = controller.space.rows, controller.space.columns  # type: ignore[attr-defined]
    assert controller.values["diagonal"][2] == 1 and (controller.values["diagonal"][:2] != 1).any()
    assert not controller.values["pairs"][columns == 2].any()
    one = made(valid=(x[y == 1], y[y == 1]))
    run(one, 8)
    assert one.values["diagonal"][[0, 2]].tolist() == [1, 1] and not one.values["pairs"].any()
    assert rows.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "space",
    [
        Robust(),
        ClassCorrelation(CLASSES),
        DistanceMixture(),
        FocalWeighting(),
        LogitAdjustment(torch.ones(3)),
    ],
)
def test_validation_data_of_one_sample(space: LossSpace) -> None:
    x, y = data(40, 1)
    controller = made(space, valid=(x[:1], y[:1]))
    reports = run(controller, 6)
    assert controller.windows == 6 and all(math.isfinite(r.entropy) for r in reports)
    assert all(v.isfinite().all() for v in controller.values.values())


def test_where_nothing_is_known_nothing_moves() -> None:
    """Nor does it matter what the defaults of PyTorch are."""

    class Blind(Robust):
        def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
            return {"q": torch.full((1, 2), torch.nan)}

    model, valid = network(), data(40, 1)
    torch.set_default_dtype(torch.float64)
    try:
        controller = restless(Blind(), valid=valid)
        run(controller, 4, model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert controller.values["q"] == 0 and controller.windows == 4
    assert all(p.isfinite().all() for p in controller.policy.parameters())  # type: ignore[union-attr]


def test_labels_that_do_not_count() -> None:
    x, y = data(40, 1)
    few = y.clone()
    few[::2] = -100

    def counted(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target, ignore_index=-100)

    for space in (ClassCorrelation(CLASSES), Robust(), LogitAdjustment(torch.ones(3))):
        controller, reference = made(space, counted, (x, few)), made(space, counted, (x[1::2], y[1::2]))
        run(controller, 5)
        run(reference, 5)
        assert equal(controller.values, reference.values)
