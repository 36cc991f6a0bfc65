"""Probabilities of whatever predicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lossmeta.diagnosis._inputs import as_tensor, checked_probabilities

BATCH = 1024  # rows at once through a torch model
SUMS_TO_ONE = 1e-4


def predicts(model: Any) -> bool:
    return isinstance(model, nn.Module) or hasattr(model, "predict_proba")


def predicted(name: str, model: Any, inputs: Any, classes: int) -> Tensor:
    """``[N, C]`` of float64: by ``predict_proba`` where there is one, else the softmax of a torch model's logits.

    Args:
        name: who asks.
        model: what predicts; a torch model predicts in eval mode, and its mode is as before afterwards.
        inputs: one row for each sample.
        classes: at least so many columns, where the model names its classes and knows fewer.
    """
    if hasattr(model, "predict_proba"):
        p = checked_probabilities(name, model.predict_proba(inputs), "what predict_proba gives")
        known = getattr(model, "classes_", None)
        return p if known is None else _in_columns(name, p, as_tensor(name, "classes_", known), classes)
    return checked_probabilities(name, _softmax(name, model, inputs), "what the model gives")


def _in_columns(name: str, p: Tensor, known: Tensor, classes: int) -> Tensor:
    """Columns by class index: an estimator has columns for those classes alone that it was fitted to."""
    if known.is_floating_point() or len(known) != p.shape[1] or bool((known < 0).any()):
        raise ValueError(
            f"{name}: the model's classes_ must be the labels, integers from 0 on, got {known.tolist()}"
        )
    placed = p.new_zeros(len(p), max(classes, int(known.max()) + 1))
    placed[:, known.long()] = p
    return placed


@torch.no_grad()
def _softmax(name: str, model: nn.Module, inputs: Any) -> Tensor:
    if not isinstance(inputs, Tensor):
        raise TypeError(f"{name}: inputs of a torch model must be a tensor, got {type(inputs).__name__}")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        parts = [model(rows) for rows in inputs.split(BATCH)]
    finally:
        for module, training in modes.items():
            module.training = training
    for part in parts:
        if not isinstance(part, Tensor) or part.dim() != 2:
            got = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"{name}: the model must give logits [N, C], got {got}; give probabilities instead"
            )
    logits = torch.cat(parts).double().cpu()
    sums = logits.sum(1)
    if bool((logits >= 0).all()) and bool(((sums - 1).abs() < SUMS_TO_ONE).all()):
        raise ValueError(
            f"{name}: the model must give logits, got rows that sum to 1 as probabilities do; "
            "give these probabilities in place of the model"
        )
    return logits.softmax(1)
