"""The file in which a loss surface grows."""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lossmeta.landscape._objective import Objective
from lossmeta.landscape.directions import Direction
from lossmeta.landscape.surface import LossSurface, read, write

WHERE = "loss_surface"
EVERY = 5.0
"""Seconds from one writing to the next, while it grows."""


def fingerprint(
    objective: Objective,
    directions: Sequence[Direction],
    axes: Sequence[Tensor],
    refine: float | None,
    centre: float,
) -> dict[str, Any]:
    """What two surfaces of one file must have in common."""
    ends = [[float(axis[0]), float(axis[-1]), len(axis)] for axis in axes]
    return {
        "loss": centre if math.isfinite(centre) else str(centre),
        "weights": _digest(objective.parameters),
        "directions": [_digest(direction) for direction in directions],
        "axes": ends,
        "samples": objective.samples,
        "refine": refine,
        "autocast": str(objective.autocast),
    }


def _digest(tensors: Direction) -> str:
    """Of names and bits."""
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        for piece in t.detach().flatten().split(2**20):
            found.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


@dataclass
class SurfaceFile:
    """Where a surface is kept while it grows.

    Attributes:
        check: says what is wrong with the points that have been evaluated, if anything is. It is asked before they are
            written, so that a file has none that a later run would have to doubt.
    """

    path: str | os.PathLike[str] | None
    surface: LossSurface
    fingerprint: dict[str, Any]
    check: Callable[[], str | None]
    finished: bool = field(default=False, init=False)
    _written: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        if self.path is None or not os.path.exists(self.path):
            return
        found, fingerprint, _ = read(self.path)
        differing = [k for k, v in self.fingerprint.items() if not _same(v, fingerprint.get(k))]
        if differing:
            raise ValueError(
                f"{WHERE}: {os.fspath(self.path)} must hold the same surface, got one that differs in "
                f"{', '.join(differing)}; choose another path or remove it"
            )
        self.surface.losses.copy_(found.losses)
        self.surface.evaluated.copy_(found.evaluated)

    def grown(self) -> None:
        """Writes what there is, from time to time."""
        if self.path is not None and time.monotonic() - self._written > EVERY:
            self._checked()
            self._try_to_write()
            self._written = time.monotonic()

    def write(self) -> None:
        if self.path is not None:
            write(self.path, self.surface, self.fingerprint, self.finished)

    def _try_to_write(self) -> None:
        """A disk that has become full does not end what is computed."""
        try:
            self.write()
        except OSError as error:
            warnings.warn(
                f"{WHERE}: {os.fspath(self.path or '')} could not be written ({error}); the surface is returned all "
                "the same",
                RuntimeWarning,
                stacklevel=2,
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Writes what there is at the end, however it comes, and none of it where the check finds it wrong.

        Where what has ended it keeps the check from being made, too, the file stays as it was last.
        """
        try:
            yield
        except BaseException:
            with suppress(BaseException):  # the first one is raised
                self._checked()
                self._try_to_write()
            raise
        self._checked()
        self.finished = True
        self._try_to_write()

    def _checked(self) -> None:
        wrong = self.check()
        if wrong is not None:
            self.surface.evaluated.fill_(False)
            self._try_to_write()
            raise ValueError(wrong)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
    return bool(a == b)
