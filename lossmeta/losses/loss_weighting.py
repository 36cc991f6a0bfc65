"""Weights of samples as a learned function of their loss (Meta-Weight-Net)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta import _checks
from lossmeta.losses import _plot
from lossmeta.losses._class_indices import Samples, read
from lossmeta.losses._outputwise import IGNORED
from lossmeta.losses._parameters import has_hooks
from lossmeta.losses._saved import SavedLoss
from lossmeta.ops._precision import in_full_precision

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LossWeighting(SavedLoss):
    r"""Cross-entropy whose samples are weighted by a learned function of their loss (Meta-Weight-Net).

    .. math:: \ell = \frac1N \sum_n w_n \, \ell_n, \qquad \ell_n = -\log \mathrm{softmax}(f_n)_{y_n}, \qquad
              w_n = \sigma\bigl(w_2^\top \max(0, w_1 \ell_n + b_1) + b_2\bigr)

    Weights that fall with the loss leave out what is labelled wrongly. Weights that rise with it favour what is rare.
    For derivatives with respect to the prediction :math:`w_n` is a constant. The parameters ``input_weight`` [H, 1],
    ``input_bias`` [H], ``output_weight`` [1, H] and ``output_bias`` [1] are learned by
    :class:`~lossmeta.adalfl.OnlineLearner` from clean or balanced validation batches; give them an optimizer of their
    own, not the model's (:func:`check_not_minimized` looks). The output layer starts at zero, so that all weights start
    the same; the first update moves that layer only. With Adam a meta rate of 1e-3 serves: at 1e-2 the sigmoid may soon
    saturate, and nothing more is learned then.

    With ``normalize_weights`` the weights are divided by their mean over the batch, so that the loss starts as
    cross-entropy, and what is learned is the shape of the function and not its size, which acts as a learning rate. The
    mean is differentiated for the parameters.

    Shu et al., Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting, NeurIPS 2019, where the weights are
    not normalised and the output layer starts at random.

    Args:
        hidden: H, the width of the hidden layer.
        normalize_weights: whether the weights of a batch have the mean 1; without, they lie in (0, 1) and start at 1/2.
        ignore_index: label that contributes neither loss nor gradient.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over the samples; the mean is not over their weights.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Shape:
        Logits ``[N, C]``, ``[N, C, d...]`` or ``[C]``, with class indices ``[N]``, ``[N, d...]`` or ``[]``, as
        :class:`torch.nn.CrossEntropyLoss`. Half precision is read as it is; the loss is float32 then.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes, devices or labels that
            do not fit. On CUDA, where looking would wait for the device, the loss of a label out of range is NaN.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Example:
        >>> criterion = LossWeighting()  # starts as torch.nn.CrossEntropyLoss()
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> criterion(logits, torch.randint(3, (8,))).backward()
        >>> criterion.weight_of(torch.tensor([0.1, 5.0])).tolist()
        [0.5, 0.5]
    """

    meta_rate = 1e-3
    """Adam's rate at which it is learned online."""

    DEFINING = ("hidden", "normalize_weights")
    APPLIED = ("ignore_index", "reduction")

    def __init__(
        self,
        hidden: int = 100,
        *,
        normalize_weights: bool = True,
        ignore_index: int = IGNORED,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_at_least_one("LossWeighting", "hidden", hidden)
        _checks.choice("LossWeighting", "reduction", reduction, _checks.REDUCTIONS)
        self.hidden = hidden
        self.normalize_weights = normalize_weights
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.input_weight = nn.Parameter(torch.empty(hidden, 1, device=device, dtype=dtype))
        self.input_bias = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
        self.output_weight = nn.Parameter(torch.empty(1, hidden, device=device, dtype=dtype))
        self.output_bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the hidden layer anew, uniformly from (-1, 1) as :class:`torch.nn.Linear`; the output layer is 0."""
        nn.init.uniform_(self.input_weight, -1, 1)
        nn.init.uniform_(self.input_bias, -1, 1)
        nn.init.zeros_(self.output_weight)
        nn.init.zeros_(self.output_bias)

    def weight_of(self, loss: Tensor) -> Tensor:
        """The weight of a sample as a function of its cross-entropy, elementwise, in (0, 1): not normalised."""
        _checks.check_tensors("LossWeighting", loss=loss)
        _checks.check_float("LossWeighting", loss=loss)
        return self._score(loss.reshape(-1))[0].sigmoid().reshape(loss.shape)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        samples = self._read(pred, target)
        losses = samples.cross_entropy()
        weights = self._weights(samples, self._score(losses.detach())[0])
        return samples.reduced(weights * losses, self.reduction)

    def _read(self, pred: Tensor, target: Tensor) -> Samples:
        samples = read("LossWeighting", pred, target, self.ignore_index)
        _checks.check_same_device("LossWeighting", input_weight=self.input_weight, pred=pred)
        return samples

    def _score(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """What the sigmoid is taken of, ``[S]``, and the hidden layer ``[S, H]``."""
        return _score(losses, self.input_weight, self.input_bias, self.output_weight, self.output_bias)

    def _weights(self, samples: Samples, score: Tensor) -> Tensor:
        """``[S]``"""
        if not self.normalize_weights:
            return score.sigmoid()
        # From logarithms: where all weights underflow, their ratios are still known.
        log_w = F.logsigmoid(score).masked_fill(~samples.counts, torch.finfo(score.dtype).min)
        return log_w.softmax(0).where(samples.counts, 0) * samples.counts.sum()

    @torch.no_grad()
    def with_mixed_derivative(
        self, pred: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, ...]]] | None:
        r"""What :func:`~lossmeta.adalfl.meta_gradient` needs, in closed form: :math:`w_n` is all that has parameters.

        Returns:
            The loss, its slope in ``pred``, and the function that takes ``u`` to the gradients of <slope, u> in the
            four parameters. ``None`` where a call and autograd must do it: for other shapes than ``[N, C]``, other
            reductions than the mean, a subclass, parameters of which one is frozen or has another dtype than ``pred``,
            and a module with hooks.
        """
        parameters = (self.input_weight, self.input_bias, self.output_weight, self.output_bias)
        if (
            type(self) is not LossWeighting
            or self.reduction != "mean"
            or not all(p.requires_grad and p.dtype == pred.dtype for p in parameters)
            or pred.dtype not in (torch.float32, torch.float64)
            or pred.dim() != 2
            or has_hooks(self)
        ):
            return None
        samples = self._read(pred, target)
        losses = samples.cross_entropy()
        score, hidden = self._score(losses)
        weights = self._weights(samples, score)
        count = samples.counts.sum()
        value = samples.reduced(weights * losses, "mean")
        slope_of_losses = samples.cross_entropy_slope()
        slope = slope_of_losses * (weights / count)[:, None]

        @torch.no_grad()
        def mixed(u: Tensor) -> tuple[Tensor, ...]:
            along = (slope_of_losses * u).where(samples.counts[:, None], 0).sum(1) / count
            # w_n = v_n, or N v_n / sum v, with v = sigmoid(z), and d log v / dz = 1 - v.
            by_log = weights * along
            if self.normalize_weights:
                by_log = by_log - weights * (by_log.sum() / count)
            by_score = by_log * (-score).sigmoid()
            by_hidden = by_score[:, None] * self.output_weight * (hidden > 0)
            return (
                (by_hidden * losses[:, None]).sum(0)[:, None],
                by_hidden.sum(0),
                (by_score[:, None] * hidden).sum(0)[None],
                by_score.sum()[None],
            )

        return value, slope, mixed

    @torch.no_grad()
    def plot(self, losses: tuple[float, float] = (0.0, 10.0)) -> Figure:
        """Draws the weight of a sample over its cross-entropy, not normalised.

        Args:
            losses: lowest and highest.

        Returns:
            A ``matplotlib.figure.Figure``: write it with its ``savefig``.

        Raises:
            ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
            ValueError: for losses that are none.
        """
        low, high = losses
        if not 0 <= low < high < torch.inf:
            raise ValueError(
                f"LossWeighting: losses must be (lowest, highest), finite and from 0 on, got {losses}"
            )
        x = torch.linspace(low, high, _plot.POINTS, device=self.input_weight.device, dtype=torch.float32)
        return _plot.panels("LossWeighting", x, "cross-entropy of the sample", {"weight": self.weight_of(x)})

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden}, normalize_weights={self.normalize_weights}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )


@in_full_precision
def _score(
    losses: Tensor,  # [S]
    input_weight: Tensor,
    input_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(losses.dtype, torch.float32)
    hidden = F.linear(losses.to(dtype)[:, None], input_weight.to(dtype), input_bias.to(dtype)).relu()
    return F.linear(hidden, output_weight.to(dtype), output_bias.to(dtype)).squeeze(1), hidden
