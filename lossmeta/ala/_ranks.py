"""Processes that share the children of a population."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """Each of R processes has B / R of the B children, in the order of their ranks.

    Args:
        group: the processes, or ``None`` for this one alone.
        children: B.

    Raises:
        ValueError: where R does not divide B.
    """

    def __init__(self, group: dist.ProcessGroup | None, children: int) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if children % self.size:
            raise ValueError(
                f"Population: children must be a multiple of the {self.size} processes, got {children}"
            )
        self.children = children // self.size
        self.first = self.rank * self.children

    def check_same(self, device: torch.device, **numbers: int) -> None:
        """Refuses numbers that are others in another process by a ValueError, in all of them."""
        own = torch.tensor([list(numbers.values())], dtype=torch.int64, device=device)
        all_of_them = self.gathered(own)
        if not bool((all_of_them == own).all()):
            raise ValueError(
                f"Population: {', '.join(numbers)} must be the same in all processes, got {all_of_them.tolist()}"
            )

    def check_same_targets(self, total: Tensor) -> None:
        """Refuses batches that are others in another process, by the sum of their targets."""
        totals = self.gathered(total[None])
        if not bool(((totals == totals[0]) | (totals.isnan() & totals[0].isnan())).all()):
            raise ValueError(
                "Population: processes that share the children must step with the same batches, whose targets were "
                f"others in a window, with the sums {totals.tolist()}; give them loaders of the same seed, without a "
                "DistributedSampler"
            )

    def own(self, t: Tensor) -> Tensor:
        """This process's part, ``[B / R, ...]``, of what all have, ``[B, ...]``."""
        return t[self.first : self.first + self.children]

    def gathered(self, t: Tensor) -> Tensor:
        """What all have, of what this one has."""
        if self.group is None:
            return t
        parts = [torch.empty_like(t) for _ in range(self.size)]
        dist.all_gather(parts, t.contiguous(), group=self.group)
        return torch.cat(parts)

    def total(self, t: Tensor) -> Tensor:
        """The sum over the processes; in place where there are several."""
        if self.group is not None:
            dist.all_reduce(t, group=self.group)
        return t

    def of_child(self, t: Tensor, child: int) -> Tensor:
        """What child 0 to B - 1 has, of what each child of this process has."""
        owner, place = divmod(child, self.children)
        found = t[place].clone()
        self._broadcast(found, owner)
        return found

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """All become those of the first process."""
        for t in tensors:
            self._broadcast(t, 0)

    def _broadcast(self, t: Tensor, owner: int) -> None:
        if self.group is not None:
            dist.broadcast(t, dist.get_global_rank(self.group, owner), group=self.group)


def of_first_process(tensors: list[Tensor]) -> list[Tensor]:
    """What the first of all processes has, where there are several; a list of as many tensors on the CPU."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensors
    kept = [tensors]
    dist.broadcast_object_list(kept, src=0)
    return kept[0]
