r"""Layers whose input is the same at all points: their output there takes two additions instead of a product.

A linear layer is linear in its weights, too. Where no point moves what it is given, its output at the weights
:math:`\theta + a\,\delta_1 + b\,\delta_2` is

.. math:: (W + a\,D_1 + b\,D_2)\,x = W x + a\,D_1 x + b\,D_2 x,

whose three terms are computed once for each batch of data. For a row of the grid :math:`W x + a\,D_1 x` is kept, and
one addition is left. For a layer of n inputs and m outputs, a sample then costs 2 m operations and 12 m bytes (in
float32) where the product costs 2 n m operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta.landscape._objective import Objective
from lossmeta.landscape.directions import Direction

_functorch = torch._C._functorch

KEPT = 64 * 2**20
"""Bytes of the terms that are kept, over all layers and batches; what does not fit is computed at every point."""
FEWEST_INPUTS = 8
"""Of a linear layer: with fewer the product is as cheap as the addition."""
FEWEST_OUTPUTS = 32
"""Of a layer whose input is made anew at every point: with fewer the product is as cheap as comparing the input."""

Product = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
"""What a layer makes of an input, a weight and a bias."""


def _convolution(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = layer._conv_forward(x, weight, bias)
    return found


PRODUCTS: Mapping[type[nn.Module], Product] = {
    nn.Linear: lambda layer, x, weight, bias: F.linear(x, weight, bias),
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
}


class AffineLayers:
    """Finds such layers, and puts the sum in the place of their ``forward``.

    Nothing is taken from the structure of the model. Two passes at different weights tell which inputs stay as they
    are. At every point each input is compared with the one that the terms belong to, bit by bit, where it is not the
    same memory. A layer that is given another input has its ordinary output from then on. So it may be called several
    times, share its weights with others and have hooks; a part of it that is detached counts as what it is.

    A layer counts if it is an ``nn.Linear`` or ``nn.Conv1d``, ``2d`` or ``3d`` itself, no subclass, no parametrized one
    and none with a ``forward`` of its own, in float32 or float64. Under autocast a product rounds the weights of every
    point, which the sum does not, so that none counts there. Compiled models are left alone.

    Args:
        objective: whose model it is.
        directions: of the surface.
    """

    def __init__(self, objective: Objective, directions: Sequence[Direction]) -> None:
        self.layers: list[_Layer] = []
        modules = list(objective.model.modules())
        if any(map(_is_compiled, modules)):
            return
        names = {id(p): name for name, p in objective.parameters.items()}
        owned = {t.untyped_storage().data_ptr() for t in _tensors(objective.batches)}
        self.layers = [_Layer(m, names, directions, owned) for m in modules if _counts(m)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, one pass is made at weights other than the model's."""
        with self._replaced(_Layer.watch):
            yield

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within, one pass is made at the model's weights."""
        room = _Room(KEPT)
        with self._replaced(lambda layer, x: layer.collect(x, room)):
            yield
        self.layers = [layer for layer in self.layers if any(layer.kept)]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, passes are made at the points that :meth:`at` names."""
        with self._replaced(_Layer.output):
            yield

    def at(self, point: Sequence[float]) -> None:
        """The next pass is made at these coefficients."""
        for layer in self.layers:
            layer.calls, layer.point = 0, point

    @contextmanager
    def _replaced(self, forward: Callable[[_Layer, Tensor], Tensor]) -> Iterator[None]:
        before = [(layer.module, layer.module.__dict__.get("forward")) for layer in self.layers]
        try:
            for layer in self.layers:
                layer.calls, layer.ordinary = 0, layer.module.forward
                # nn.Linear and the convolutions name their argument so.
                layer.module.forward = lambda input, layer=layer: forward(layer, input)
            yield
        finally:
            for module, own in before:
                module.__dict__.pop("forward", None)
                if own is not None:
                    module.__dict__["forward"] = own


class _Room:
    """Bytes that are left."""

    def __init__(self, size: int) -> None:
        self.size = size

    def take(self, size: int) -> bool:
        if size > self.size:
            return False
        self.size -= size
        return True


class _Layer:
    """A module, and what is known of its calls in a pass, in their order."""

    def __init__(
        self, module: Any, names: Mapping[int, str], directions: Sequence[Direction], owned: set[int]
    ) -> None:
        self.module, self.directions, self.owned = module, directions, owned
        self.names = [None if p is None else names.get(id(p)) for p in (module.weight, module.bias)]
        self.product = PRODUCTS[type(module)]
        self.ordinary: Callable[[Tensor], Tensor] = module.forward
        self.sums: list[float] = []
        self.kept: list[_Terms | None] = []
        self.calls, self.point = 0, ()  # type: tuple[int, Sequence[float]]

    def watch(self, x: Tensor) -> Tensor:
        self.sums.append(_sum(x))
        return self.ordinary(x)

    def collect(self, x: Tensor, room: _Room) -> Tensor:
        """Where a sum is the same for another input, the comparison at every point says so."""
        found = self.ordinary(x)
        same = self.calls < len(self.sums) and _sum(x) == self.sums[self.calls]
        self.kept.append(self._terms(x, found, room) if same else None)
        self.calls += 1
        return found

    def output(self, x: Tensor) -> Tensor:
        call = self.calls
        self.calls += 1
        terms = self.kept[call] if call < len(self.kept) else None
        if terms is None:
            return self.ordinary(x)
        if not terms.belong_to(x):
            self.kept[call] = None
            return self.ordinary(x)
        return terms.sum(self.point)

    def _terms(self, x: Tensor, found: Tensor, room: _Room) -> _Terms | None:
        made_anew = x.untyped_storage().data_ptr() not in self.owned
        if x.is_inference() or (made_anew and len(self.module.weight) < FEWEST_OUTPUTS):
            return None
        moved = [k for k, direction in enumerate(self.directions) if self._is_moved(direction)]
        size = (1 + len(moved) + (len(moved) == 2)) * found.numel() * found.element_size()
        if not room.take(size + (x.numel() * x.element_size() if made_anew else 0)):
            return None
        # A model may write into what it was given.
        base = found.clone()
        along = []
        for k in moved:
            weight, bias = (None if n is None else self.directions[k][n].to(found) for n in self.names)
            weight = torch.zeros_like(self.module.weight) if weight is None else weight
            product = self.product(self.module, x, weight, bias)
            along.append((k, torch.empty_like(base).copy_(product)))
        # Of infinities the sum makes NaN where the product has a sign.
        finite = all(bool(t.isfinite().all()) for t in (base, *(t for _, t in along)))
        return _Terms(x, x._version, base, along) if finite else None

    def _is_moved(self, direction: Direction) -> bool:
        return any(n is not None and bool(direction[n].any()) for n in self.names)


@dataclass
class _Terms:
    """Of one call.

    Attributes:
        input: that they belong to.
        version: of its memory.
        base: at the model's own weights.
        along: the number of a direction, and the product with it.
        row: the base and the first of two directions, times ``step``.
    """

    input: Tensor
    version: int
    base: Tensor
    along: list[tuple[int, Tensor]]
    row: Tensor | None = field(default=None, init=False)
    step: float = field(default=0.0, init=False)

    def belong_to(self, x: Tensor) -> bool:
        own = self.input
        if own._version != self.version or type(x) is not Tensor or x.dtype is not own.dtype:
            return False
        if torch.is_grad_enabled() or _functorch.peek_interpreter_stack() is not None:
            return False
        if x.shape == own.shape and x.stride() == own.stride() and x.data_ptr() == own.data_ptr():
            return True
        return x.device == own.device and torch.equal(x, own)

    def sum(self, point: Sequence[float]) -> Tensor:
        """In memory of its own, as the layer's output is."""
        if not self.along:
            return self.base.clone()
        base = self.base
        if len(self.along) == 2:
            first, term = self.along[0]
            if self.row is None or self.step != point[first]:
                self.step = point[first]
                self.row = torch.add(base, term, alpha=self.step, out=self.row)
            base = self.row
        last, term = self.along[-1]
        return torch.add(base, term, alpha=point[last])


def _counts(module: nn.Module) -> bool:
    if type(module) not in PRODUCTS or "forward" in module.__dict__:
        return False
    held = module._parameters
    weight, bias = held.get("weight"), held.get("bias")
    if weight is None or (module.bias is not None and bias is None):
        return False
    if type(module) is nn.Linear and weight.shape[1] < FEWEST_INPUTS:
        return False
    plain = weight.dtype in (torch.float32, torch.float64) and weight.layout is torch.strided
    return plain and type(weight) is nn.Parameter


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ in (
        "OptimizedModule",
        "RecursiveScriptModule",
    )


def _sum(x: Tensor) -> float:
    """NaN, which is equal to nothing, for what terms cannot be kept of: a model may differentiate within."""
    if type(x) is not Tensor or x.layout is not torch.strided or torch.is_autocast_enabled(x.device.type):
        return float("nan")
    if torch.is_grad_enabled() or _functorch.peek_interpreter_stack() is not None:
        return float("nan")
    return float(x.sum(dtype=torch.float64))


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)
