"""Figures S2 and S3 of the ALA paper: loss parameters over a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lossmeta import plot
from lossmeta.ala import ClassCorrelation, Controller, Schedule
from lossmeta.experiments import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRICES, ENTRIES = "phi-matrices.png", "phi-entries.png"
TIMES = (0.1, 0.25, 0.5, 1.0)  # shares of the windows
# Of the supplement, section B; by the places of the mixture's coefficients.
DISTANCES = (
    *("d²", "d^2.5", "d^1.5", "½ exp(0.6 d²) − ½", "½ exp(0.6 d) − ½"),
    *("0.5 / d", "0.2 / d", "0.1 / d²", "log(1 / d)", "log(1 / d²)"),
)


def draw_class_correlations(trial: Trial, controller: Controller) -> None:
    """Both figures of the first seed's first network, where matplotlib is installed."""
    if _wanted(trial, controller):
        schedule = controller.schedule()
        plot.save(matrices(schedule), trial.folder / MATRICES)
        plot.save(entries(schedule), trial.folder / ENTRIES)


def draw_mixture(trial: Trial, controller: Controller) -> None:
    """The coefficients of distances, of the first seed, where matplotlib is installed; a file for each task."""
    if _wanted(trial, controller):
        drawing = entries(controller.schedule(), {"phi": DISTANCES})
        plot.save(drawing, trial.folder / f"{plot.file_name(trial.task.name)}-{ENTRIES}")


def _wanted(trial: Trial, controller: Controller) -> bool:
    return not trial.seed and controller.windows > 0 and plot.installed()


def matrices(schedule: Schedule) -> Figure:
    r""":math:`\Phi` of class pairs at four times, without what the identity has (Figure S2)."""
    space = schedule.space
    assert isinstance(space, ClassCorrelation)
    figure, panels = plot.figure("ala", columns=len(TIMES), size=(14.0, 3.2))
    last = len(schedule.steps) - 1
    shown = {}
    for window in (round(share * last) for share in TIMES):
        values = schedule.coordinates.values(schedule.path[window])
        phi = space.matrix(values["diagonal"], values["pairs"])
        shown[schedule.steps[window]] = phi - phi.new_ones(len(phi)).diag()
    limit = max(moved.abs().max().item() for moved in shown.values())
    for axes, (step, moved) in zip(panels, shown.items(), strict=False):
        plot.matrix(axes, moved.tolist(), "Φ − identity", limit=limit)
        axes.set_title(f"after step {step}")
        axes.set_xlabel("class")
    for axes in panels[len(shown) :]:  # in a training of few windows
        axes.set_axis_off()
    panels[0].set_ylabel("true class")
    return figure


def entries(schedule: Schedule, names: Mapping[str, Sequence[str]] | None = None) -> Figure:
    """Each parameter of the space in a panel, each of its entries a line over the training (Figure S3).

    Args:
        schedule: what held when.
        names: of entries, by the parameter's name, for a legend.
    """
    parameters = schedule.coordinates.parameters
    figure, panels = plot.figure("ala", columns=len(parameters), size=(5.5 * len(parameters), 3.6))
    # From the first step on, where the defaults hold.
    path = [0 * schedule.path[0], *schedule.path]
    values = [schedule.coordinates.values(u) for u in path]
    for axes, p in zip(panels, parameters, strict=True):
        labels = (names or {}).get(p.name)
        for i in range(p.count):
            line = [v[p.name].reshape(-1)[i].item() for v in values]
            axes.plot(
                [0, *schedule.steps],
                line,
                drawstyle="steps-post",
                linewidth=1.5 if labels else 0.8,
                linestyle="--" if labels and i >= p.count // 2 else "-",
                label=labels[i] if labels else None,
            )
        axes.set_title(p.name)
        axes.set_xlabel("training step")
        axes.set_ylabel("Φ")
        if labels:
            axes.legend(frameon=False, fontsize="small", ncols=2)
    return figure
