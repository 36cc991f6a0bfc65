"""Metrics of all embeddings together."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lossmeta._checks import may_look, refuse
from lossmeta.metrics._metric import Metric, check_batch, class_labels

DISTANCES = {"cosine": True, "euclidean": False}  # whether only the direction counts


class EmbeddingMetric(Metric):
    """Keeps embeddings and labels until :meth:`reset`, on their device; a subclass judges them by ``_of``."""

    joined: ClassVar[dict[str, str]] = {"embeddings": "cat", "labels": "cat"}

    def __init__(self) -> None:
        self.reset()

    def _of(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Of embeddings ``[N, D]``, float64 ``[]``, or of several models ``[B, N, D]``, ``[B]``."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forgets every sample."""
        self.embeddings: list[Tensor] = []
        self.labels: list[Tensor] = []

    @torch.no_grad()
    def update(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            scores: the embeddings, ``[N, D]``.
            labels: integers ``[N]``.
            weight: must be ``None``.

        Raises:
            TypeError: for something that is not a tensor.
            ValueError: for shapes, dtypes or devices that do not fit, weights, and embeddings that are not finite.
        """
        name = type(self).__name__
        if weight is not None:
            raise ValueError(f"{name}: weight must be None, samples have none here")
        check_batch(name, scores, labels, None)
        if scores.dim() != 2 or labels.shape != scores.shape[:1]:
            raise ValueError(
                f"{name}: embeddings must be [N, D] and labels [N], got {list(scores.shape)} and {list(labels.shape)}"
            )
        if self.embeddings and scores.shape[1] != self.embeddings[0].shape[1]:
            raise ValueError(
                f"{name}: embeddings must be [N, {self.embeddings[0].shape[1]}] as before, got {list(scores.shape)}"
            )
        labels = class_labels(name, labels)
        if may_look(scores):
            refuse(name, "embeddings must be finite", scores, ~scores.isfinite())
        # Copies: the caller may reuse its buffers.
        self.embeddings.append(scores.detach().clone())
        self.labels.append(labels.detach().clone())

    def compute(self) -> Tensor:
        """A float64 scalar; NaN where nothing counts."""
        if not self.embeddings:
            return torch.full((), torch.nan, dtype=torch.float64, device="cpu")
        return self._of(torch.cat(self.embeddings), torch.cat(self.labels))

    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self._of(scores, labels)

    def state_dict(self) -> dict[str, Any]:
        return {"embeddings": list(self.embeddings), "labels": list(self.labels)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.embeddings, self.labels = list(state["embeddings"]), list(state["labels"])
