"""Learning to teach (L2T): whole trainings teach a teacher, whose choice of samples then trains the network."""

from __future__ import annotations

import math
from statistics import median_low

import torch
import torch.nn.functional as F

from lossmeta.experiments import Diverged, Method, Trial
from lossmeta.recipes._ala_images import ImageFit
from lossmeta.recipes._ala_rules import CrossEntropy
from lossmeta.recipes._ala_tasks import CLASSES, SEARCH
from lossmeta.recipes._ala_teacher import Reinforce, Teacher, choices, states

FIRST_EPISODE = 200  # the child whose network it trains; the next episode has the next one's
COUNTED = 10  # episodes at the beginning and at the end whose lengths are reported


def taught(
    fit: ImageFit,
    teacher: Teacher,
    generator: torch.Generator,
    learner: Reinforce | None = None,
    goal: float = math.inf,
) -> tuple[int, float]:
    """Trains a network on the samples that the teacher chooses of each batch.

    Where none is chosen the gradient is 0. The whole batch is predicted, so that BatchNorm sees all samples.

    Args:
        fit: to be trained.
        teacher: chooses.
        generator: of its choices.
        learner: remembers them; it does not learn yet.
        goal: validation metric, the higher the better, at which to stop. It is measured after every window.

    Returns:
        Steps until then, or all; and the share of the samples that were chosen.

    Raises:
        Diverged: by the end of the window.
    """
    past = torch.zeros((), device=fit.drawn.train[0].device)
    share, best, steps = past.clone(), fit.selection(), 0
    for i, x, y in fit.batches():
        logits = fit.model(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        odds = teacher(states(logits.detach(), y, i / fit.steps, past, best))
        chosen = choices(odds, generator)
        if learner is not None:
            learner.remember(odds, chosen)
        fit.step(chosen @ losses / chosen.sum().clamp_min(1))
        steps = i + 1
        past = past + (losses.detach().mean() - past) / steps
        share = share + (chosen.mean() - share) / steps
        if steps % fit.setting.window == 0 or steps == fit.steps:
            now = fit.selection()
            best = max(best, now)
            if now >= goal:
                break
    return steps, share.item()


def goal_of(fit: ImageFit) -> tuple[float, int]:
    """The median validation metric of a plain training before its learning rate drops, and when it first had that."""
    rule, values = CrossEntropy(fit), []
    end = max(1, fit.drops[0])
    for i, x, y in fit.batches():
        fit.step(rule.loss(i, x, y))
        if (i + 1) % fit.setting.window == 0 or i + 1 == end:
            values.append((fit.selection(), i + 1))
        if i + 1 == end:
            break
    goal = median_low(value for value, _ in values)
    return goal, next(step for value, step in values if value >= goal)


def learning_to_teach(
    label: str,
    rate: float,
    *,
    episodes: int,
    teacher_rate: float = 0.0,
    reward: str = "speed",
) -> Method:
    r"""A network trained under a teacher that earlier trainings have taught (Fan et al., 2018).

    An episode trains a network with first weights of its own until its validation metric reaches a goal, after i of T
    steps, and is rewarded by :math:`-\log(i / T)`. The reported network has the first weights and the batches of the
    other rows, and its teacher learns no more.

    Ours, or other than in that paper: the goal is the median validation metric of a plain training before its rate
    drops, and not an accuracy that somebody has set. The teacher learns from all training rows, and not from a part of
    them. Where few samples are chosen a step has few, and does not wait for a full batch. An episode that diverges
    teaches nothing.

    Args:
        label: of the row.
        rate: learning rate of the networks.
        episodes: that teach the teacher; 0 leaves it untaught, which is a choice by chance.
        teacher_rate: of its Adam.
        reward: ``"speed"``, or ``"chance"`` for one that a step drawn by chance has.
    """

    def train(trial: Trial) -> dict[str, float]:
        device = trial.data.train[0].device
        with trial.seeded(SEARCH):
            teacher = Teacher(2 * CLASSES + 5).to(device)
        generator = torch.Generator().manual_seed(trial.random_seed(SEARCH))
        lengths = []
        if episodes:
            steps = trial.task.settings["steps"]
            goal, reached = goal_of(ImageFit(trial, rate, FIRST_EPISODE))
            learner = Reinforce(teacher, teacher_rate, -math.log(reached / steps))
            for episode in range(1, episodes + 1):
                fit = ImageFit(trial, rate, FIRST_EPISODE + episode)
                try:
                    length, _ = taught(fit, teacher, generator, learner, goal)
                except Diverged:
                    learner.forget()
                    lengths.append(steps)
                    continue
                lengths.append(length)
                if reward == "chance":
                    length = int(torch.randint(1, steps + 1, (), generator=generator))
                learner.learn(-math.log(length / steps))
        fit = ImageFit(trial, rate)
        teacher.requires_grad_(False)
        _, share = taught(fit, teacher, generator)
        found = {**fit.measures(), "share chosen": share}
        for name, part in (("first", lengths[:COUNTED]), ("last", lengths[-COUNTED:])):
            if part:
                found[f"steps of the {name} episodes"] = sum(part) / len(part)
        return found

    kind = "L2T" if episodes else "L2T, not taught"
    settings = {"rate": rate, "teacher_rate": teacher_rate, "episodes": episodes, "reward": reward}
    return Method(label, train, {"kind": kind, **settings})
