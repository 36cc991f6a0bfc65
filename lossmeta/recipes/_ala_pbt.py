"""Population-based training of the matrix Phi and the learning rate."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from lossmeta.ala import ClassCorrelation, LossSpace, SpaceLoss
from lossmeta.ala.space import Coordinates
from lossmeta.experiments import Method, Trial
from lossmeta.recipes._ala_images import ImageFit, best_of
from lossmeta.recipes._ala_tasks import CLASSES, SEARCH

WORST = 0.25  # share of the members that are replaced, by as many of the best
FACTORS = (0.8, 1.2)  # of the learning rate


@dataclass
class Member:
    """A network with a loss of its own.

    Attributes:
        fit: trains it.
        space: of its loss.
        place: in that space, in units of each parameter's scale, which is 0.1 for Phi.
    """

    fit: ImageFit
    space: LossSpace
    place: Tensor

    def loss(self) -> SpaceLoss:
        return SpaceLoss(self.space, **Coordinates(self.space).values(self.place))


def exploit_and_explore(members: list[Member], scores: list[float], generator: torch.Generator) -> list[int]:
    r"""The worst members take the best ones' weights, optimizer state, loss and rate, and change loss and rate.

    By chance the learning rate is multiplied by 0.8 or 1.2, and each entry of :math:`\Phi` moves by -0.1, 0 or 0.1
    (Jaderberg et al., "Population Based Training of Neural Networks", 2017: truncation selection and
    perturbation).

    Returns:
        Which members were replaced.
    """
    count = max(1, round(WORST * len(members)))
    order = sorted(range(len(members)), key=scores.__getitem__)
    replaced = order[:count]
    for worst, best in zip(replaced, reversed(order[-count:]), strict=True):
        loser, winner = members[worst], members[best]
        loser.fit.model.load_state_dict(winner.fit.model.state_dict())
        loser.fit.optimizer.load_state_dict(copy.deepcopy(winner.fit.optimizer.state_dict()))
        factor = FACTORS[int(torch.randint(2, (), generator=generator))]
        for group in loser.fit.optimizer.param_groups:
            group["lr"] *= factor
        change = torch.randint(-1, 2, winner.place.shape, generator=generator)
        loser.place = Coordinates(loser.space).clip(winner.place + change)
    return replaced


def population_based_training(label: str, rate: float, networks: int) -> Method:
    """The best network on the validation part is reported."""

    def train(trial: Trial) -> dict[str, float]:
        generator = torch.Generator().manual_seed(trial.random_seed(SEARCH))
        space = ClassCorrelation(CLASSES)
        start = torch.zeros(Coordinates(space).size, dtype=torch.float64)
        fits = [ImageFit(trial, rate, child) for child in range(networks)]
        members = [Member(fit, space, start) for fit in fits]
        losses = [member.loss() for member in members]
        for i, x, y in fits[0].batches():
            for fit, loss in zip(fits, losses, strict=True):
                if fit is not fits[0]:
                    fit.schedule(i)
                fit.step(loss(fit.model(x), y))
            if (i + 1) % fits[0].setting.window == 0 and i + 1 < fits[0].steps:
                for replaced in exploit_and_explore(members, [fit.selection() for fit in fits], generator):
                    losses[replaced] = members[replaced].loss()
        return best_of(fits).measures()

    return Method(label, train, {"kind": "PBT", "rate": rate, "networks": networks})
