"""Recall@k of embeddings: whether a sample of the same class is among the k nearest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta._checks import check_at_least_one, choice
from lossmeta.metrics._embeddings import DISTANCES, EmbeddingMetric
from lossmeta.metrics._metric import check_batch, check_ignore_index, class_labels

BLOCK = 1 << 22  # similarities that are looked at together; fewer make the products slower


def recall_at_k(
    embeddings: Tensor,
    labels: Tensor,
    ks: Sequence[int] = (1,),
    *,
    distance: str = "cosine",
    ignore_index: int = -100,
) -> Tensor:
    r"""The share of samples that have one of their own class among the k nearest others, for several k.

    Exact, without a matrix of all distances: memory is that of the embeddings and 32 MiB. Where several others are
    equally near, every order of them is as likely, and the result is the mean over all orders. So embeddings that have
    collapsed to a point get the recall of chance.

    Args:
        embeddings: ``[N, D]``, or ``[B, N, D]`` of B models, of floating dtype; half precision is computed in float32.
        labels: integers ``[N]``. A sample whose class has no other one does not count, but may be near.
        ks: each at least 1.
        distance: ``"cosine"`` or ``"euclidean"``.
        ignore_index: samples with this label are left out altogether.

    Returns:
        ``[len(ks)]`` or ``[B, len(ks)]``, float64; NaN where no sample counts, or an embedding is not finite.

    Raises:
        TypeError: for something that is not a tensor.
        ValueError: for shapes, dtypes, devices or options that do not fit.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0]])
        >>> recall_at_k(x, torch.tensor([0, 0, 1, 1]), (1, 2, 3)).tolist()
        [0.75, 0.75, 1.0]
    """
    name = "recall_at_k"
    check_batch(name, embeddings, labels, None)
    for k in ks:
        check_at_least_one(name, "k", k)
    normalised = choice(name, "distance", distance, DISTANCES)
    stacked = embeddings if embeddings.dim() == 3 else embeddings[None]
    if embeddings.dim() not in (2, 3) or labels.shape != stacked.shape[1:2] or stacked.shape[2] == 0:
        raise ValueError(
            f"{name}: embeddings must be [N, D] or [B, N, D] and labels [N], got {list(embeddings.shape)} and "
            f"{list(labels.shape)}"
        )
    labels = class_labels(name, labels)
    used = labels != ignore_index
    # Sorted, so that the samples of a class lie side by side.
    order = labels.argsort(stable=True)
    order = order[used[order]]
    labels = labels[order]
    with torch.no_grad():
        found = torch.stack([_of_one(x[order], labels, tuple(ks), normalised) for x in stacked])
    return found if embeddings.dim() == 3 else found[0]


def _of_one(x: Tensor, labels: Tensor, ks: tuple[int, ...], normalised: bool) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = F.normalize(x, dim=1) if normalised else x - x.mean(0)
    n = len(x)
    nothing = torch.full((len(ks),), torch.nan, dtype=torch.float64, device=x.device)
    if n == 0:
        return nothing
    _, sizes = labels.unique_consecutive(return_counts=True)
    last = sizes.cumsum(0).repeat_interleave(sizes)
    first = last - sizes.repeat_interleave(sizes)
    widest = int(sizes.max())
    transposed = x.T.contiguous()
    squares = None if normalised else x.square().sum(1) / 2
    rows = max(1, BLOCK // n)
    near, above = x.new_empty(rows, n), x.new_empty(rows, n)
    total = torch.zeros(len(ks), dtype=torch.float64, device=x.device)
    for begin in range(0, n, rows):
        own = torch.arange(begin, min(begin + rows, n), device=x.device)
        s, buffer = near[: len(own)], above[: len(own)]
        # The higher the nearer; without what is the same for a whole row.
        torch.mm(x[begin : begin + rows], transposed, out=s)
        if squares is not None:
            s -= squares
        s.scatter_(1, own[:, None], -torch.inf)
        # Of its own class, the nearest.
        columns = first[own][:, None] + torch.arange(widest, device=x.device)
        inside = columns < last[own][:, None]
        alike = s.gather(1, columns.clamp_max(n - 1)).masked_fill(~inside, -torch.inf)
        best = alike.amax(1, keepdim=True)
        # Counted as numbers, which is faster than booleans; exact up to 2^24 of them.
        nearer = torch.gt(s, best, out=buffer).sum(1).double()
        as_near = torch.eq(s, best, out=buffer).sum(1).double()
        right = (alike == best).sum(1).double()
        counts = (last - first)[own, None] > 1
        total += _chance(nearer, right, as_near - right, ks).where(counts, 0).sum(0)
    counted = sizes[sizes > 1].sum()
    result = total / counted
    return result.where(x.isfinite().all(), nothing)


def _chance(nearer: Tensor, right: Tensor, wrong: Tensor, ks: tuple[int, ...]) -> Tensor:
    """``[N, K]``: that one of ``right`` comes among the first ``k - nearer`` of ``right + wrong`` in any order."""
    places = torch.tensor(ks, dtype=torch.float64, device=nearer.device) - nearer[:, None]
    right, wrong = right[:, None], wrong[:, None]

    def log_choices(a: Tensor, b: Tensor) -> Tensor:
        return (a + 1).lgamma() - (b + 1).lgamma() - (a - b + 1).lgamma()

    some = places.clamp_min(0).minimum(wrong)
    missed = (log_choices(wrong, some) - log_choices(right + wrong, some)).exp()
    return torch.where(places <= 0, 0, torch.where(places > wrong, 1, 1 - missed))


class RecallAtK(EmbeddingMetric):
    """Recall@k of all embeddings since the start; see :func:`recall_at_k`.

    Args:
        k: how many neighbours.
        distance: ``"cosine"`` or ``"euclidean"``.
        ignore_index: samples with this label are left out.

    Example:
        >>> metric = RecallAtK(1)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0]]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute().item()
        0.75
    """

    higher_is_better = True

    def __init__(self, k: int = 1, *, distance: str = "cosine", ignore_index: int = -100) -> None:
        check_at_least_one("RecallAtK", "k", k)
        check_ignore_index("RecallAtK", ignore_index)
        choice("RecallAtK", "distance", distance, DISTANCES)
        super().__init__()
        self.k, self.distance, self.ignore_index = k, distance, ignore_index

    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self._of(scores, labels)

    def _of(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        found = recall_at_k(
            embeddings, labels, (self.k,), distance=self.distance, ignore_index=self.ignore_index
        )
        return found[..., 0]
