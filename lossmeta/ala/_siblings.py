"""Children that start every window alike, rewarded by how much better each is than the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta.ala._agent import Statistics
from lossmeta.ala._improvement import Judged, Pending, Start
from lossmeta.ala._ranks import of_first_process
from lossmeta.ala._recombination import check_alike, mean_of, recombine
from lossmeta.ala._reinforce import Reinforce
from lossmeta.ala.space import Coordinates
from lossmeta.ala.space_loss import SpaceLoss


class Siblings:
    r"""Rewards the advantage :math:`A_i = (f_i - \bar f) / \mathrm{std} f`, the mean over the metrics.

    All children had the same start and the same batches, so that they differ by what their actions do. Their mean is
    the baseline. At a window's end weights, the optimizers' states and the coordinates of the losses become their means
    with the weights :math:`\mathrm{softmax}(2 A)`, from which all set out anew. Where no child has acted, as in the
    first window, the best one takes the place of all.

    Args:
        coordinates: of the losses.
        weights: of the metrics.
        losses: of the children. They are watched for batches that differ.

    Attributes:
        alike: whether the children of a window set out from the same.
        observers: histories of statistics: all children have the same.
        tie: what is said of the first window that is tied.
    """

    alike = True
    observers = 1
    tie = "all children had the same metric; nothing is learned from that"

    def __init__(self, coordinates: Coordinates, weights: list[float], losses: Sequence[SpaceLoss]) -> None:
        self.coordinates = coordinates
        self.weights = torch.tensor(weights, dtype=torch.float64, device="cpu")
        self.targets: list[Any] = [0.0] * len(losses)  # sums, in this window
        self.weight = torch.zeros(len(losses), dtype=torch.float64, device="cpu")
        for i, loss in enumerate(losses):
            loss.register_forward_pre_hook(partial(self._watch, i), with_kwargs=True)

    def _watch(self, i: int, loss: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of a training step; what is evaluated without gradients is no batch."""
        target = kwargs["target"] if "target" in kwargs else args[1]
        if torch.is_grad_enabled():
            self.targets[i] = self.targets[i] + target.detach().double().sum()

    def check(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer] | None, last: bool) -> None:
        """Refuses children that cannot be made alike and, at a window's end, those with other batches.

        Raises:
            TypeError: for what is no optimizer.
            ValueError: for another number of optimizers than of models, a model that is given twice, models of other
                parameters, an optimizer that is not of its model's, and targets that differ.
        """
        if optimizers is None:
            raise ValueError(
                'Controller: optimizers must be given for reward="advantage", which makes their states alike too, got '
                "None; call step(models, optimizers)"
            )
        check_alike(models, optimizers)
        if last:
            sums = [float(t) for t in self.targets]
            if not all(
                math.isclose(t, sums[0], rel_tol=1e-9) or (math.isnan(t) and math.isnan(sums[0]))
                for t in sums
            ):
                raise ValueError(
                    'Controller: with reward="advantage" the children must train on the same batches, whose targets '
                    f"were others in a window, with the sums {sums}; give each the same batch, by its own of losses"
                )

    def judged(self, found: Tensor, pending: Pending, learner: Reinforce) -> Judged:
        """Of metrics ``[metrics, children]``."""
        finite = found.isfinite().all(0)
        advantage, tied = self._advantage(found, finite)
        score = 2 * advantage if any(pending) else torch.full_like(advantage, -torch.inf)
        if not any(pending) and finite.any():
            score[int(advantage.nan_to_num(-torch.inf).argmax())] = 0.0
        weight = score.nan_to_num(-torch.inf, neginf=-torch.inf).softmax(0).nan_to_num(0.0)
        (self.weight,) = of_first_process([weight])
        latest = []
        for a, experience in zip(advantage.tolist(), pending, strict=True):
            if experience is not None and math.isfinite(a) and not tied:
                experience.advantage = a
                latest.append(experience)
        return Judged(advantage if any(pending) else None, tied and any(pending), latest)

    def _advantage(self, found: Tensor, finite: Tensor) -> tuple[Tensor, bool]:
        """``[children]``, NaN where not finite; and whether no metric tells them apart."""
        known = found[:, finite]
        if not known.numel():
            return torch.full_like(found[0], torch.nan), False
        deviation = known.std(1, correction=0)
        tells = deviation > 1e-7 * known.abs().amax(1).clamp_min(1.0)
        score = (found - known.mean(1, keepdim=True)) / deviation[:, None]
        score = score.where(tells[:, None], 0.0)
        advantage = (self.weights @ score) / self.weights.sum()
        return advantage.where(finite, torch.nan), not tells.any()

    def starts(
        self,
        found: Tensor,
        us: list[Tensor],
        statistics: list[Statistics],
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer] | None,
    ) -> list[Start | None]:
        """All from the mean. Where no metric was finite, each stays where it is, and none moves."""
        assert optimizers is not None
        self.targets = [0.0] * len(us)
        if not self.weight.any():
            return [None] * len(us)
        recombine(models, optimizers, self.weight)
        u = self.coordinates.clip(mean_of(us, self.weight))
        seen = {name: mean_of([s[name] for s in statistics], self.weight) for name in statistics[0]}
        return [Start(0, u, seen)] * len(us)

    def state_dict(self) -> dict[str, Any]:
        return {"targets": [float(t) for t in self.targets]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.targets = list(state["targets"])
