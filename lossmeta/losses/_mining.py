"""Reads what a loss of pytorch-metric-learning is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmeta._checks import check_float, check_same_device, check_tensors, dtype_name, outside

Pairs = tuple[Tensor, Tensor]
Triplets = tuple[Tensor, Tensor, Tensor]
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8)  # uint8 is a mask to torch
LABELS = (*INDICES, torch.uint8, torch.bool)
REMEDIES = {
    "reducer": "; give reduction='none' and reduce the values yourself, or 'mean' or 'sum'",
    "distance": "; it is the Euclidean one of the embeddings as they come, and "
    "torch.nn.functional.normalize(embeddings) gives that of LpDistance()",
}


@dataclass(frozen=True)
class Batch:
    """Anchors, and what they are compared with, by one of ``labels``, ``triplets`` and ``pairs``.

    Attributes:
        anchors: the embeddings, ``[M, D]``.
        references: ``[R, D]``, the embeddings themselves where none are given.
        labels: int64, ``[M]``, where all embeddings are compared with each other.
        triplets: an index of an anchor and two of references, ``[T]`` each.
        pairs: the positive ones and the negative ones, each an index of an anchor and one of a reference.
        mined: whether triplets or pairs were given, not found by labels.
    """

    anchors: Tensor
    references: Tensor
    labels: Tensor | None = None
    triplets: Triplets | None = None
    pairs: tuple[Pairs, Pairs] | None = None
    mined: bool = True


def read_batch(
    loss: str, embeddings: Tensor, labels: Any, indices: Any, ref_emb: Any, ref_labels: Any
) -> Batch:
    check_tensors(loss, embeddings=embeddings)
    check_float(loss, embeddings=embeddings)
    if embeddings.dim() != 2:
        raise ValueError(f"{loss}: embeddings must be [M, D], got {list(embeddings.shape)}")
    own = ref_emb is None or ref_emb is embeddings
    references = embeddings if own else _references(loss, ref_emb, embeddings)
    if ref_emb is None and ref_labels is not None:
        raise ValueError(f"{loss}: ref_emb must be given with ref_labels, got none")
    if indices is not None:
        parts = _indices(loss, indices, embeddings, references)
        if len(parts) == 3:
            return Batch(embeddings, references, triplets=parts)
        return Batch(embeddings, references, pairs=(parts[:2], parts[2:]))
    if labels is None:
        raise ValueError(f"{loss}: labels or indices_tuple must be given, got neither")
    if not own and ref_labels is None:
        raise ValueError(f"{loss}: ref_labels or indices_tuple must be given with ref_emb, got neither")
    y = _labels(loss, "labels", labels, embeddings)
    if own and (ref_labels is None or ref_labels is labels):
        return Batch(embeddings, references, labels=y, mined=False)
    same = y[:, None] == _labels(loss, "ref_labels", ref_labels, references)
    others = ~torch.eye(len(y), dtype=torch.bool, device=y.device) if own else True
    pairs = torch.where(same & others), torch.where(~same & others)
    return Batch(embeddings, references, pairs=pairs, mined=False)  # type: ignore[arg-type]


def refuse_options(loss: str, options: Mapping[str, object]) -> None:
    """Names an option of pytorch-metric-learning's losses, and what to do instead."""
    for option, value in options.items():
        raise TypeError(f"{loss}: {option} is no option, got {value!r}{REMEDIES.get(option, '')}")


def _references(loss: str, ref_emb: Any, embeddings: Tensor) -> Tensor:
    check_tensors(loss, ref_emb=ref_emb)
    check_float(loss, ref_emb=ref_emb)
    check_same_device(loss, ref_emb=ref_emb, embeddings=embeddings)
    if ref_emb.dim() != 2 or ref_emb.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"{loss}: ref_emb must be [R, {embeddings.shape[1]}] as embeddings are, got {list(ref_emb.shape)}"
        )
    return ref_emb  # type: ignore[no-any-return]


def _labels(loss: str, argument: str, labels: Any, embeddings: Tensor) -> Tensor:
    """As int64 on the device of the embeddings: pytorch-metric-learning moves them, and makes some on the CPU."""
    check_tensors(loss, **{argument: labels})
    if labels.dtype not in LABELS:
        raise ValueError(f"{loss}: {argument} must be integers, got {dtype_name(labels)}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"{loss}: {argument} must be {list(embeddings.shape[:1])}, got {list(labels.shape)}")
    return labels.to(embeddings.device, torch.int64)  # type: ignore[no-any-return]


def _indices(loss: str, indices: Any, embeddings: Tensor, references: Tensor) -> tuple[Any, ...]:
    """The three tensors of triplets or the four of pairs, as int64."""
    if isinstance(indices, Tensor):
        if indices.dim() != 2 or indices.shape[1] != 3:
            raise ValueError(
                f"{loss}: indices_tuple must be [T, 3] as one tensor, got {list(indices.shape)}; "
                "call the loss with (embeddings, labels) or (embeddings, labels, indices_tuple)"
            )
        named = {f"indices_tuple[:, {i}]": part for i, part in enumerate(indices.unbind(1))}
    elif isinstance(indices, Sequence):
        if len(indices) not in (3, 4):
            raise ValueError(
                f"{loss}: indices_tuple must hold 3 tensors (anchor, positive, negative) or 4 "
                f"(anchor, positive, anchor, negative), got {len(indices)}"
            )
        named = {f"indices_tuple[{i}]": part for i, part in enumerate(indices)}
    else:
        raise TypeError(
            f"{loss}: indices_tuple must be a tensor [T, 3] or a tuple of tensors, got {type(indices).__name__}"
        )
    check_tensors(loss, **named)
    for argument, part in named.items():
        if part.dtype not in INDICES:
            raise ValueError(
                f"{loss}: {argument} must be int64, int32, int16 or int8, got {dtype_name(part)}"
            )
    check_same_device(loss, **named, embeddings=embeddings)
    parts = tuple(named.values())
    groups = (parts,) if len(parts) == 3 else (parts[:2], parts[2:])
    if any(part.dim() != 1 or len(part) != len(group[0]) for group in groups for part in group):
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise ValueError(
            f"{loss}: indices_tuple must hold tensors [T], [T], [T] or [P], [P], [Q], [Q], got {shapes}"
        )
    anchors = (True, False, False) if len(parts) == 3 else (True, False, True, False)
    for (argument, part), anchor in zip(named.items(), anchors, strict=True):
        outside(loss, argument, part, len(embeddings if anchor else references))
    return tuple(part.long() for part in parts)
