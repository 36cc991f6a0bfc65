"""One learned loss in several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


class Replicas:
    """The copies of a learned loss that the processes of a ``DistributedDataParallel`` model train together.

    Each process moves its own copy by the same averaged meta-gradient. So they stay equal if they start so: all are
    given those of the group's first process, and :meth:`check` compares them.

    Args:
        loss: the learned loss.
        meta_optimizer: of the loss, or ``None``.
        group: of processes; ``None``: the default one.
        device: on which the group communicates.
    """

    def __init__(
        self, loss: nn.Module, meta_optimizer: Optimizer | None, group: Any, device: torch.device
    ) -> None:
        self.loss, self.meta_optimizer, self.group, self.device = loss, meta_optimizer, group, device

    @torch.no_grad()
    def make_equal(self) -> None:
        """Gives all processes the loss and the meta-optimizer's state of the first."""
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        for tensor in (*self.loss.parameters(), *self.loss.buffers()):
            value = tensor.detach().to(self.device).contiguous()
            dist.broadcast(value, first, group=self.group)
            tensor.copy_(value)
        if self.meta_optimizer is None:
            return
        states = [self.meta_optimizer.state_dict() if dist.get_rank() == first else None]
        dist.broadcast_object_list(states, first, group=self.group, device=self.device)
        if states[0] is not None:
            self.meta_optimizer.load_state_dict(states[0])

    @torch.no_grad()
    def check(self, steps: int) -> None:
        """Compares the processes' losses, meta-optimizers and counts of steps, by a checksum.

        Raises:
            RuntimeError: on all processes, where one differs.
        """
        tensors: list[Tensor] = [*self.loss.parameters(), *self.loss.buffers()]
        if self.meta_optimizer is not None:
            for state in self.meta_optimizer.state.values():
                tensors += [v for v in state.values() if isinstance(v, Tensor)]
        total = torch.stack([torch.tensor(steps, device="cpu"), *map(_checksum, tensors)]).sum()
        ends = torch.stack([total, -total]).to(self.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group)
        if int(ends[0]) != -int(ends[1]):
            raise RuntimeError(
                f"OnlineLearner: the learned loss, its meta-optimizer and the count of steps, {steps} here, must be "
                "the same in all processes, got different ones; load the same state everywhere, and let no process "
                "change its loss alone"
            )


def _checksum(tensor: Tensor) -> Tensor:
    """Of the bits, []; any change of one element changes it."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    bits = flat.view(torch.uint8).long()
    return (bits * (torch.arange(len(bits), device="cpu") % 65521 + 1)).sum()
