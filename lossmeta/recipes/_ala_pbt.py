"""Population-based training of the matrix Phi and the learning rate."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from lossmeta.ala import LossSpace, SpaceLoss
from lossmeta.ala.space import Coordinates
from lossmeta.recipes._ala_images import ImageFit

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
    r"""The worst members take the best ones' weights, optimizer state, loss and rate, and change loss and rate by chance.

    The learning rate is multiplied by 0.8 or 1.2; each entry of :math:`\Phi`, which is 0 at first off the diagonal, moves
    by -0.1, 0 or 0.1 (Jaderberg et al., "Population Based Training of Neural Networks", 2017: truncation selection and
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
