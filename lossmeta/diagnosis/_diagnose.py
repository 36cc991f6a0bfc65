"""What is wrong with a data set or a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lossmeta.diagnosis import _measures as measures
from lossmeta.diagnosis._inputs import as_tensor, checked_class_labels, checked_labels, checked_probabilities
from lossmeta.diagnosis._intervals import Interval, wilson
from lossmeta.diagnosis._models import predicted, predicts
from lossmeta.diagnosis._recommendation import INFORMATIVE, recommend
from lossmeta.diagnosis._result import Diagnosis
from lossmeta.diagnosis.confident_joint import estimate

NAME = "diagnose"
FEW = 10  # samples of a label, of which its threshold is the mean
COARSE = 0.02  # half of the error's interval
SEEN, ENOUGH = 1e-3, 100  # an error below the first on at least so many samples


def diagnose(
    model_or_probabilities: Any,
    labels: Any,
    *,
    inputs: Any = None,
    train: tuple[Any, Any] | None = None,
    clean: tuple[Any, Any] | None = None,
) -> Diagnosis:
    """Estimates which labels are wrong, imbalance, calibration and overfitting, and says which loss is for that.

    **The model must not have seen the samples.** Probabilities of samples that it was trained on say that all is well,
    and nothing here can know that they are such; :func:`lossmeta.diagnosis.out_of_fold` makes others. Wrong labels,
    classes that overlap and a weak model look alike in them: ``clean`` samples tell the first from the other two.

    Args:
        model_or_probabilities: ``[N, C]``, rows that sum to 1, a tensor or a NumPy array; or, with ``inputs``, a torch
            model that gives logits or anything with ``predict_proba``.
        labels: ``[N]``, integers in [0, C), as they are, wrong ones among them.
        inputs: ``[N, ...]``, of the samples, where a model is given.
        train: ``(probabilities, labels)`` of the samples that the model was trained on, or ``(inputs, labels)`` where a
            model is given: against these the samples are held out, which measures overfitting.
        clean: the same of samples whose labels are known to be right, drawn as the others are, and that the model has
            not seen either.

    Returns:
        Shares, intervals of 95 %, warnings and recommendations. The intervals know of chance alone:
        docs/results/diagnose.md has how far estimates are off. The thresholds stand in
        ``lossmeta/diagnosis/_recommendation.py`` with their reasons, and every figure behind a recommendation stands in
        docs/results.

    Raises:
        TypeError: for something that is no tensor, array or model, and pairs that are none.
        ValueError: for shapes and dtypes that do not fit, no samples, fewer than two classes, labels out of range, NaN,
            rows that are no distribution, and a model without ``inputs``.

    Sources:
        Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels" (2021); Guo et al.,
        "On Calibration of Modern Neural Networks" (2017); Wilson, "Probable inference" (1927).

    Example:
        >>> labels = torch.arange(900) % 3
        >>> p = torch.nn.functional.one_hot(labels, 3) * 0.9 + 0.1 / 3
        >>> wrong = labels.clone()
        >>> wrong[:180] = (wrong[:180] + 1 + torch.arange(180) % 2) % 3  # a fifth of them
        >>> found = lossmeta.diagnose(p, wrong)
        >>> round(found.labels.share, 3), len(found.labels.suspects), found.labels.spread
        (0.2, 180, 'even')
        >>> found.recommendations[0].use
        'lossmeta.losses.SymmetricCrossEntropy or GeneralizedCrossEntropy'
    """
    read = _reader(model_or_probabilities, inputs, labels)
    p, given = read(model_or_probabilities if inputs is None else inputs, labels, "")
    on_train = None if train is None else read(*_pair("train", train), "train ")
    on_clean = None if clean is None else read(*_pair("clean", clean), "clean ")
    for argument, other in (("train", on_train), ("clean", on_clean)):
        if other is not None and other[0].shape[1] != p.shape[1]:
            raise ValueError(
                f"{NAME}: {argument} must have {p.shape[1]} classes too, got {other[0].shape[1]}"
            )
    if on_train is not None and torch.equal(on_train[0], p):
        raise ValueError(
            f"{NAME}: train must be other samples than those held out, got the same probabilities"
        )

    wrong = measures.errors(p, given)
    error = float(wrong.mean())
    informative = measures.information(p, given) >= INFORMATIVE
    joint, balance = estimate(p, given), measures.balance(given, p.shape[1])
    confidence = measures.confidence(p, given)
    overfitting = None if on_train is None else measures.overfitting((p, given), on_train)
    comparison = None if on_clean is None else measures.compare_with_clean(p, given, on_clean)
    interval = wilson(error, len(p))
    return Diagnosis(
        samples=len(p),
        classes=p.shape[1],
        error=error,
        error_interval=interval,
        informative=informative,
        labels=joint,
        balance=balance,
        confidence=confidence,
        overfitting=overfitting,
        clean=comparison,
        warnings=tuple(_warnings(p, error, interval, informative, balance.counts, comparison)),
        recommendations=recommend(informative, joint, balance, confidence, overfitting, comparison),
    )


def _reader(
    model_or_probabilities: Any, inputs: Any, labels: Any
) -> Callable[[Any, Any, str], tuple[Tensor, Tensor]]:
    """How a pair of probabilities or inputs, and labels, becomes probabilities and labels that are in order."""
    if not predicts(model_or_probabilities):
        if inputs is not None:
            kind = type(model_or_probabilities).__name__
            raise TypeError(
                f"{NAME}: with inputs the first argument must be a torch model or have predict_proba, got {kind}"
            )

        def read(values: Any, given: Any, of: str) -> tuple[Tensor, Tensor]:
            p = checked_probabilities(NAME, values, f"{of}probabilities")
            return p, checked_labels(NAME, given, p, f"{of}labels")

        return read
    if inputs is None:
        raise ValueError(f"{NAME}: a model needs inputs, of samples that it has not seen; got None")
    named = checked_class_labels(NAME, as_tensor(NAME, "labels", labels))
    classes = int(named.max()) + 1

    def ask(values: Any, given: Any, of: str) -> tuple[Tensor, Tensor]:
        p = predicted(NAME, model_or_probabilities, values, classes)
        return p, checked_labels(NAME, given, p, f"{of}labels")

    return ask


def _pair(argument: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"{NAME}: {argument} must be a pair, of probabilities or inputs and labels, got {value!r:.80}"
        )
    return value[0], value[1]


def _warnings(
    p: Tensor,
    error: float,
    interval: Interval,
    informative: bool,
    counts: Tensor,
    clean: measures.CleanComparison | None,
) -> Iterator[str]:
    if not informative:
        yield "the predictions say nothing of the labels; the estimate of wrong labels means nothing"
    if error < SEEN and len(p) >= ENOUGH:
        yield (
            f"an error of {error:.2%}: if the model was trained on these samples, nothing here holds; take "
            "probabilities out of fold"
        )
    if clean is not None and clean.interval[1] < 0:
        yield (
            "the model agrees with these labels more often than it is right on the clean samples: it was trained "
            "on these samples, so that nothing here holds, or the clean ones are harder"
        )
    if measures.is_hard(p):
        yield "all probabilities are 0 or 1: the estimate of wrong labels is the error then; give probabilities"
    if missing := (counts == 0).nonzero().flatten().tolist():
        yield f"no sample has label {_few(missing)}: nothing is estimated for it"
    if few := ((counts > 0) & (counts < FEW)).nonzero().flatten().tolist():
        yield f"fewer than {FEW} samples have label {_few(few)}: what is said of it is chance"
    half = (interval[1] - interval[0]) / 2
    if half > COARSE:
        yield f"with {len(p)} samples the error is known to {half:.1%} only: smaller differences do not show"


def _few(classes: list[int]) -> str:
    shown = ", ".join(map(str, classes[:5]))
    return shown + (f" and {len(classes) - 5} others" if len(classes) > 5 else "")
