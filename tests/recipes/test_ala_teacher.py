"""Learning to teach: the policy that chooses samples, its episodes, and Phi that follows a validation gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_images import TINY
from torch import Tensor

from lossmeta.experiments import Diverged, Trial
from lossmeta.ops import parametric_cross_entropy
from lossmeta.recipes import _ala_learning_to_teach
from lossmeta.recipes._ala_dynamic_loss import dynamic_loss, learner_of
from lossmeta.recipes._ala_images import ImageFit, Images, draw
from lossmeta.recipes._ala_learning_to_teach import goal_of, learning_to_teach, taught
from lossmeta.recipes._ala_tasks import CLEAN
from lossmeta.recipes._ala_teacher import OPEN, Reinforce, Teacher, choices, log_probability, states

CPU = torch.device("cpu")
N, C = 40, 4
MakeTrial = Callable[..., Trial]


def teacher_of(features: int = 2 * C + 5, seed: int = 0) -> Teacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Teacher(features)


def moved(teacher: Teacher, seed: int = 1) -> Teacher:
    """One whose weights are not those of the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    return teacher


def seen(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(N, C, generator=generator)
    return states(logits, torch.arange(N) % C, 0.25, torch.tensor(1.5), -0.6)


# ---- The policy.


def test_what_the_teacher_sees() -> None:
    logits, labels = torch.randn(N, C, generator=torch.Generator().manual_seed(3)), torch.arange(N) % C
    found = states(logits, labels, 0.25, torch.tensor(1.5), -0.6)
    assert found.shape == (N, 2 * C + 5)
    for i in range(N):
        p = [math.exp(v) for v in logits[i].tolist()]
        p = [v / sum(p) for v in p]
        y = int(labels[i])
        other = max(v for c, v in enumerate(p) if c != y)
        expected = [
            *(float(c == y) for c in range(C)),
            *p,
            -math.log(p[y]) / math.log(C),
            p[y] - other,
            0.25,
            1.5 / math.log(C),
            -0.6,
        ]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-6)


def test_log_probability() -> None:
    """Of all choices together they are those of a distribution, and both agree with the sigmoid."""
    logits = moved(teacher_of())(seen()).double()
    chosen = log_probability(logits, torch.ones_like(logits)).exp()
    left_out = log_probability(logits, torch.zeros_like(logits)).exp()
    torch.testing.assert_close(chosen, 1 / (1 + (-logits).exp()))
    torch.testing.assert_close(chosen + left_out, torch.ones_like(logits))
    assert chosen.std() > 0.05


def test_choices_have_these_probabilities() -> None:
    logits = torch.tensor([-30.0, -1.0, 0.0, 2.0, 30.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([choices(logits, generator) for _ in range(4000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), logits.sigmoid(), atol=0.03, rtol=0)
    assert not drawn[:, 0].any() and drawn[:, 4].all()


def test_an_untaught_teacher_chooses_by_chance() -> None:
    """Whatever it sees: as a coin that it is the same for all samples, thrown with the same numbers."""
    teacher = teacher_of(seed=5)
    logits = torch.cat([teacher(seen(seed)) for seed in range(3)])
    assert torch.equal(logits, torch.full_like(logits, OPEN))
    found = choices(logits, torch.Generator().manual_seed(7))
    uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(7))
    assert torch.equal(found, (uniform < 1 / (1 + math.exp(-OPEN))).float())
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_reward_raises_the_probability_of_what_was_chosen(gain: float) -> None:
    """And lowers it where the reward was below the baseline."""
    teacher = moved(teacher_of())
    x, generator = seen(), torch.Generator().manual_seed(2)
    learner = Reinforce(teacher, 1e-3, baseline=0.3)
    kept = []
    for _ in range(3):
        logits = teacher(x)
        chosen = choices(logits, generator)
        learner.remember(logits, chosen)
        kept.append(chosen)
    before = torch.stack([log_probability(teacher(x), chosen) for chosen in kept]).mean()
    learner.learn(0.3 + gain)
    after = torch.stack([log_probability(teacher(x), chosen) for chosen in kept]).mean()
    assert (after - before).sign() == gain
    assert learner.baseline == pytest.approx(0.9 * 0.3 + 0.1 * (0.3 + gain))


def test_what_reinforce_follows() -> None:
    """The mean of the gradients of each choice's log-probability, times what the reward is above the baseline."""
    teacher = moved(teacher_of())
    reference = copy.deepcopy(teacher).double()
    learner = Reinforce(teacher, 1e-3, baseline=-1.0)
    generator = torch.Generator().manual_seed(2)
    sums = [torch.zeros_like(p) for p in reference.parameters()]
    for seed in range(3):
        x = seen(seed)
        logits = teacher(x)
        chosen = choices(logits, generator)
        learner.remember(logits, chosen)
        for state, action in zip(x.double(), chosen, strict=True):
            p = reference(state[None]).sigmoid()
            own = (p if action else 1 - p).log().sum()
            for total, g in zip(sums, torch.autograd.grad(own, list(reference.parameters())), strict=True):
                total += g
    taken = []
    learner.optimizer.register_step_pre_hook(
        lambda *_: taken.extend(p.grad.clone() for p in teacher.parameters() if p.grad is not None)
    )
    learner.learn(1.5)
    assert len(taken) == len(sums)
    for g, total in zip(taken, sums, strict=True):
        torch.testing.assert_close(g.double(), -2.5 * total / (3 * N), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters()) and learner.steps == 0


def test_the_baseline_s_reward_teaches_nothing() -> None:
    teacher = moved(teacher_of())
    start = copy.deepcopy(teacher.state_dict())
    learner = Reinforce(teacher, 0.1, baseline=0.7)
    logits = teacher(seen())
    learner.remember(logits, choices(logits, torch.Generator().manual_seed(0)))
    learner.learn(0.7)
    assert all(torch.equal(v, start[k]) for k, v in teacher.state_dict().items())


def test_it_learns_whom_to_leave_out() -> None:
    """Samples of one class cost what they are chosen for; in 60 episodes the teacher finds which."""
    teacher = teacher_of()
    learner = Reinforce(teacher, 0.05, baseline=0.0)
    generator = torch.Generator().manual_seed(4)
    for episode in range(60):
        x = seen(episode)
        logits = teacher(x)
        chosen = choices(logits, generator)
        learner.remember(logits, chosen)
        bad = x[:, 0] == 1
        learner.learn(float(chosen[~bad].mean() - chosen[bad].mean()))
    x = seen(100)
    p = teacher(x).detach().sigmoid()
    assert p[x[:, 0] == 1].mean() < p[x[:, 0] == 0].mean() - 0.2


# ---- Trainings under a teacher.


@pytest.fixture
def trial(images: None, make_trial: MakeTrial) -> Trial:
    return make_trial(draw(CLEAN, TINY, 0, CPU), steps=24)


def test_all_samples_chosen_is_plain_training(trial: Trial) -> None:
    teacher = Teacher(25)
    with torch.no_grad():
        teacher.network[-1].bias.fill_(50.0)  # type: ignore[union-attr, operator]
    fit, plain = ImageFit(trial, 0.1), ImageFit(trial, 0.1)
    steps, share = taught(fit, teacher, torch.Generator())
    for _, x, y in plain.batches():
        plain.step(F.cross_entropy(plain.model(x), y))
    assert (steps, share) == (24, 1.0)
    for a, b in zip(fit.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_samples_that_are_not_chosen_do_not_train(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is that of a batch of the chosen samples alone; one without any changes nothing at first."""
    kept: list[Tensor] = []

    def every_other(odds: Tensor, generator: torch.Generator) -> Tensor:
        kept.append(torch.arange(len(odds)) % 2 * float(len(kept) > 0))
        return kept[-1]

    monkeypatch.setattr(_ala_learning_to_teach, "choices", every_other)
    fit, plain = ImageFit(trial, 0.1), ImageFit(trial, 0.1)
    _, share = taught(fit, Teacher(25), torch.Generator())
    for i, x, y in plain.batches():
        if i:
            plain.step(F.cross_entropy(plain.model(x[1::2]), y[1::2]))
    assert share == pytest.approx(0.5 * 23 / 24)
    for a, b in zip(fit.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_episode_ends_at_its_goal(trial: Trial) -> None:
    goal, reached = goal_of(ImageFit(trial, 0.03, 1))
    assert reached % TINY.window == 0 and 0 < reached <= 12 and -1 < goal < 0
    generator = torch.Generator().manual_seed(0)
    assert taught(ImageFit(trial, 0.03), Teacher(25), generator, goal=-1.0)[0] == TINY.window
    assert taught(ImageFit(trial, 0.03), Teacher(25), generator, goal=0.1)[0] == 24


def lessons(trial: Trial, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[float], Any]:
    """The rewards that the teacher has got, and what was measured."""
    rewards: list[float] = []
    learn = Reinforce.learn

    def noted(self: Reinforce, reward: float) -> None:
        rewards.append(reward)
        learn(self, reward)

    monkeypatch.setattr(Reinforce, "learn", noted)
    return rewards, learning_to_teach("", 0.03, teacher_rate=0.1, **options).train(trial)


def test_episodes_are_rewarded_for_their_speed(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards, found = lessons(trial, monkeypatch, episodes=3)
    possible = {round(-math.log(i / 24), 9) for i in range(TINY.window, 25, TINY.window)}
    assert len(rewards) == 3 and {round(r, 9) for r in rewards} <= possible
    assert found["steps of the first episodes"] == pytest.approx(sum(24 * math.exp(-r) for r in rewards) / 3)
    assert 0.5 < found["share chosen"] < 1


def test_a_reward_by_chance_knows_nothing_of_the_episode(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards, found = lessons(trial, monkeypatch, episodes=8, reward="chance")
    assert all(0 <= r <= math.log(24) for r in rewards) and len({round(r, 6) for r in rewards}) > 3
    lengths = found["steps of the first episodes"]
    assert sum(24 * math.exp(-r) for r in rewards) / 8 != pytest.approx(lengths)


def test_an_episode_that_diverges_teaches_nothing(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when the choices before it was seen to have gradients that are NaN."""
    whole, broken = _ala_learning_to_teach.taught, []

    def torn(fit: ImageFit, *a: Any, **k: Any) -> tuple[int, float]:
        if fit.child and not broken:
            broken.append(fit)
            step = fit.step

            def to_nan(loss: Tensor) -> None:
                step(loss * torch.nan)

            monkeypatch.setattr(fit, "step", to_nan)
        return whole(fit, *a, **k)

    monkeypatch.setattr(_ala_learning_to_teach, "taught", torn)
    rewards, found = lessons(trial, monkeypatch, episodes=2)
    assert len(rewards) == 1 and found["steps of the first episodes"] > 12
    assert 0 < found["share chosen"] < 1


def test_the_same_trial_gives_the_same(trial: Trial) -> None:
    method = learning_to_teach("", 0.03, teacher_rate=0.1, episodes=2)
    before = torch.get_rng_state()
    assert method.train(trial) == method.train(trial)
    assert torch.equal(before, torch.get_rng_state())


# ---- Phi by gradient.


def in_float64(drawn: Images) -> Images:
    parts = {name: getattr(drawn, name) for name in ("train", "valid", "test")}
    return replace(drawn, **{name: (x.double(), y) for name, (x, y) in parts.items()})


def test_phi_moves_against_the_validation_gradient(images: None, make_trial: MakeTrial) -> None:
    """That of the validation loss after the step, by finite differences through whole steps."""
    trial = make_trial(in_float64(draw(CLEAN, TINY, 0, CPU)), steps=24)
    rate, meta_rate, h = 0.5, 1e-2, 1e-5

    def started() -> ImageFit:
        fit = ImageFit(trial, rate)
        fit.model.double()
        return fit

    batch, valid = (trial.data.train[0][:16], trial.data.train[1][:16]), trial.data.valid

    def after_a_step(phi: Tensor) -> float:
        fit = started()
        fit.step(parametric_cross_entropy(fit.model(batch[0]), batch[1], phi))
        with torch.no_grad():
            return F.cross_entropy(fit.model(valid[0]), valid[1]).item()

    identity = torch.eye(10, dtype=torch.float64)
    expected = torch.zeros_like(identity)
    rows = batch[1].unique().tolist()
    for i in rows:
        for j in range(10):
            change = torch.zeros_like(identity)
            change[i, j] = h
            expected[i, j] = (after_a_step(identity + change) - after_a_step(identity - change)) / (2 * h)
    fit = started()
    learner = learner_of(fit, meta_rate)
    (phi,) = learner.loss.parameters()
    taken: list[Tensor] = []
    assert learner.meta_optimizer is not None
    learner.meta_optimizer.register_step_pre_hook(lambda *_: taken.append(phi.grad.clone()))
    report = learner.step(batch, valid)
    assert report.skipped is None and report.task_loss is not None
    assert report.task_loss.item() == pytest.approx(after_a_step(identity), rel=1e-9)
    (gradient,) = taken
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
    clear = expected.abs() > 1e-6
    assert clear.sum() >= 5 * len(rows)
    # The first step of Adam is as large as its rate.
    torch.testing.assert_close(
        (phi.detach() - identity)[clear], -meta_rate * expected.sign()[clear], rtol=1e-2, atol=0
    )


def test_dynamic_loss_trains_by_phi_and_on_validation_rows(trial: Trial) -> None:
    found = dynamic_loss("", 0.1, 1e-2).train(trial)
    assert 0 < found["distance from the identity"] < 24 * 1e-2  # type: ignore[operator]
    other = replace(trial.data, valid=(trial.data.valid[0], trial.data.valid[1].flip(0)))
    changed = dynamic_loss("", 0.1, 1e-2).train(replace(trial, data=other))
    assert changed["distance from the identity"] != found["distance from the identity"]


def test_dynamic_loss_that_diverges(trial: Trial) -> None:
    with pytest.raises(Diverged):
        dynamic_loss("", 1e30, 1e-2).train(trial)
