"""What a pass over a model moves beside its weights, kept and brought back: buffers, random numbers and modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RandomState:
    """The random numbers of the CPU and of one GPU, as they are when this is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states: tuple[Tensor, ...] = ()
        if not is_capturing(device):  # it cannot be read then, and a captured step draws no random numbers
            on_device = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
            self.states = (torch.get_rng_state(), *on_device)

    def bring_back(self) -> None:
        if self.states:
            torch.set_rng_state(self.states[0])
        if len(self.states) == 2:
            torch.cuda.set_rng_state(self.states[1], self.device)

    def equals(self, other: RandomState) -> bool:
        """Whether nothing has been drawn between the two."""
        return all(map(torch.equal, self.states, other.states))


class ModelState:
    """The buffers of a model and the random numbers, as they are when this is made.

    A model may put new buffers in the place of the old ones: values are brought back into those that are there then.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.random = RandomState(device)
        self.buffers: list[Tensor] = [b.clone() for b in model.buffers()]

    def bring_back(self) -> None:
        self.random.bring_back()
        copy_into(self.model.buffers(), self.buffers)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever happens within, buffers and random numbers are afterwards as they were when this was made."""
        try:
            yield
        finally:
            self.bring_back()


def copy_into(tensors: Iterable[Tensor], values: Sequence[Tensor]) -> None:
    if values:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode; afterwards every module of it is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that nothing runs yet and nothing can be read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
