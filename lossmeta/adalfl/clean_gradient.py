"""The gradient of the task loss on clean batches, which the steps of a learned loss descend too."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Gradients = dict[Tensor, Tensor]
"""One for each parameter that has one."""


class CleanGradient:
    r"""What the clean batches add to a step's gradient: :math:`w\,\nabla_\theta \mathcal L_T`.

    A meta-gradient needs the task loss's gradient on a clean batch after the step. The next step starts from the same
    weights, so that this gradient is the one that it needs: the clean batches cost no passes of their own. Where none
    is kept, as in the first step, or somebody has changed the weights in between, a pass on the step's clean batch
    gives it. Only what is written through ``.data`` goes unseen.

    Args:
        weight: of the clean batches, where that of the training batch is 1.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._kept: Gradients | None = None
        # Marks of the weights that it is of; None where it is of whatever weights the next step finds.
        self._weights: list[tuple[int, int]] | None = None

    def keep(self, gradients: Gradients, parameters: Iterable[Tensor]) -> None:
        """For the next step; ``parameters`` are all that are trained, as they are now."""
        self._kept, self._weights = gradients, _marks(parameters)

    def forget(self) -> None:
        self._kept = self._weights = None

    @torch.no_grad()
    def add(self, parameters: Iterable[Tensor], compute: Callable[[], Gradients]) -> None:
        """Adds to the parameters' ``.grad`` what is kept, or what ``compute`` gives where nothing fits."""
        parameters = list(parameters)
        gradients = self._kept
        if gradients is None or self._weights not in (None, _marks(parameters)):
            gradients = compute()
        self.forget()
        sums, added = [], []
        for p in parameters:
            if p in gradients:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                sums.append(p.grad)
                added.append(gradients[p])
        if sums:
            torch._foreach_add_(sums, added, alpha=self.weight)

    def state(self, parameters: Iterable[Tensor]) -> list[Tensor | None] | None:
        """What is kept, in the order of the parameters."""
        parameters = list(parameters)
        if self._kept is None or self._weights not in (None, _marks(parameters)):
            return None
        return [self._kept.get(p) for p in parameters]

    def load(self, state: list[Tensor | None] | None, parameters: Iterable[Tensor]) -> None:
        """Takes what :meth:`state` gave. It is for the next step, also where the weights are loaded after it."""
        self.forget()
        if state is not None:
            pairs = zip(parameters, state, strict=True)
            self._kept = {p: g.detach().clone().to(p.device) for p, g in pairs if g is not None}

    def as_it_is(self, parameters: Iterable[Tensor]) -> Callable[[], None]:
        """What brings back, when it is called, what is kept now; the weights are then those of now too."""
        parameters, kept = list(parameters), self._kept
        fits = self._weights in (None, _marks(parameters))

        def bring_back() -> None:
            if kept is not None and fits:
                self.keep(kept, parameters)
            else:
                self.forget()

        return bring_back


def _marks(parameters: Iterable[Tensor]) -> list[tuple[int, int]]:
    """How often each has been written to, and where it lies."""
    return [(p._version, p.data_ptr()) for p in parameters]
