"""How losses are kept, in files and in state dicts: with the options that give their values a meaning."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lossmeta._checks import FLOATS, dtype_name
from lossmeta._safetensors import read, write

FORMAT = 1  # one more wherever what is there would be read as something else
HEADER = "lossmeta"
STATE = "_extra_state"  # torch's own name

Loss = TypeVar("Loss", bound="SavedLoss")


class SavedLoss(nn.Module):
    """Base of losses that know how they were made.

    A subclass takes ``device`` and names the other arguments of its constructor, tensors aside. Each is an attribute of
    the same name. A subclass that names none counts as the loss that it is made from.

    Attributes:
        DEFINING: without which the values would be those of another loss. A state dict holds them, and only a loss with
            the same ones loads it.
        APPLIED: how the loss is applied to a batch. A file holds them too.
        PARTS: other losses that it may be made of. A file holds the options of each; in a state dict each has its own.
    """

    DEFINING: ClassVar[tuple[str, ...]]
    APPLIED: ClassVar[tuple[str, ...]]
    PARTS: ClassVar[dict[str, type[SavedLoss]]] = {}
    _unlearned = False  # parameters as they were drawn, which serve nothing yet

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the loss with all its options to a safetensors file, for :meth:`load`.

        A file that is there is replaced in one step: whatever fails, the old one stays. A ``state_dict`` is for a loss
        that is made by the same code.

        Args:
            path: of the file; missing folders are made.

        Raises:
            ValueError: for parameters whose shapes do not fit the options.
            OSError: where the file cannot be written.

        Example:
            >>> loss = lossmeta.losses.FocalWeightedLoss(offset=0.5)
            >>> loss.save("loss.safetensors")
            >>> lossmeta.losses.FocalWeightedLoss.load("loss.safetensors").offset
            0.5
        """
        tensors = _tensors(self)
        description = _described(self, _in_file(type(self)))
        like = _blank(type(self), json.loads(description)["options"], tensors)
        where = f"{type(self).__name__}.save: the loss"
        _check_tensors(where, like, tensors, "give them the shapes that its options ask for")
        write(path, tensors, HEADER, description)

    @classmethod
    def load(cls: type[Loss], path: str | os.PathLike[str]) -> Loss:
        """The loss that :meth:`save` wrote: its options, dtype and values, on the CPU.

        Nothing is unpickled. Its parameters are trainable; where the loss is only to be minimised, freeze them with
        ``requires_grad_(False)``.

        Args:
            path: of the file.

        Raises:
            ValueError: for a file of another loss or of a newer version, one that :meth:`save` did not write, and a
                damaged one.
            OSError: where there is no such file.
        """
        where = f"{cls.__name__}.load: {os.fspath(path)}"
        description, tensors = read(where, path, HEADER, FORMAT)
        options = _options(where, cls, description)
        try:
            loss = _blank(cls, options, tensors)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{where} must hold options that fit, got {options} ({error}); save it again"
            ) from error
        _check_tensors(where, loss, tensors, "save it again")
        loss.load_state_dict(tensors, assign=True)
        return loss

    def get_extra_state(self) -> Tensor:
        """The options that a state dict must fit, as JSON: a tensor, which all that takes state dicts can take."""
        return torch.tensor(list(_described(self, self.DEFINING).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Refuses options of another loss by a ValueError."""
        if refusal := self._refusal(state):
            raise ValueError(refusal)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Looks at the options before anything is written; a state dict without them is taken as fitting."""
        key = prefix + STATE
        refusal = self._refusal(state_dict[key]) if key in state_dict else None
        if refusal:
            error_msgs.append(refusal)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)
        if any(prefix + name in state_dict for name in self._parameters):
            self._unlearned = False

    def _refusal(self, state: Any) -> str | None:
        """Why the values that come with this extra state are not for this loss."""
        if isinstance(state, Tensor) and state.is_meta:
            return None
        name = _name(type(self))
        try:
            # Rounded: a state dict may have been averaged, or cast to half precision.
            theirs = json.loads(bytes(round(byte) for byte in state.tolist()))
            newer = theirs["format"] > FORMAT
            kind, options = ("", {}) if newer else (theirs["loss"], dict(theirs["options"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            return (
                f"{name}: '{STATE}' must be what get_extra_state gave, got {state!r:.80}; leave it out to load the "
                "values all the same"
            )
        if newer:
            return f"{name}: '{STATE}' must have format {FORMAT}, got {theirs['format']}; update lossmeta"
        ours = json.loads(_described(self, self.DEFINING))["options"]
        different = [option for option in ours if option in options and options[option] != ours[option]]
        if kind == name and not different:
            return None
        return (
            f"{name}: the state must be that of {_call(name, ours, different if kind == name else [])}, got that of "
            f"{_call(kind, options, different if kind == name else [])}; make the loss with the options of the state, "
            f"or leave '{STATE}' out of it to load the values all the same"
        )


def _tensors(loss: nn.Module) -> dict[str, Tensor]:
    return {**dict(loss.named_parameters()), **dict(loss.named_buffers())}


def _name(kind: type[SavedLoss]) -> str:
    return next(base for base in kind.__mro__ if "DEFINING" in vars(base)).__name__


def _described(loss: SavedLoss, names: Sequence[str]) -> str:
    """What the loss is, as JSON."""
    description = {
        "format": FORMAT,
        "loss": _name(type(loss)),
        "options": _values(loss, names),
    }
    return json.dumps(description, default=lambda number: number.item())  # numbers of NumPy and torch


def _values(loss: SavedLoss, names: Sequence[str]) -> dict[str, Any]:
    values = {name: getattr(loss, name) for name in names}
    parts = {name: part for name, part in values.items() if isinstance(part, SavedLoss)}
    return values | {name: _values(part, _in_file(type(part))) for name, part in parts.items()}


def _in_file(kind: type[SavedLoss]) -> tuple[str, ...]:
    return (*kind.DEFINING, *kind.APPLIED, *kind.PARTS)


def _blank(kind: type[Loss], options: dict[str, Any], tensors: dict[str, Tensor]) -> Loss:
    """A loss of these options without values; making it draws no random numbers."""
    weight = {"weight": tensors["weight"]} if "weight" in tensors else {}
    parts = {
        name: _blank(part, options[name], {})
        for name, part in kind.PARTS.items()
        if options.get(name) is not None
    }
    return kind(**options | parts, **weight, device="meta")


def _options(where: str, kind: type[SavedLoss], description: dict[str, Any]) -> dict[str, Any]:
    try:
        name, options = description["loss"], dict(description["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} must be a file that save wrote, got one without its header; save it again"
        ) from error
    if name != _name(kind):
        raise ValueError(f"{where} must hold a {_name(kind)}, got a {name}; use {name}.load")
    unknown = sorted(options.keys() - set(_in_file(kind)))
    if unknown:
        raise ValueError(f"{where} must hold options of this version, got also {unknown}; update lossmeta")
    return options


def _check_tensors(where: str, loss: SavedLoss, tensors: dict[str, Tensor], remedy: str) -> None:
    expected = _tensors(loss)
    fit = expected.keys() == tensors.keys() and all(
        t.shape == expected[name].shape and t.dtype in FLOATS for name, t in tensors.items()
    )
    if not fit:
        raise ValueError(
            f"{where} must hold float tensors {_shapes(expected)}, got {_shapes(tensors)}; {remedy}"
        )


def _shapes(tensors: dict[str, Tensor]) -> str:
    shown = {
        name: f"{list(t.shape)}" + ("" if t.dtype in FLOATS else f" of {dtype_name(t)}")
        for name, t in sorted(tensors.items())
    }
    return "{" + ", ".join(f"{name!r}: {shape}" for name, shape in shown.items()) + "}"


def _call(name: str, options: dict[str, Any], shown: Sequence[str]) -> str:
    return f"{name}({', '.join(f'{option}={options[option]!r}' for option in shown)})"
