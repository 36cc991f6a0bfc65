"""Verification accuracy: whether two samples are of one class, told by their distance."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta._checks import check_at_least_one, check_int64, check_tensors, choice
from lossmeta.metrics._embeddings import DISTANCES, EmbeddingMetric
from lossmeta.metrics._metric import check_batch, class_labels


def verification_accuracy(
    embeddings: Tensor,
    labels: Tensor,
    pairs: Tensor,
    *,
    folds: int = 10,
    distance: str = "cosine",
) -> Tensor:
    r"""The share of pairs that a threshold on their distance tells right, as on LFW.

    The pairs come in as many folds of neighbouring ones, whose sizes differ by one at most. For each fold the threshold
    is that which tells most of the other folds' pairs right, and its accuracy is that on the fold; the result is the
    mean over the folds. A threshold lies halfway between two neighbouring distances; of equally good ones it is the
    lowest. With one fold the threshold is the best for the pairs themselves.

    Args:
        embeddings: ``[N, D]``, or ``[B, N, D]`` of B models, of floating dtype; half precision is computed in float32.
        labels: integers ``[N]``.
        pairs: rows of the embeddings, ``[P, 2]``, int64; see :func:`verification_pairs`.
        folds: from 1 to P.
        distance: ``"cosine"`` or ``"euclidean"``.

    Returns:
        ``[]`` or ``[B]``, float64; NaN where an embedding of a pair is not finite.

    Raises:
        TypeError: for something that is not a tensor.
        ValueError: for shapes, dtypes, devices, rows or options that do not fit.

    Sources:
        Huang et al., "Labeled Faces in the Wild: A Database for Studying Face Recognition in Unconstrained
        Environments" (2007), has the protocol.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 1.0], [0.0, 1.0]])
        >>> pairs = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
        >>> verification_accuracy(x, torch.tensor([0, 0, 1, 1]), pairs, folds=2).item()
        1.0
    """
    name = "verification_accuracy"
    check_batch(name, embeddings, labels, None)
    stacked = embeddings if embeddings.dim() == 3 else embeddings[None]
    if embeddings.dim() not in (2, 3) or labels.shape != stacked.shape[1:2]:
        raise ValueError(
            f"{name}: embeddings must be [N, D] or [B, N, D] and labels [N], got {list(embeddings.shape)} and "
            f"{list(labels.shape)}"
        )
    normalised = choice(name, "distance", distance, DISTANCES)
    _check_pairs(name, pairs, folds)
    if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < len(labels):
        raise ValueError(
            f"{name}: pairs must hold rows in [0, {len(labels)}), got {int(pairs.min())} to {int(pairs.max())}"
        )
    rows = pairs.to(labels.device)
    labels = class_labels(name, labels)
    same = labels[rows[:, 0]] == labels[rows[:, 1]]
    with torch.no_grad():
        found = torch.stack([_of_one(x, rows, same, folds, normalised) for x in stacked])
    return found if embeddings.dim() == 3 else found[0]


def _check_pairs(name: str, pairs: Tensor, folds: int) -> None:
    check_tensors(name, pairs=pairs)
    check_int64(name, pairs=pairs)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"{name}: pairs must be [P, 2], P at least 1, got {list(pairs.shape)}")
    check_at_least_one(name, "folds", folds)
    if folds > len(pairs):
        raise ValueError(f"{name}: folds must be at most the {len(pairs)} pairs, got {folds}")


def _of_one(x: Tensor, rows: Tensor, same: Tensor, folds: int, normalised: bool) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = F.normalize(x, dim=1) if normalised else x
    distances = (x[rows[:, 0]] - x[rows[:, 1]]).square().sum(1)
    fold = torch.arange(len(rows), device=x.device) * folds // len(rows)
    order = distances.argsort()
    ranked, right, of = distances[order], same[order].double() * 2 - 1, fold[order]
    # With the i nearest pairs of the others taken for the same, as many more are right as the sum of their signs says.
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for f in range(folds):
        known = of != f if folds > 1 else of == f
        threshold = _threshold(ranked[known], right[known])
        told = (distances <= threshold) == same
        total += told[fold == f].double().mean()
    return (total / folds).where(distances.isfinite().all(), torch.nan)


def _threshold(
    distances: Tensor,  # [n], ascending
    signs: Tensor,  # [n], 1 for the same class and -1 for another
) -> Tensor:
    """Up to which distance most are right if they are taken for the same."""
    gain = F.pad(signs.cumsum(0), (1, 0))
    # Equal distances are on the same side.
    apart = F.pad(distances[1:] > distances[:-1], (1, 1), value=True)
    best = gain.where(apart, -torch.inf).argmax()  # the first of equals
    ends = F.pad(distances, (1, 1))
    ends[0], ends[-1] = -torch.inf, torch.inf
    below, above = ends[best], ends[best + 1]
    middle = below + (above - below) / 2
    # Rounding must not take the pair above in.
    return torch.where(middle < above, middle, below).where(best > 0, -torch.inf)


def verification_pairs(labels: Tensor, count: int, *, seed: int = 0, ignore_index: int = -100) -> Tensor:
    """Pairs of samples by chance, of the same class and of different ones in turn.

    A class is drawn among those with two samples, then two samples of it; of a pair of different classes, two samples.

    Args:
        labels: integers ``[N]``.
        count: of pairs, P.
        seed: of the draws.
        ignore_index: samples with this label are in no pair.

    Returns:
        Rows ``[P, 2]``, int64, on the CPU.

    Raises:
        TypeError: for something that is not a tensor.
        ValueError: where no class has two samples, or there is only one class.

    Example:
        >>> verification_pairs(torch.tensor([0, 0, 1, 1]), 4).shape
        torch.Size([4, 2])
    """
    check_tensors("verification_pairs", labels=labels)
    if labels.dim() != 1:
        raise ValueError(f"verification_pairs: labels must be [N], got {list(labels.shape)}")
    check_at_least_one("verification_pairs", "count", count)
    y = class_labels("verification_pairs", labels).cpu()
    rows = (y != ignore_index).nonzero()[:, 0]
    y = y[rows]
    members = [m for c in y.unique() if len(m := (y == c).nonzero()[:, 0]) > 1]
    if not members or len(y.unique()) < 2:
        raise ValueError(
            "verification_pairs: labels must hold two classes, one of them twice, got "
            f"{len(y.unique())} classes of {len(y)} samples"
        )
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator, device="cpu"))

    pairs = []
    for i in range(count):
        if i % 2 == 0:
            own = members[below(len(members))]
            a = below(len(own))
            b = (a + 1 + below(len(own) - 1)) % len(own)
            pairs.append([int(own[a]), int(own[b])])
        else:
            a = below(len(y))
            b = below(len(y))
            while y[a] == y[b]:
                a, b = below(len(y)), below(len(y))
            pairs.append([a, b])
    return rows[torch.tensor(pairs, dtype=torch.int64, device="cpu")]


class VerificationAccuracy(EmbeddingMetric):
    """The verification accuracy of all embeddings since the start; see :func:`verification_accuracy`.

    Pairs are rows in the order of the updates, which that of several processes is not: it does not join over them.

    Args:
        pairs: rows of the embeddings in the order in which they come, ``[P, 2]``, int64.
        folds: from 1 to P.
        distance: ``"cosine"`` or ``"euclidean"``.

    Raises:
        TypeError: for pairs that are no tensor.
        ValueError: for pairs or options that do not fit.

    Example:
        >>> metric = VerificationAccuracy(torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]), folds=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 1.0], [0.0, 1.0]]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute().item()
        1.0
    """

    higher_is_better = True
    joined: ClassVar[dict[str, str]] = {}

    def __init__(self, pairs: Tensor, *, folds: int = 10, distance: str = "cosine") -> None:
        _check_pairs("VerificationAccuracy", pairs, folds)
        choice("VerificationAccuracy", "distance", distance, DISTANCES)
        super().__init__()
        self.pairs, self.folds, self.distance = pairs.clone(), folds, distance

    def _of(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return verification_accuracy(embeddings, labels, self.pairs, folds=self.folds, distance=self.distance)
