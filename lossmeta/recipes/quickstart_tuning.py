"""Where the settings of the quickstart's tuned rows come from: all of a grid, judged on held-out digits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from lossmeta import experiments
from lossmeta.adalfl import AveragedWeights
from lossmeta.experiments import Measure, Method, Task, Trial
from lossmeta.losses import GeneralizedCrossEntropy, SymmetricCrossEntropy
from lossmeta.recipes._digits import ERROR
from lossmeta.recipes._noisy_digits import (
    SETTINGS,
    Loss,
    NoisyDigits,
    batch_rows,
    cross_entropy,
    draw,
    new_model,
)

FIRST_SEED = 10_000  # no comparison gets this far
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
STOPS = (50, 100, 150, 200, 300, 400, 600, 800, 1200, 1600)
MEASURES = (
    ERROR,
    Measure("q or β", higher_is_better=None, digits=1),
    Measure("rate", higher_is_better=None, digits=3),
    Measure("clean weight", higher_is_better=None, digits=0),
    Measure("steps", higher_is_better=None, digits=0),
    Measure("averaged", higher_is_better=None, digits=0),
)


@dataclass(frozen=True)
class Grid:
    """What is tried for one row, beside ``RATES``, ``STOPS`` and averaging the weights or not."""

    parameters: tuple[float, ...] = (0.0,)
    clean_weights: tuple[float, ...] = (0.0, 1.0, 3.0)


class Networks(nn.Module):
    """The networks of several seeds, trained at once: images [S, B, 64] to logits [S, B, 10]."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        layers = zip(*(network[::2] for network in networks), strict=True)  # type: ignore[index]
        stacked = [
            (torch.stack([x.weight.T for x in same]), torch.stack([x.bias for x in same])) for same in layers
        ]
        self.weights = nn.ParameterList(weight.detach() for weight, _ in stacked)
        self.biases = nn.ParameterList(bias.detach()[:, None] for _, bias in stacked)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.baddbmm(self.biases[0], images, self.weights[0]).relu()
        return torch.baddbmm(self.biases[1], hidden, self.weights[1])


@dataclass(frozen=True)
class Stack:
    """The data of several seeds.

    Attributes:
        seeds: of the networks and batches.
        drawn: their data.
    """

    seeds: tuple[int, ...]
    drawn: tuple[NoisyDigits, ...]

    def part(self, name: str) -> tuple[Tensor, Tensor]:
        """Inputs and labels with a dimension in front for the seeds."""
        inputs, labels = zip(*(getattr(drawn, name) for drawn in self.drawn), strict=True)
        return torch.stack(inputs), torch.stack(labels)

    def errors(
        self, loss: Loss, rate: float, clean_weight: float, stops: tuple[int, ...]
    ) -> Iterator[tuple[int, bool, float]]:
        """Trains, and gives at every stop the mean error on the selection part, of the weights and of their average."""
        train, clean, selection = (self.part(name) for name in ("train", "clean", "selection"))
        device = train[0].device
        model = Networks([new_model(seed, device) for seed in self.seeds])
        optimizer = SGD(model.parameters(), rate, momentum=0.9)
        average = AveragedWeights(model)
        member = torch.arange(len(self.seeds), device=device)[:, None]
        every = (batch_rows(d, s, stops[-1]) for d, s in zip(self.drawn, self.seeds, strict=True))
        for step, of_seeds in enumerate(zip(*every, strict=True), 1):
            noisy_rows, clean_rows = (torch.stack(rows).to(device) for rows in zip(*of_seeds, strict=True))
            images, labels = (x[member, noisy_rows] for x in train)
            more, right = (x[member, clean_rows] for x in clean)
            logits = model(torch.cat([images, more], 1) if clean_weight else images)
            noisy = logits[:, : labels.shape[1]]
            value = loss(noisy.flatten(0, 1), labels.flatten())
            if clean_weight:
                rest = logits[:, labels.shape[1] :]
                value = value + clean_weight * F.cross_entropy(rest.flatten(0, 1), right.flatten())
            optimizer.zero_grad()
            # The mean over all samples, times the number of seeds: each network gets the gradient of its own mean.
            (value * len(self.seeds)).backward()
            optimizer.step()
            average.update()
            if step in stops:
                for averaged, at in ((False, model), (True, average.model)):
                    with torch.no_grad():
                        wrong = at(selection[0]).argmax(2) != selection[1]
                    yield step, averaged, wrong.float().mean().item()


def tuned(label: str, loss: Callable[[float], Loss], grid: Grid) -> Method:
    """The best of a grid; among equals the first."""

    def train(trial: Trial) -> dict[str, float]:
        stack: Stack = trial.data
        most = trial.task.settings["steps"]
        stops = tuple(stop for stop in STOPS if stop <= most) or (most,)
        tried = list(itertools.product(grid.parameters, RATES, grid.clean_weights))
        found = []
        for i, (parameter, rate, weight) in enumerate(tried):
            for step, averaged, error in stack.errors(loss(parameter), rate, weight, stops):
                found.append((error, parameter, rate, weight, step, int(averaged)))
            trial.progress((i + 1) / len(tried))
        best = min(found, key=lambda values: values[0])
        return dict(zip((measure.name for measure in MEASURES), best, strict=True))

    return Method(label, train, {**asdict(grid), "rates": RATES, "stops": STOPS})


METHODS = (
    tuned("cross-entropy", lambda _: cross_entropy, Grid(clean_weights=(0.0,))),
    tuned("cross-entropy, clean batches", lambda _: cross_entropy, Grid(clean_weights=(1.0, 3.0))),
    tuned(
        "generalised cross-entropy",
        GeneralizedCrossEntropy,
        Grid(parameters=(0.3, 0.5, 0.7, 0.8, 0.9, 1.0)),
    ),
    tuned(
        "symmetric cross-entropy",
        partial(SymmetricCrossEntropy, 1.0),
        Grid(parameters=(0.1, 0.3, 1.0, 3.0, 10.0)),
    ),
)
LEGEND = """\
Error: on the held-out part, the mean over the tuning seeds, of the best combination. Averaged: whether the averaged \
weights are the better ones. The networks of all tuning seeds are trained at once."""


class QuickstartTuning:
    """The recipe."""

    name = "quickstart-tuning"
    about = "Where the settings of quickstart's tuned rows come from; a quarter of an hour"

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        """As all recipes; ``seeds`` is the number of tuning seeds."""
        tuning = tuple(range(FIRST_SEED, FIRST_SEED + seeds))

        def prepare(seed: int, device: torch.device) -> Stack:
            return Stack(tuning, tuple(draw(s, device) for s in tuning))

        settings = {**SETTINGS, "tuning seeds": seeds, "steps": steps or STOPS[-1]}
        return experiments.run(
            self.name,
            [Task(f"Noisy digits, held-out part, {seeds} tuning seeds", prepare, MEASURES, settings)],
            METHODS,
            seeds=1,
            device=device,
            folder=output,
            settings={"tuning seeds": seeds, "steps": steps, "device": device},
            about=self.about,
            legend=LEGEND,
            threads=1,
        )


RECIPES = (QuickstartTuning(),)
