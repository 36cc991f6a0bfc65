"""Probabilities for every sample from a model that has not seen it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lossmeta.diagnosis._inputs import as_tensor, checked_class_labels
from lossmeta.diagnosis._models import predicted, predicts

NAME = "out_of_fold"
Model = TypeVar("Model")


def out_of_fold(
    make_model: Callable[[], Model],
    train: Callable[[Model, Any, Any], object],
    inputs: Any,
    labels: Any,
    *,
    folds: int = 5,
    seed: int = 0,
) -> Tensor:
    """Probabilities for every sample from a model that was trained on the other folds.

    The folds are stratified: each has its share of every label, to within one sample. Every fold trains a model of its
    own from random numbers of its own, so that the same seed gives the same result; the global random numbers of torch,
    NumPy and Python are afterwards as they were before.

    Args:
        make_model: gives a new model: a torch model of logits ``[N, C]``, or anything with ``predict_proba``.
        train: ``train(model, inputs, labels)`` trains it in place, on rows of ``inputs`` and ``labels``.
        inputs: ``[N, ...]``, a tensor or a NumPy array.
        labels: ``[N]``, integers from 0 on, a tensor or a NumPy array.
        folds: how many models are trained.
        seed: of the folds and of each training.

    Returns:
        ``[N, C]``, float64, on the CPU.

    Raises:
        TypeError: for inputs or labels that are no tensor or array, and a model that cannot predict.
        ValueError: for lengths or labels that do not fit, fewer than 2 folds or fewer samples than folds, and models
            that give something else than probabilities or logits of C classes.

    Example:
        >>> from sklearn.linear_model import LogisticRegression
        >>> inputs, labels = torch.randn(60, 2).numpy(), torch.arange(60).numpy() % 3
        >>> train = lambda model, inputs, labels: model.fit(inputs, labels)
        >>> lossmeta.diagnosis.out_of_fold(LogisticRegression, train, inputs, labels).shape
        torch.Size([60, 3])
    """
    indices = checked_class_labels(NAME, as_tensor(NAME, "labels", labels))
    if not isinstance(inputs, (Tensor, np.ndarray)):
        raise TypeError(f"{NAME}: inputs must be a tensor or a NumPy array, got {type(inputs).__name__}")
    if inputs.ndim < 1 or len(inputs) != len(indices):
        raise ValueError(
            f"{NAME}: inputs must have one row for each of {len(indices)} labels, got {list(inputs.shape)}"
        )
    if folds < 2:
        raise ValueError(f"{NAME}: folds must be at least 2, got {folds}")
    if len(indices) < folds:
        raise ValueError(
            f"{NAME}: there must be at least one sample for each of {folds} folds, got {len(indices)}"
        )
    classes = int(indices.max()) + 1
    fold_of = stratified(indices, folds, torch.Generator("cpu").manual_seed(seed))
    result: Tensor | None = None
    for fold in range(folds):
        held_out, rest = (fold_of == fold).nonzero().squeeze(1), (fold_of != fold).nonzero().squeeze(1)
        with seeded(seed * folds + fold):
            model = make_model()
            if not predicts(model):
                raise TypeError(
                    f"{NAME}: make_model must give a torch model or something with predict_proba, got "
                    f"{type(model).__name__}"
                )
            train(model, _rows(inputs, rest), _rows(labels, rest))
            p = predicted(NAME, model, _rows(inputs, held_out), classes)
        if p.shape[1] < classes or (result is not None and p.shape[1] != result.shape[1]):
            expected = classes if result is None else result.shape[1]
            raise ValueError(
                f"{NAME}: the model must give {expected} classes, got {p.shape[1]} in fold {fold}"
            )
        if result is None:
            result = p.new_zeros(len(indices), p.shape[1])
        result[held_out] = p
    assert result is not None
    return result


def stratified(labels: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """The fold of each sample: they are dealt out in turn, class after class, in a random order within each."""
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    order = order[labels[order].argsort(stable=True)]
    fold_of = torch.empty_like(labels)
    fold_of[order] = torch.arange(len(labels), device="cpu") % folds
    return fold_of


def _rows(values: Any, rows: Tensor) -> Any:
    return values[rows.to(values.device)] if isinstance(values, Tensor) else values[rows.numpy()]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global random numbers that start from a seed, and are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
