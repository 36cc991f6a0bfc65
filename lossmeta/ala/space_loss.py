"""The loss of a space as a module, for any training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lossmeta.ala.space import Coordinates, LossSpace, Values


class SpaceLoss(nn.Module):
    """The loss of a space under values that stay until somebody moves them.

    A state dict holds the values.

    Args:
        space: of losses.
        values: where the loss is to be, by the parameters' names; the defaults for those left out.

    Shape:
        Called with a prediction and a target as the space takes them; the result is a scalar.

    Raises:
        TypeError: for a space that is none.
        ValueError: for a value of another name or size, or out of bounds.

    Example:
        >>> criterion = lossmeta.ala.SpaceLoss(lossmeta.ala.Robust(), q=0.7)  # was: torch.nn.CrossEntropyLoss()
        >>> loss = criterion(torch.randn(8, 3), torch.randint(3, (8,)))
        >>> criterion.move_to(q=0.0)
    """

    def __init__(self, space: LossSpace, **values: object) -> None:
        super().__init__()
        self.space = space
        self._coordinates = Coordinates(space, "SpaceLoss")
        zero = torch.zeros(self._coordinates.size, dtype=torch.float64, device="cpu")
        self._set(self._coordinates.moved(zero, values))

    def _set(self, u: Tensor) -> None:
        """Moves to these coordinates, within the bounds."""
        self._u = self._coordinates.clip(u)
        self._placed: dict[tuple[torch.device, torch.dtype], Values] = {}

    @property
    def values(self) -> dict[str, Tensor]:
        """By name, float64 on the CPU."""
        return self._coordinates.values(self._u)

    def move_to(self, **values: object) -> None:
        """Puts parameters where you want them: by name, a number for all of a vector; those left out stay.

        Raises:
            ValueError: for another name, size, or a value out of bounds. Nothing has moved then.
        """
        self._set(self._coordinates.moved(self._u, values))

    def placed(self, like: Tensor) -> Values:
        """The values where a prediction is, in its dtype or float32."""
        return {name: v.to(*_place(like)) for name, v in self.values.items()}

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        key = _place(prediction)
        if key not in self._placed:
            # They outlive a call that records no gradients.
            with torch.inference_mode(False), torch.no_grad():
                self._placed[key] = self.space.prepared(self.placed(prediction))
        return self.space(prediction, target, self._placed[key])

    def get_extra_state(self) -> dict[str, Tensor]:
        return self.values

    def set_extra_state(self, state: Any) -> None:
        """Refuses values that are not this space's by a ValueError."""
        self.move_to(**state)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={v.item():.4g}" if not v.dim() else f"{name}[{len(v)}]"
            for name, v in self.values.items()
        )


def _place(like: Tensor) -> tuple[torch.device, torch.dtype]:
    return like.device, torch.promote_types(like.dtype, torch.float32)
