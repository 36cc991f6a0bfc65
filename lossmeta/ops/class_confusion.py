"""Class confusion (ALA, Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmeta._checks import check_tensors
from lossmeta.ops._operator import Operator
from lossmeta.ops._precision import accumulation_dtype


def class_confusion(
    logits: Tensor,
    labels: Tensor,
    *,
    sums: Tensor | None = None,
    counts: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    r"""How unlikely a model finds each class :math:`j` where :math:`i` is true (ALA, Eq. 7), as sums and counts.

    .. math:: \mathrm{sums}_{ij} = \sum_{n:\,y_n = i} -\log \mathrm{softmax}(x_n)_j, \qquad
              \mathrm{counts}_i = |\{n : y_n = i\}|, \qquad C_{ij} = \mathrm{sums}_{ij} / \mathrm{counts}_i

    A validation set streams through: given the ``sums`` and ``counts`` of earlier batches, this one is added to them
    in place. No temporary of the size of ``logits`` is made. Infinite and NaN logits propagate as through
    ``log_softmax``: a class masked by a logit of :math:`-\infty` has infinite sums.

    Args:
        logits: :math:`x`, ``[N, C]``; float32, float64, bfloat16 or float16. Computed without gradient.
        labels: :math:`y`, ``[N]``, int64.
        sums: ``[C, C]``, float64, or ``None`` to start at zero. Changed in place.
        counts: ``[C]``, int64; given together with ``sums``. Changed in place.
        ignore_index: label of the samples to leave out.

    Returns:
        ``sums`` and ``counts``: those given, or new ones.

    Raises:
        ValueError: if only one of ``sums`` and ``counts`` is given, for shapes, dtypes or devices that do not fit, for
            labels outside [0, C), and for ``sums`` that require grad while gradients are recorded; before anything is
            added. On CUDA, where looking for such a label would stall the device, its sample is left out.
        TypeError: for something that is not a tensor.

    Example:
        >>> sums, counts = class_confusion(torch.randn(8, 3), torch.randint(3, (8,)))
        >>> sums, counts = class_confusion(torch.randn(5, 3), torch.randint(3, (5,)), sums=sums, counts=counts)
        >>> confusion = sums / counts[:, None]
    """
    check_tensors("class_confusion", logits=logits, labels=labels)
    if sums is None and counts is None:
        return _operator(logits.detach(), labels, ignore_index)
    if sums is None or counts is None:
        given, missing = ("counts", "sums") if sums is None else ("sums", "counts")
        raise ValueError(f"class_confusion: sums and counts go together, got {given} without {missing}")
    check_tensors("class_confusion", sums=sums, counts=counts)
    if sums.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "class_confusion: sums must not require grad while gradients are recorded, got one that does"
        )
    _accumulate(sums, counts, logits.detach(), labels, ignore_index)
    torch.autograd.graph.increment_version(sums)
    torch.autograd.graph.increment_version(counts)
    return sums, counts


def _reference(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    classes = logits.shape[1]
    log_probability = torch.log_softmax(logits.to(accumulation_dtype(logits.dtype)), 1).double()
    counted = (labels >= 0) & (labels < classes) & (labels != ignore_index)
    # Samples that are left out go to one more row.
    rows = labels.where(counted, classes)
    sums = log_probability.new_zeros(classes + 1, classes).index_add(0, rows, -log_probability)
    counts = labels.new_zeros(classes + 1).index_add(0, rows, torch.ones_like(rows))
    return sums[:classes], counts[:classes]


def _fake(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    classes = logits.shape[1]
    return logits.new_empty((classes, classes), dtype=torch.float64), labels.new_empty((classes,))


def _accumulate_reference(
    sums: Tensor, counts: Tensor, logits: Tensor, labels: Tensor, ignore_index: int
) -> None:
    more_sums, more_counts = _reference(logits, labels, ignore_index)
    sums += more_sums
    counts += more_counts


def _accumulate_fake(sums: Tensor, counts: Tensor, logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    return None


_operator = Operator("class_confusion", reference=_reference, fake=_fake, num_tensors=2, num_outputs=2)
_accumulate = Operator("class_confusion_", reference=_accumulate_reference, fake=_accumulate_fake)
