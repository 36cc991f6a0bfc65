"""The layout in which a CPU convolves and pools fastest, for the passes after the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._model_state import ModelState
from lossmeta.adalfl.trained_model import TrainedModel


class ChannelsLast:
    """Whether a model may be given its inputs in that layout.

    It is tried on the first inputs, once: not every model is free of ``view`` and of random numbers.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model = model
        self.known: bool | None = None

    def accepts(self, inputs: Any) -> bool:
        if self.known is None:
            self.known = self._tried(inputs)
        return self.known

    @torch.no_grad()
    def _tried(self, inputs: Any) -> bool:
        model = self.model
        if not (
            model.device.type == "cpu"
            and any(isinstance(m, nn.Conv2d) for m in model.plain.modules())
            and isinstance(inputs, Tensor)
            and inputs.dim() == 4
            and inputs.dtype == torch.float32
        ):
            return False
        state = ModelState(model.plain, model.device)
        with state.kept():
            expected = model.predict(inputs)
            state.bring_back()
            try:
                actual = model.predict(in_channels_last(inputs))
            except RuntimeError:
                return False
        return bool((actual - expected).norm() <= 1e-3 * expected.norm())


def in_channels_last(inputs: Any) -> Any:
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        return inputs
    _, channels, height, width = inputs.shape
    if channels == 1:  # both layouts at once; the strides tell which is meant
        return inputs.contiguous().as_strided(inputs.shape, (height * width, 1, width, 1))
    return inputs.contiguous(memory_format=torch.channels_last)
