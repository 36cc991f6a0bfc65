"""What a policy sees of the entries of a loss's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossmeta.ala.policy import Policy

KEPT = 0.9  # of a moving average with every time step
FARTHEST = 5.0  # a state has no larger numbers


class States:
    """The states of the E entries that one network of a policy moves, of one model.

    Statistics are standardised by moments over entries and past time steps, so that a policy does not depend on their
    unit.

    Args:
        policy: of which it is a part.
        name: of the network.
    """

    def __init__(self, policy: Policy, name: str) -> None:
        self.features, self.parts = policy.features[name], policy.parts
        self.history = policy.history if "history" in policy.parts else 1
        self.past: Tensor | None = None  # [E, history * S], the latest first
        self.average: Tensor | None = None  # [E, S]
        self.moments: Tensor | None = None  # [2, S], means and mean squares

    def observe(self, statistics: Tensor, places: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """One more time step.

        Args:
            statistics: ``[E, S]``.
            places: of the values between their bounds, in [-1, 1], ``[E]``.
            progress: of the training, in [0, 1].

        Returns:
            The states ``[E, D]``, and which entries have finite statistics, ``[E]``.
        """
        known = statistics.isfinite().all(1)
        # Squares of what a float32 can hold fit into a float64.
        found = statistics.double().where(known[:, None], 0)
        if known.any():
            moments = torch.stack([found, found**2]).sum(1) / known.sum()
            self.moments = moments if self.moments is None else moments.lerp(self.moments, KEPT)
        mean, square = found.new_zeros(2, self.features) if self.moments is None else self.moments
        # A single entry that has not moved yet has no deviation; a thousandth of its size then counts as one.
        deviation = (square - mean**2).clamp_min(1e-6 * square + 1e-12).sqrt()
        now = ((found - mean) / deviation).clamp(-FARTHEST, FARTHEST).where(known[:, None], 0).float()
        average = found if self.average is None else self.average.where(self.average.isfinite(), found)
        change = (found - average) / average.abs().clamp_min(1e-6)
        change = change.clamp(-FARTHEST, FARTHEST).where(known[:, None], 0).float()
        # NaN until the entry is known for the first time.
        before = torch.nan if self.average is None else self.average
        self.average = average.lerp(found, 1 - KEPT).where(known[:, None], before)
        if self.past is None:
            self.past = now.repeat(1, self.history)
        else:
            self.past = torch.cat([now, self.past[:, : -self.features]], 1)
        parts = [self.past]
        if "change" in self.parts:
            parts.append(change)
        if "values" in self.parts:
            parts.append(places[:, None])
        if "progress" in self.parts:
            parts.append(torch.full_like(places, progress)[:, None])
        return torch.cat(parts, 1), known

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("past", "average", "moments")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
