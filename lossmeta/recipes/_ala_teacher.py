"""The teacher of learning to teach: a policy that chooses which samples of a batch train the model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 12
OPEN = 2.0  # the logit of choosing, at first


class Teacher(nn.Module):
    r"""Chooses each sample on its own, by what is known of it and of the model.

    .. math:: \pi(a \mid s) = \sigma(h(s))^a\,(1 - \sigma(h(s)))^{1 - a}, \qquad a \in \{0, 1\}

    where h is a network of one hidden layer (Fan et al., "Learning to Teach", 2018). Its last layer starts at 0 with a
    bias of 2. Until it has learned it chooses by chance therefore, 88 % of the samples, whatever it sees. The paper too
    starts with nearly all samples; the size of the hidden layer is ours.

    Args:
        features: of a state.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        last = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, OPEN)
        self.network = nn.Sequential(nn.Linear(features, HIDDEN), nn.Tanh(), last)

    def forward(self, states: Tensor) -> Tensor:
        """The logits h(s) of choosing, ``[N]``."""
        found: Tensor = self.network(states)[:, 0]
        return found


def choices(logits: Tensor, generator: torch.Generator) -> Tensor:
    """1 for samples that are chosen and 0 for the others, ``[N]``; drawn on the CPU."""
    uniform = torch.rand(len(logits), generator=generator, dtype=logits.dtype, device="cpu")
    return (uniform.to(logits.device) < logits.detach().sigmoid()).to(logits.dtype)


def log_probability(logits: Tensor, chosen: Tensor) -> Tensor:
    r""":math:`\log \pi(a \mid s)` of each sample's choice, ``[N]``."""
    return -F.binary_cross_entropy_with_logits(logits, chosen, reduction="none")


def states(logits: Tensor, labels: Tensor, progress: float, past: Tensor, best: float) -> Tensor:
    """What the teacher sees, ``[N, 2 C + 5]``.

    Of the sample its label, as 0 and 1; of the model how far the training is, its mean loss so far and the best
    validation metric so far; of both the probabilities, the loss, and by how much the probability of the label is
    above the largest other one. These are the features of Fan et al.; losses are in units of log C, that of a guess.

    Args:
        logits: of the model in training, ``[N, C]``.
        labels: ``[N]``.
        progress: share of the training that is done.
        past: mean training loss of the batches so far, ``[]``.
        best: validation metric so far.
    """
    rows, classes = logits.shape
    p = logits.softmax(1)
    own = F.one_hot(labels, classes).to(p)
    of_label = (p * own).sum(1)
    margin = of_label - (p - 2 * own).amax(1)
    guess = math.log(classes)
    loss = -logits.log_softmax(1).gather(1, labels[:, None])[:, 0] / guess
    model = torch.stack([p.new_tensor(progress), past.to(p) / guess, p.new_tensor(best)])
    return torch.cat([own, p, loss[:, None], margin[:, None], model.expand(rows, 3)], 1)


class Reinforce:
    r"""Raises the probability of choices of episodes whose reward was above those before (REINFORCE).

    Within an episode the gradients of :math:`\log \pi` of all choices add up in the teacher; nothing else of the
    episode is kept. At its end Adam follows

    .. math:: (r - b)\,\frac{1}{T N} \sum_{t, n} \nabla \log \pi(a_{tn} \mid s_{tn})

    Args:
        teacher: learns.
        rate: of Adam; 1e-3 in the paper.
        baseline: b before the first episode; then a moving average of the rewards.
    """

    KEPT = 0.9  # of the baseline, with every episode

    def __init__(self, teacher: Teacher, rate: float, baseline: float) -> None:
        self.teacher, self.baseline = teacher, baseline
        self.optimizer = torch.optim.Adam(teacher.parameters(), rate)
        self.steps = 0

    def remember(self, logits: Tensor, chosen: Tensor) -> None:
        """One batch's choices."""
        log_probability(logits, chosen).mean().backward()  # type: ignore[no-untyped-call]
        self.steps += 1

    def learn(self, reward: float) -> None:
        """At the end of an episode."""
        gain = reward - self.baseline
        for p in self.teacher.parameters():
            if p.grad is not None:
                p.grad *= -gain / self.steps
        self.optimizer.step()
        self.baseline = self.KEPT * self.baseline + (1 - self.KEPT) * reward
        self.forget()

    def forget(self) -> None:
        """The choices of an episode that brings no reward, whose gradients may be NaN."""
        self.optimizer.zero_grad()
        self.steps = 0
