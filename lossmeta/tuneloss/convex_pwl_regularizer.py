"""The paper's online regulariser: LearnLoss on hinges with given knots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossmeta._checks import check_at_least_one
from lossmeta.tuneloss._regularizer import NotFitted, check_model
from lossmeta.tuneloss.convex_pwl import ConvexPWL
from lossmeta.tuneloss.piecewise_linear import PiecewiseLinear


class ConvexPWLRegularizer:
    """Learns a regulariser among the sums of :class:`ConvexPWL`'s hinges, by :func:`learn_loss` (Appendix B.3).

    The knots are quantiles of the first model's weights, and stay. The task's loss has coefficient 1 and all hinges at
    least 0; there is no other bound. The gradients are those of the regularised weights.

    :class:`ConvexRegularizer` needs no knots and no solver.

    Args:
        count: of knots for each group of weights.
        window: models that are looked at, the last ones; ``None``: all, as in the paper.
        eps: the weight of gradients beside values, see :func:`learn_loss`.
        solver: see :func:`learn_loss`.

    Raises:
        ValueError: for a count or a window below 1.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), section 4.3 and Appendix B.3.

    Example:
        >>> regularizer = lossmeta.tuneloss.ConvexPWLRegularizer(count=3)
        >>> weights = torch.linspace(-1, 1, 9)
        >>> regularizer.observe([weights], [torch.zeros(9)], [weights], 0.5, 0.7)
        >>> (r,) = regularizer.fit()
        >>> r.knots
        tensor([-1.,  0.,  1.], dtype=torch.float64)
    """

    def __init__(
        self,
        count: int = 50,
        window: int | None = 20,
        *,
        eps: float | str = "balanced",
        solver: str = "auto",
    ) -> None:
        check_at_least_one("ConvexPWLRegularizer", "count", count)
        if window is not None:
            check_at_least_one("ConvexPWLRegularizer", "window", window)
        self.count, self.window, self.eps, self.solver = count, window, eps, solver
        self.features: list[ConvexPWL] = []
        self._models: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # error [], features [k], Gram matrix [k + 1, k + 1]

    def observe(
        self,
        weights: Sequence[Tensor],
        train_gradients: Sequence[Tensor],
        valid_gradients: Sequence[Tensor],
        train_loss: float,
        valid_loss: float,
    ) -> None:
        """Takes a model into the window; see :meth:`ConvexRegularizer.observe`.

        Args:
            weights: a vector [P] for each group.
            train_gradients: of the task's loss on the training data, of the same shapes.
            valid_gradients: of the validation error, of the same shapes.
            train_loss: of the model.
            valid_loss: of the model.

        Raises:
            ValueError: for other groups than before, shapes that differ, no weights, and numbers that are not finite.
        """
        check_model("ConvexPWLRegularizer", weights, train_gradients, valid_gradients)
        if not (np.isfinite(train_loss) and np.isfinite(valid_loss)):
            raise ValueError(
                f"ConvexPWLRegularizer: losses must be finite, got {train_loss} and {valid_loss}"
            )
        hinges = self.features or [ConvexPWL.at_quantiles(w, self.count) for w in weights]
        if len(hinges) != len(weights):
            raise ValueError(
                f"ConvexPWLRegularizer: weights must be of {len(hinges)} groups as before, got {len(weights)}"
            )
        size = 1 + sum(h.size for h in hinges)
        features = torch.zeros(size, dtype=torch.float64, device="cpu")
        gram = torch.zeros(size + 1, size + 1, dtype=torch.float64, device="cpu")
        features[0] = train_loss
        at = 1
        for h, w, *both in zip(hinges, weights, train_gradients, valid_gradients, strict=True):
            gradients = torch.stack(both).to(w.dtype)
            own, products, cross = (t.cpu() for t in h.statistics(w.detach(), gradients))
            place = slice(at, at + h.size)
            features[place], gram[place, place] = own, products
            for column, product in zip((0, size), cross.T, strict=True):
                gram[place, column] = gram[column, place] = product
            wide = gradients.double()
            among = (wide @ wide.T).cpu()
            gram[0, 0] += among[0, 0]
            gram[0, size] += among[0, 1]
            gram[size, size] += among[1, 1]
            at += h.size
        gram[size, 0] = gram[0, size]
        self.features = hinges
        self._models.append((torch.tensor(valid_loss, dtype=torch.float64, device="cpu"), features, gram))
        if self.window is not None:
            del self._models[: -self.window]

    def fit(self) -> list[PiecewiseLinear]:
        """The regularisers of the models in the window, one for each group.

        Raises:
            ValueError: before any model, and what :func:`learn_loss` refuses.
            RuntimeError: where no solver's answer could be verified.
        """
        from lossmeta.tuneloss.learn_loss import learn_loss
        from lossmeta.tuneloss.solvers import NotCertified

        if not self._models:
            raise ValueError("ConvexPWLRegularizer: a model must be observed before the fit, got none")
        errors, features, grams = (torch.stack(part).numpy() for part in zip(*self._models, strict=True))
        lower, upper = np.zeros(features.shape[1]), np.full(features.shape[1], np.inf)
        lower[0] = upper[0] = 1  # the task's loss
        try:
            learned = learn_loss(
                errors, features, lower, upper, grams=grams, eps=self.eps, solver=self.solver
            )
        except NotCertified as error:
            raise NotFitted(str(error)) from error
        coefficients = torch.from_numpy(learned.values[1:]).split([h.size for h in self.features])
        return [h.function(c) for h, c in zip(self.features, coefficients, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The knots, and the models of the window."""
        return {
            "count": self.count,
            "window": self.window,
            "knots": [h.knots.clone() for h in self.features],
            "models": [tuple(t.clone() for t in model) for model in self._models],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there.

        Raises:
            ValueError: for the state of another count or window. Nothing has changed then.
        """
        for name in ("count", "window"):
            if name not in state or state[name] != getattr(self, name):
                raise ValueError(
                    f"ConvexPWLRegularizer: the state must be of {name} {getattr(self, name)}, got {state.get(name)}"
                )
        models = [tuple(t.clone() for t in model) for model in state["models"]]
        self.features = [ConvexPWL(knots) for knots in state["knots"]]
        self._models = models
