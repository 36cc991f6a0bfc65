"""What a pass over a model moves beside its weights, kept and brought back.

That is random numbers, buffers, and tensors, numbers and containers in plain attributes of its modules.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# What nn.Module itself keeps in its attributes, and what no pass changes.
_INTERNAL = frozenset(nn.Module().__dict__)
_ABSENT = object()
_NUMBERS = (bool, int, float, complex, str, bytes, type(None))


class Watch:
    """Where a model's passes may leave something, found once and looked up again from time to time.

    Attributes:
        generators: that modules own; of torch, Python or NumPy.
        attributes: of modules, by name, that a pass has been seen to change.
        numpy: whether NumPy's global random numbers have been seen to be drawn.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.attributes: dict[tuple[nn.Module, str], None] = {}
        self.numpy = False
        self.look()

    def look(self) -> None:
        """Finds modules, buffers, generators and devices anew."""
        modules = list(self.model.modules())
        self.buffers = [m._buffers for m in modules if m._buffers]
        self.plain = [(m, name) for m in modules for name in m.__dict__ if name not in _INTERNAL]
        self.generators = _generators(modules)
        tensors = (*self.model.parameters(), *self.model.buffers())
        self.devices = {t.device for t in tensors if t.device.type == "cuda"} | (
            {self.device} if self.device.type == "cuda" else set()
        )

    def learn(self, start: ModelState) -> None:
        """Remembers what the passes since ``start`` have changed, which kept everything."""
        known = set(self.plain)
        self.look()
        appeared = [key for key in self.plain if key not in known]
        self.attributes |= dict.fromkeys([*start.changed(), *appeared])
        self.numpy = self.numpy or start.random.numpy_differs(RandomState(self.device))


class RandomState:
    """The random numbers of torch, Python, NumPy and of a model's own generators, as they are when this is made.

    Args:
        device: of the model.
        watch: of the model; without it there are no generators of its own, and NumPy's are kept.
        everything: keep NumPy's global numbers although no pass has been seen to draw any.
    """

    def __init__(self, device: torch.device, watch: Watch | None = None, *, everything: bool = False) -> None:
        self.capturing = is_capturing(device)
        if self.capturing:  # they cannot be read then, and a captured step draws none
            return
        devices = watch.devices if watch else ({device} if device.type == "cuda" else set())
        self.torch = torch.get_rng_state()
        self.on_devices = [(d, torch.cuda.get_rng_state(d)) for d in devices]
        self.python = random.getstate()
        self.fingerprint = _numpy_fingerprint()
        keeps_numpy = "numpy.random" in sys.modules and (everything or watch is None or watch.numpy)
        self.numpy = sys.modules["numpy.random"].get_state() if keeps_numpy else None
        self.own = [(g, _state_of(g)) for g in (watch.generators if watch else ())]

    def bring_back(self) -> None:
        if self.capturing:
            return
        torch.set_rng_state(self.torch)
        for device, state in self.on_devices:
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy.random"].set_state(self.numpy)
        for generator, state in self.own:
            _set_state(generator, state)

    def numpy_differs(self, other: RandomState) -> bool:
        """Whether NumPy's global numbers have been drawn between the two."""
        return not (self.capturing or other.capturing) and self.fingerprint != other.fingerprint

    def equals(self, other: RandomState) -> bool:
        """Whether nothing has been drawn between the two."""
        if self.capturing or other.capturing:
            return True
        return (
            torch.equal(self.torch, other.torch)
            and all(
                torch.equal(a, b) for (_, a), (_, b) in zip(self.on_devices, other.on_devices, strict=True)
            )
            and self.python == other.python
            and self.fingerprint == other.fingerprint
            and all(_same(a, b) for (_, a), (_, b) in zip(self.own, other.own, strict=True))
        )


class ThreadModes:
    """Grad mode and autocast of the calling thread, as they are when this is made.

    Context managers end with them as before, unless an interrupt strikes while they end.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.grad = kind, torch.is_grad_enabled()
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def bring_back(self) -> None:
        torch.set_grad_enabled(self.grad)
        enabled, dtype = self.autocast
        torch.set_autocast_enabled(self.kind, enabled)
        torch.set_autocast_dtype(self.kind, dtype)


class ModelState:
    """Random numbers, buffers and plain attributes of a model, as they are when this is made.

    A model may put new buffers in the place of the old ones, of other sizes too: the old ones come back.

    Args:
        model: not its wrapper.
        device: of its parameters.
        watch: of the model, for one that is looked at often; then only those attributes are kept that a pass has been
            seen to change.
        everything: keep all attributes and NumPy's numbers, so that :meth:`Watch.learn` can tell which change.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, watch: Watch | None = None, *, everything: bool = False
    ) -> None:
        everything = everything or watch is None
        watch = watch or Watch(model, device)
        self.random = RandomState(device, watch, everything=everything)
        self.buffers: list[tuple[dict[str, Tensor | None], str, Tensor | None, Tensor | None]] = [
            (owner, name, b, None if b is None else b.detach().clone())
            for owner in watch.buffers
            for name, b in owner.items()
        ]
        keys = watch.plain if everything else watch.attributes
        self.attributes = [(m, name, _Kept(m.__dict__.get(name, _ABSENT))) for m, name in keys]
        self.modules = {m: set(m.__dict__) for m in model.modules()} if everything else {}

    def bring_back(self) -> None:
        self.random.bring_back()
        with torch.no_grad():
            for owner, name, tensor, value in self.buffers:
                owner[name] = tensor
                if tensor is not None and value is not None:
                    tensor.copy_(value)
            for module, names in self.modules.items():
                for name in [name for name in module.__dict__ if name not in names]:
                    del module.__dict__[name]
            for module, name, kept in self.attributes:
                kept.bring_back()
                if kept.value is _ABSENT:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = kept.value

    def changed(self) -> list[tuple[nn.Module, str]]:
        """The attributes among those kept that are no longer as they were."""
        return [
            (m, name)
            for m, name, kept in self.attributes
            if not kept.is_as_before(m.__dict__.get(name, _ABSENT))
        ]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever happens within, everything is afterwards as it was when this was made."""
        try:
            yield
        finally:
            self.bring_back()


class _Kept:
    """A value of an attribute: tensors with their contents, containers with their elements, others by reference."""

    def __init__(self, value: Any, depth: int = 3) -> None:
        self.value = value
        self.parts: Any = None
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self.parts = (
                    (value._version, value.detach().clone()) if value.layout is torch.strided else None
                )
        elif depth and isinstance(value, (list, tuple, deque)):
            self.parts = [_Kept(v, depth - 1) for v in value]
        elif depth and isinstance(value, dict):
            self.parts = {k: _Kept(v, depth - 1) for k, v in value.items()}
        elif isinstance(value, set):
            self.parts = set(value)

    def bring_back(self) -> None:
        value, parts = self.value, self.parts
        if isinstance(value, Tensor):
            if parts is not None and value._version != parts[0]:
                value.copy_(parts[1])
                self.parts = (value._version, parts[1])
        elif isinstance(value, (list, tuple, deque)) and parts is not None:
            elements = [_value(p) for p in parts]
            if not isinstance(value, tuple) and not _identical(value, elements):
                value.clear()
                value.extend(elements)
        elif isinstance(value, (dict, set)) and parts is not None:
            before: Any = {k: _value(p) for k, p in parts.items()} if isinstance(value, dict) else parts
            if isinstance(value, set) or not (
                list(value) == list(before) and _identical(value.values(), before.values())
            ):
                value.clear()
                value.update(before)

    def is_as_before(self, value: Any) -> bool:
        if value is not self.value:
            return isinstance(value, _NUMBERS) and type(value) is type(self.value) and value == self.value
        if isinstance(value, Tensor):
            return self.parts is None or value._version == self.parts[0]
        if isinstance(value, (list, tuple, deque)) and self.parts is not None:
            return len(value) == len(self.parts) and all(
                p.is_as_before(v) for p, v in zip(self.parts, value, strict=True)
            )
        if isinstance(value, dict) and self.parts is not None:
            return value.keys() == self.parts.keys() and all(
                self.parts[k].is_as_before(v) for k, v in value.items()
            )
        return not isinstance(value, set) or value == self.parts


def _value(kept: _Kept) -> Any:
    kept.bring_back()
    return kept.value


def _identical(a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def copy_into(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def refuse_shards(where: str, model: nn.Module, remedy: str) -> None:
    sharded = type(model).__name__ == "FullyShardedDataParallel"
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None:
        sharded = sharded or any(isinstance(p, tensors.DTensor) for p in model.parameters())
    if sharded:
        raise ValueError(
            f"{where}: model must have whole parameters, got one whose parameters are sharded (fully_shard, FSDP or "
            f"tensor parallelism); {remedy}"
        )


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


# ---- Generators that modules own.


def _generators(modules: Iterable[nn.Module]) -> list[Any]:
    found: dict[int, Any] = {}

    def visit(value: Any, depth: int) -> None:
        if _is_generator(value):
            found[id(value)] = value
        elif depth and isinstance(value, Mapping):
            for v in value.values():
                visit(v, depth - 1)
        elif depth and isinstance(value, (list, tuple, deque, set)):
            for v in value:
                visit(v, depth - 1)

    for module in modules:
        for name, value in module.__dict__.items():
            if name not in _INTERNAL:
                visit(value, 2)
    return list(found.values())


def _is_generator(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState))


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state() if hasattr(generator, "get_state") else generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _same(a: Any, b: Any) -> bool:
    """Whether two states of a generator are equal; those of NumPy are tuples and dictionaries with arrays."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, tuple):
        return all(map(_same, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def _numpy_fingerprint() -> bytes | None:
    """The bits of NumPy's global Mersenne Twister: reading them costs a hundredth of ``get_state``."""
    numpy = sys.modules.get("numpy.random")
    if numpy is None:
        return None
    bits = numpy.mtrand._rand._bit_generator
    return ctypes.string_at(bits.ctypes.state_address, 2500) if type(bits).__name__ == "MT19937" else None
