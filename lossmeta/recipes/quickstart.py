"""The quickstart: a small network on scikit-learn's digits, with a fixed loss and with one that adapts."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import lossmeta
from lossmeta.adalfl import OnlineLearner
from lossmeta.losses import LossNetwork, ParametricCrossEntropy
from lossmeta.metrics import AveragePrecision, ErrorRate
from lossmeta.ops.class_confusion import class_confusion
from lossmeta.recipes._results import replace_file, write_json

CLASSES = 10
SETTINGS: dict[str, Any] = {
    "sizes": {"train": 897, "validation": 400, "test": 500},
    "hidden": 64,
    "batch": 50,
    "optimizer": "Adam",
    "learning_rate": 3e-3,
    "meta_learning_rate": 1e-3,
}

Split = tuple[Tensor, Tensor]


@dataclass
class Run:
    """One method with one seed; all methods get that seed's split, initial weights and batches."""

    model: nn.Module
    data: dict[str, Split]
    seed: int
    epochs: int
    epoch_done: Callable[[], None]

    def batches(self, epoch: int, split: str = "train") -> Iterator[Split]:
        """The training set in an order of the epoch's own; as many batches of another split, drawn from it."""
        inputs, labels = self.data[split]
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        size = SETTINGS["sizes"]["train"]
        if split == "train":
            order = torch.randperm(size, generator=generator)
        else:
            order = torch.randint(len(labels), (size,), generator=generator)
        for rows in torch.split(order.to(labels.device), SETTINGS["batch"]):
            yield inputs[rows], labels[rows]

    @torch.no_grad()
    def logits(self, split: str) -> Split:
        """The model's logits and the labels of a split."""
        inputs, labels = self.data[split]
        return self.model(inputs), labels


def train(
    run: Run, loss: Callable[[Tensor, Tensor], Tensor], each_epoch: Callable[[], None] = lambda: None
) -> None:
    """A plain training loop; ``each_epoch`` may adapt the loss."""
    optimizer = torch.optim.Adam(run.model.parameters(), lr=SETTINGS["learning_rate"])
    for epoch in range(run.epochs):
        for inputs, labels in run.batches(epoch):
            optimizer.zero_grad()
            loss(run.model(inputs), labels).backward()
            optimizer.step()
        each_epoch()
        run.epoch_done()


def cross_entropy(run: Run) -> None:
    train(run, F.cross_entropy)


def identity(run: Run) -> None:
    train(run, ParametricCrossEntropy(CLASSES).to(run.data["train"][0].device))


def confusion(run: Run) -> None:
    loss = ParametricCrossEntropy(CLASSES).to(run.data["train"][0].device)
    train(run, loss, lambda: penalise_confusions(loss, *run.logits("validation")))


@torch.no_grad()
def penalise_confusions(loss: ParametricCrossEntropy, logits: Tensor, labels: Tensor) -> None:
    r"""Sets :math:`\Phi` from the confusion matrix C of a validation set (ALA, Eq. 7).

    Our reading of the row "confusion matrix" in ALA's Table 1, which the paper does not spell out:
    :math:`\Phi = I - s` with :math:`s_{ij} = \frac12 (e^{-C_{ij}} + e^{-C_{ji}})` off the diagonal, where
    :math:`e^{-C_{ij}}` is the geometric mean of the probability that images of class i give to class j. It is not
    scaled up: where a row of s sums to more than 1, the wrong classes earn more than the right one, and training fails
    (with the largest s scaled to 1 this recipe ends at 50 ± 37 % test error).
    """
    sums, counts = class_confusion(logits, labels)
    probability = (-sums / counts[:, None]).exp().nan_to_num(0)  # 0 for a class that the set lacks
    similarity = ((probability + probability.T) / 2).fill_diagonal_(0)
    loss.phi.copy_(torch.eye(CLASSES, device=similarity.device) - similarity)


def online(run: Run) -> None:
    """AdaLFL on top of cross-entropy: after every step the loss moves by what the step did to a validation batch."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(run.seed)
        loss = LossNetwork(residual="cross_entropy").to(run.data["train"][0].device)
    learner = OnlineLearner(
        run.model,
        torch.optim.Adam(run.model.parameters(), lr=SETTINGS["learning_rate"]),
        loss,
        F.cross_entropy,
        meta_optimizer=torch.optim.Adam(loss.parameters(), lr=SETTINGS["meta_learning_rate"]),
    )
    for epoch in range(run.epochs):
        for train_batch, validation_batch in zip(
            run.batches(epoch), run.batches(epoch, "validation"), strict=True
        ):
            learner.step(train_batch, validation_batch)
        run.epoch_done()


# One entry per method; another one is added as a function that trains run.model.
METHODS: dict[str, Callable[[Run], None]] = {
    "cross-entropy": cross_entropy,
    "parametric, fixed Φ = I": identity,
    "parametric, Φ from confusions": confusion,
    "AdaLFL, online": online,
}
LEGEND = """\
parametric: ParametricCrossEntropy. Φ from confusions: set after every epoch, so that classes that the model confuses on
the validation set are penalised. AdaLFL: a LossNetwork on top of cross-entropy, learned from what each step did to a
validation batch. Lower error and higher average precision are better; a difference within the ± says nothing. On a task
this easy no loss wins: the table shows how they are used."""


def load_digits() -> Split:
    """The 1797 images, scaled to [0, 1], and their labels."""
    from sklearn import datasets  # type: ignore[import-untyped]

    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels, dtype=torch.int64)


def split(images: Tensor, labels: Tensor, seed: int) -> dict[str, Split]:
    """Train, validation and test rows of a seed."""
    sizes: dict[str, int] = SETTINGS["sizes"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = torch.split(order, list(sizes.values()))
    return {name: (images[rows], labels[rows]) for name, rows in zip(sizes, parts, strict=True)}


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        hidden = SETTINGS["hidden"]
        return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def evaluate(run: Run, split: str) -> dict[str, float]:
    logits, labels = run.logits(split)
    error, precision = ErrorRate(), AveragePrecision()
    error.update(logits, labels)
    precision.update(logits.log_softmax(1), labels)
    return {"error": error.compute().item(), "average_precision": precision.compute().item()}


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds, per method, of the test metrics."""
    summary: dict[str, dict[str, float]] = {}
    for method in METHODS:
        tests = [r["test"] for r in results if r["method"] == method]
        if not tests:
            continue
        summary[method] = {"seeds": len(tests)}
        for metric in tests[0]:
            values = [t[metric] for t in tests]
            summary[method][f"{metric}_mean"] = statistics.fmean(values)
            summary[method][f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return summary


def run(*, seeds: int, epochs: int, device: str, output: Path) -> int:
    """Trains every method with every seed, shows and writes the results; returns the exit status."""
    try:
        where = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        return _fail(f"--device {device} cannot be used: {error}", 2)
    try:
        images, labels = (t.to(where) for t in load_digits())
    except ImportError:
        return _fail(
            "scikit-learn is needed for its digits; install it with `python -m pip install scikit-learn`", 1
        )
    report: dict[str, Any] = {
        "recipe": "quickstart",
        "about": " ".join(LEGEND.split()),
        "settings": {"seeds": seeds, "epochs": epochs, "device": str(where), **SETTINGS},
        "versions": {**lossmeta.info(), "scikit-learn": metadata.version("scikit-learn")},
        "results": [],
    }
    results, console, total = report["results"], Console(), seeds * len(METHODS)
    final, partial = output / "results.json", output / "results.partial.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _fail(f"--output {output} cannot be written: {error}", 2)
    # The tensors are small: a second thread would cost more than it does.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("", total=total * epochs)
            for seed in range(seeds):
                data = split(images, labels, seed)
                for name, method in METHODS.items():
                    bar.update(task, description=f"{name}, seed {seed}")
                    one = Run(network(seed).to(where), data, seed, epochs, lambda: bar.advance(task))
                    start = time.perf_counter()
                    method(one)
                    seconds = time.perf_counter() - start
                    metrics = {name: evaluate(one, name) for name in ("validation", "test")}
                    results.append({"method": name, "seed": seed, "seconds": seconds, **metrics})
                    write_json(partial, report)
        report["summary"] = summarise(results)
        console.print(_table(report["summary"]))
        console.print(LEGEND, highlight=False)
        write_json(final, report)
        partial.unlink()
        console.print(f"Results: {final}", soft_wrap=True)
        figure = output / "quickstart.png"
        if _plot(report["summary"], figure):
            console.print(f"Figure:  {figure}", soft_wrap=True)
    except KeyboardInterrupt:
        kept = f"; their results are in {partial}" if results else ""
        return _fail(f"stopped after {len(results)} of {total} runs{kept}", 130)
    except OSError as error:
        return _fail(f"the results could not be written: {error}", 1)
    finally:
        torch.set_num_threads(threads)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"lossmeta quickstart: {message}", file=sys.stderr)
    return status


def _table(summary: dict[str, dict[str, float]]) -> Table:
    seeds = max(row["seeds"] for row in summary.values())
    several = seeds > 1
    title = f"mean ± sd over {seeds:.0f} seeds" if several else "one seed"
    table = Table(title=f"Digits, test set, {title}")
    table.add_column("loss")
    table.add_column("error (%)", justify="right")
    table.add_column("average precision (%)", justify="right")
    for method, row in summary.items():
        cell = ("{:.2f} ± {:.2f}" if several else "{:.2f}").format
        cells = [
            cell(100 * row[f"{metric}_mean"], 100 * row[f"{metric}_sd"])
            for metric in ("error", "average_precision")
        ]
        table.add_row(method, *cells)
    return table


def _plot(summary: dict[str, dict[str, float]], path: Path) -> bool:
    """Draws the test errors where matplotlib is installed; says whether it is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    means = [100 * row["error_mean"] for row in summary.values()]
    deviations = [100 * row["error_sd"] for row in summary.values()]
    axes.errorbar(means, range(len(summary)), xerr=deviations, fmt="o", capsize=4)
    axes.set_yticks(range(len(summary)), list(summary))
    axes.margins(y=0.3)
    axes.invert_yaxis()
    axes.set_xlabel("test error (%), mean ± sd")
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=150))
    return True
