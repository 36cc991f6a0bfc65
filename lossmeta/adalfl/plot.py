"""How a learned loss changed in training, drawn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lossmeta.adalfl.records import Snapshot
from lossmeta.losses import _plot
from lossmeta.losses._outputwise import OutputwiseLoss

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_loss(
    history: Sequence[Snapshot],
    loss: OutputwiseLoss,
    *,
    predictions: tuple[float, float] | None = None,
    num_classes: int | None = None,
) -> Figure:
    """Draws a learned loss over the training, as the AdaLFL paper's Figures 1, 4 and 8 to 17 do.

    One panel for target 1 and one for target 0, in each the loss of one output against its prediction, one curve per
    snapshot, from dark (first) to bright (last). The factor of ``normalize_slope`` belongs to a batch and is left out.

    Args:
        history: of :class:`OnlineLearner` with ``snapshot_every``.
        loss: the :class:`~lossmeta.losses.LossNetwork` or :class:`~lossmeta.losses.TaylorLoss` that was learned; is not
            changed.
        predictions: lowest and highest, with ``link="identity"``; probabilities are drawn from 0 to 1.
        num_classes: C, with ``residual="cross_entropy"``, to which each class adds only 1/C of the network.

    Returns:
        A ``matplotlib.figure.Figure``: write it with its ``savefig``.

    Raises:
        ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
        ValueError: for an empty history, for snapshots of another loss, and for arguments that do not fit the loss.
        TypeError: for a loss that is not one of single outputs.

    Example:
        >>> model, loss = torch.nn.Linear(4, 3), lossmeta.losses.LossNetwork()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> task_loss = torch.nn.functional.cross_entropy
        >>> learner = lossmeta.adalfl.OnlineLearner(model, optimizer, loss, task_loss, snapshot_every=1)
        >>> report = learner.step((torch.randn(8, 4), torch.randint(3, (8,))))
        >>> plot_loss(learner.history, loss).savefig("loss.png")
    """
    if not isinstance(loss, OutputwiseLoss):
        raise TypeError(f"plot_loss: loss must be a LossNetwork or TaylorLoss, got {type(loss).__name__}")
    if not history:
        raise ValueError(
            "plot_loss: history must hold at least one snapshot, got none; OnlineLearner(snapshot_every=...) keeps them"
        )
    at = copy.deepcopy(loss).cpu()
    drawn = []
    for snapshot in history:
        try:
            at.load_state_dict(snapshot.state)
        except RuntimeError as error:
            raise ValueError(
                f"plot_loss: history must hold snapshots of the loss, got others at step {snapshot.step}: {error}"
            ) from error
        drawn.append(_plot.curves("plot_loss", at, predictions, num_classes))
    return _plot.draw("plot_loss", at, drawn, [snapshot.step for snapshot in history])
