"""Plain training against every method that applies, on a task of one's own."""

from __future__ import annotations

import hashlib
import inspect
import io
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta import experiments
from lossmeta._batches import Loss
from lossmeta.comparison._parts import TaskError
from lossmeta.comparison._rows import BOTH, CLEAN, FACTORS, PLAIN, TUNING_SEEDS, rows, task_of
from lossmeta.comparison._task import (
    BATCH_SIZE,
    EPOCHS,
    OwnTask,
    Plan,
    default_optimizer,
    plan_of,
)
from lossmeta.experiments import report
from lossmeta.experiments.run_folder import read

RECIPE = "compare"
WIDTH = 140  # of the tables as text


@dataclass(frozen=True)
class ComparisonResult:
    """What came of a comparison.

    Attributes:
        text: the tables and what explains them.
        recommended: label of the recommended method, ``None`` where none is.
        recommendation: that in a sentence.
        folder: of the run, for ``lossmeta report``.
    """

    text: str
    recommended: str | None
    recommendation: str
    folder: Path

    def __str__(self) -> str:
        return self.text


def compare(
    *,
    model: Callable[[], nn.Module],
    data: Callable[[], Any],
    metric: Any = None,
    higher_is_better: bool | None = None,
    task_loss: Loss | None = None,
    optimizer: Callable[[Iterable[Tensor]], Optimizer] = default_optimizer,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    seeds: int = 5,
    device: str = "cpu",
    folder: str | Path = "runs/compare",
    name: str = "task",
) -> ComparisonResult:
    """Says whether any method here helps on your data, by paired trainings against tuned plain training.

    Trained are, with the same initial weights and batches for each seed: plain training at its own learning rate, at
    one that is tuned on other seeds, and at that on the validation samples too; and at the tuned rate each method that
    applies: a loss learned online, the same with the validation samples as clean ones, ALA's population for three
    spaces, and the online regulariser. All data are held in memory. Every finished training is kept in the folder: the
    same call goes on where it was stopped.

    Args:
        model: makes a new model; its weights are to be drawn from torch's global random numbers.
        data: makes the parts ``train``, ``validation`` and ``test``, as a dict or a tuple; each is a pair of tensors, a
            Dataset or a DataLoader of pairs. It is called for each seed, with other global random numbers, and may draw
            a split of its own. Integer targets are classes, floating ones have the shape of the model's output.
        metric: of :mod:`lossmeta.metrics`, or a function ``metric(prediction, target) -> float``; by default the error
            of classes, and else the task loss.
        higher_is_better: the metric's direction; asked of the metric where it is not given.
        task_loss: ``task_loss(prediction, target) -> []``; by default cross-entropy, and else squared error.
        optimizer: of a model's parameters; by default SGD at a rate of 0.03 with a momentum of 0.9.
        epochs: of every training.
        batch_size: of every training.
        seeds: number of them.
        device: ``"cpu"`` or ``"cuda"``.
        folder: for the results; one with those of other settings, or of functions with another source, is refused.
        name: of the table.

    Returns:
        Tables, recommendation and folder.

    Raises:
        TaskError: for data, a model, a metric, a loss or an optimizer that do not fit together.
        RuntimeError: where the run could not be finished; standard error says why.
        KeyboardInterrupt: after Ctrl-C; what was finished is kept.

    Example:
        >>> def data():
        ...     x, y = torch.randn(90, 4), torch.randint(3, (90,))
        ...     return [(x[i : i + 30], y[i : i + 30]) for i in (0, 30, 60)]
        >>> result = lossmeta.compare(model=lambda: torch.nn.Linear(4, 3), data=data, epochs=2, seeds=2)
        >>> print(result.recommendation)
    """
    task = OwnTask(
        where="lossmeta.compare",
        name=name,
        model=model,
        data=data,
        metric=metric,
        higher_is_better=higher_is_better,
        task_loss=task_loss,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch_size,
        fingerprint=_fingerprint(model, data, metric, task_loss, optimizer),
    )
    if seeds < 1:
        raise ValueError(f"compare: seeds must be at least 1, got {seeds}")
    status = run(task, seeds=seeds, device=device, folder=Path(folder))
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise RuntimeError(
            f"compare: the run in {folder} ended with status {status}; standard error says why"
        )
    return result_of(Path(folder), seeds)


def run(task: OwnTask, *, seeds: int, device: str, folder: Path) -> int:
    """Trains what is missing, shows the tables and returns the exit status, as :func:`lossmeta.experiments.run`.

    Raises:
        TaskError: as :func:`compare`.
        TrialError: where plain training fails.
    """
    try:
        where = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise TaskError(f"device {device} cannot be used: {error}") from error
    plan = plan_of(task, 0, where)
    of_task, left_out = rows(plan)
    labels = [row.label for row in of_task]
    return experiments.run(
        RECIPE,
        (task_of(plan),),
        of_task,
        seeds=seeds,
        device=device,
        folder=folder,
        settings={
            "source of the task": task.fingerprint,
            "epochs": task.epochs,
            "batch size": task.batch_size,
            "device": device,
        },
        reference=PLAIN,
        corrected=[label for label in labels if label not in PLAIN],
        about=f"Does anything help on {task.name}?",
        legend=_legend(plan, left_out),
        threads=1 if plan.small else None,
    )


def result_of(folder: Path, seeds: int) -> ComparisonResult:
    """Of a finished run."""
    from rich.console import Console

    found = read(folder)
    header = found.header
    shown = tuple(range(seeds))
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
    report.show(found, console, shown)
    rows_of_task = report.trials_of(found, header.tasks[0], shown)
    label, _ = report.recommended(header, header.tasks[0], rows_of_task, shown)
    (sentence,) = report.recommendations(found, shown)
    return ComparisonResult(console.file.getvalue(), label, sentence, folder)  # type: ignore[attr-defined]


def _legend(plan: Plan, left_out: dict[str, str]) -> str:
    own = (
        f"Every row has the same initial weights, and but for {BOTH!r} the same batches. Validation samples serve the "
        f"methods for adapting the loss, and plain training for choosing its learning rate: from {min(FACTORS):g} to "
        f"{max(FACTORS):g} times its own, and once beyond, on {len(TUNING_SEEDS)} other seeds. All rows but the first "
        f"train at that rate. {BOTH!r} trains on the validation samples as well. So does {CLEAN!r}, which also "
        "averages the weights and draws part of the labels anew. Seconds: of training. A method is recommended only "
        "where it is ahead of the best plain row."
    )
    if not left_out:
        return own
    by_reason: dict[str, list[str]] = {}
    for label, why in left_out.items():
        by_reason.setdefault(why, []).append(repr(label))
    reasons = (f"for want of {why}: {', '.join(labels)}" for why, labels in by_reason.items())
    return f"{own}\n\nNot compared {'; '.join(reasons)}."


def _fingerprint(*functions: Any) -> str | None:
    """Of their source, where it is to be had."""
    texts = []
    for function in functions:
        try:
            texts.append(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError):
            texts.append(getattr(function, "__qualname__", type(function).__qualname__))
    return digest("\0".join(texts).encode())


def digest(source: bytes) -> str:
    """Short, of a source."""
    return hashlib.sha256(source).hexdigest()[:12]
