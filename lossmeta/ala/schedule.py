"""Loss parameters by training step, to train under once more."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossmeta._safetensors import read, write
from lossmeta.ala._step_length import before_step, scale_step
from lossmeta.ala.space import LEARNING_RATE, Coordinates, LossSpace
from lossmeta.ala.space_loss import SpaceLoss

FORMAT = 1  # one more wherever what is there would be read as something else
HEADER = "lossmeta schedule"


class Schedule:
    """A loss whose parameters change with the training step, as somebody has set or found them.

    :meth:`Population.schedule` and :meth:`Controller.schedule` give what they found.

    Args:
        space: of losses.
        steps: from which the values hold, ascending; before the first they are the defaults, and the last ones hold on.
        values: by the parameters' names, ``[len(steps)]`` of a number and ``[len(steps), size]`` of a vector. Those
            left out stay at their defaults.
        record: how it was found, which :meth:`save` writes beside the values; JSON.

    Attributes:
        loss: the loss now, a :class:`SpaceLoss`.
        steps_done: training steps so far.

    Raises:
        ValueError: for steps that are negative or do not ascend, and values of another name or size or out of bounds.

    Example:
        >>> schedule = lossmeta.ala.Schedule(lossmeta.ala.Robust(), [0, 50], {"q": [0.9, 0.6]})
        >>> schedule.save("schedule.safetensors")
        >>> schedule = lossmeta.ala.Schedule.load("schedule.safetensors", lossmeta.ala.Robust())
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(100):
        ...     loss = schedule(model(torch.randn(16, 4)), torch.randint(3, (16,)))
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     schedule.step(optimizer)  # was: optimizer.step()
        >>> round(schedule.values["q"].item(), 4)
        0.6
    """

    def __init__(
        self,
        space: LossSpace,
        steps: Sequence[int],
        values: Mapping[str, Any],
        *,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.space, self.coordinates = space, Coordinates(space, "Schedule")
        self.steps = [int(step) for step in steps]
        if not self.steps or self.steps[0] < 0 or sorted(set(self.steps)) != self.steps:
            raise ValueError(f"Schedule: steps must ascend from 0 or later, got {list(steps)}")
        # float32, as files hold them and losses take them.
        given = {
            name: torch.as_tensor(v, device="cpu").detach().to(torch.float32) for name, v in values.items()
        }
        for name, v in given.items():
            if v.dim() < 1 or len(v) != len(self.steps):
                raise ValueError(
                    f"Schedule: {name} must have a value for each of {len(self.steps)} steps, got {list(v.shape)}"
                )
        zero = torch.zeros(self.coordinates.size, dtype=torch.float64, device="cpu")
        self.path = [
            self.coordinates.moved(zero, {name: v[i] for name, v in given.items()})
            for i in range(len(self.steps))
        ]
        self.record: dict[str, Any] = dict(record or {})
        self.loss = SpaceLoss(space)
        self.steps_done = 0
        self._place()

    @classmethod
    def of_path(
        cls, where: str, space: LossSpace, path: Sequence[tuple[int, Tensor]], record: Mapping[str, Any]
    ) -> Schedule:
        """From steps and coordinates, see :class:`Coordinates`."""
        if not path:
            raise ValueError(f"{where}: a window must have ended before there is a schedule, got none")
        last = dict(path)  # of those that begin at the same step, the last
        values = Coordinates(space, where).values(torch.stack(list(last.values())).double())
        return cls(space, list(last), values, record=record)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss at this step."""
        found: Tensor = self.loss(prediction, target)
        return found

    @property
    def values(self) -> dict[str, Tensor]:
        """At this step, by name, float64 on the CPU."""
        return self.loss.values

    def step(self, optimizer: Optimizer | None = None) -> None:
        """Goes on to the next training step.

        Args:
            optimizer: steps before that; by the schedule's factor where the learning rate is one of the parameters.
                ``None`` where the caller has stepped it.

        Raises:
            ValueError: without an optimizer where the learning rate is one of the parameters.
        """
        if optimizer is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            before = before_step(self.values, parameters)
            optimizer.step()
            scale_step(before, {name: v.to(torch.float32) for name, v in self.values.items()})
        elif LEARNING_RATE in self.coordinates.places:
            raise ValueError(
                "Schedule: optimizer must be given, whose steps the schedule's learning rate scales, got None"
            )
        self.steps_done += 1
        self._place()

    def restart(self) -> None:
        """Goes back to the first training step."""
        self.steps_done = 0
        self._place()

    def _place(self) -> None:
        i = bisect_right(self.steps, self.steps_done)
        u = self.path[i - 1] if i else torch.zeros_like(self.path[0])
        if not torch.equal(u, self.loss._u):
            self.loss._set(u)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes steps, values and record to a safetensors file. A file that is there is replaced in one step.

        Raises:
            ValueError: for a record that is not JSON.
            OSError: where the file cannot be written.
        """
        try:
            description = json.dumps(
                {"format": FORMAT, "parameters": self._layout(self.coordinates), "record": self.record}
            )
        except TypeError as error:
            raise ValueError(f"Schedule.save: record must be JSON, got {error}") from error
        values = self.coordinates.values(torch.stack(self.path))
        tensors = {f"values.{name}": v.float() for name, v in values.items()}
        write(path, {"steps": torch.tensor(self.steps, device="cpu"), **tensors}, HEADER, description)

    @classmethod
    def load(cls, path: str | os.PathLike[str], space: LossSpace) -> Schedule:
        """What :meth:`save` wrote, at its first step. Nothing is unpickled.

        Args:
            path: of the file.
            space: of the schedule. It must have the same parameters, as ``population.space`` has, to which a
                population adds :class:`LearningRate`; bounds and scales may be others.

        Raises:
            ValueError: for a file of another space or of a newer version, one that :meth:`save` did not write, a
                damaged one, and values out of the space's bounds.
            OSError: where there is no such file.
        """
        where = f"Schedule.load: {os.fspath(path)}"
        description, tensors = read(where, path, HEADER, FORMAT)
        own = cls._layout(Coordinates(space, "Schedule"))
        if description.get("parameters") != own:
            raise ValueError(
                f"{where} must hold the parameters {own} of the space, got {description.get('parameters')}"
            )
        try:
            steps = tensors["steps"].tolist()
            values = {name: tensors[f"values.{name}"] for name in own}
            record = dict(description["record"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where} must be a file that save wrote, got one without {error}; save it again"
            ) from error
        return cls(space, steps, values, record=record)

    @staticmethod
    def _layout(coordinates: Coordinates) -> dict[str, int | None]:
        """Names and sizes."""
        return {p.name: p.size for p in coordinates.parameters}

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; the schedule itself is a file."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.steps_done = int(state["steps_done"])
        self._place()
