"""Losses that stay as they are or follow a rule: the ALA paper's comparisons on CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta.experiments import Method, Trial
from lossmeta.ops import class_confusion, parametric_cross_entropy
from lossmeta.recipes import _ala_bandit, _ala_large_margin, _ala_self_paced
from lossmeta.recipes._ala_auc import AreaUnderPrecisionRecall, pairwise_auc_roc
from lossmeta.recipes._ala_curves import Watching
from lossmeta.recipes._ala_images import ImageFit, best_of
from lossmeta.recipes._ala_tasks import CLASSES, SEARCH

NOISE = 0.1  # of the identity, in the paper's random matrix
DUAL = 0.1  # of the learning rate, that of the multipliers


@dataclass
class Rule:
    """A loss that needs no search.

    Attributes:
        fit: the training.
    """

    fit: ImageFit

    def __post_init__(self) -> None:
        """What is needed before the first step."""

    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def after(self, step: int) -> None:
        """Called after every step."""


class CrossEntropy(Rule):
    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.fit.model(x), y)


class SelfPaced(Rule):
    """Plain steps at first, to have losses to begin with; Kumar et al. do so too."""

    def __post_init__(self) -> None:
        self.first: float | None = None

    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        share = step / self.fit.steps
        losses = F.cross_entropy(self.fit.model(x), y, reduction="none")
        if share < 1 / _ala_self_paced.ROUNDS:
            return losses.mean()
        if self.first is None:
            train = self.fit.drawn.train
            known = F.cross_entropy(self.fit.predicted(train), train[1], reduction="none")
            self.first = _ala_self_paced.median(known)
        return _ala_self_paced.chosen(losses, _ala_self_paced.threshold(self.first, share))


@dataclass
class LargeMargin(Rule):
    """L-Softmax in the last layer, which has no bias then.

    Attributes:
        least_ease: of the margin.
    """

    least_ease: float = 0.0

    def __post_init__(self) -> None:
        *before, last = self.fit.model.children()
        assert isinstance(last, torch.nn.Linear)
        self.body, self.last = torch.nn.Sequential(*before), last
        last.bias.requires_grad_(False)  # zero, as it was made

    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        ease = _ala_large_margin.ease(step / self.fit.steps, self.least_ease)
        logits = _ala_large_margin.large_margin_logits(self.body(x), self.last.weight, y, ease)
        return F.cross_entropy(logits, y)


class Matrix(Rule):
    """Eq. 6 under a matrix that stays the identity."""

    def __post_init__(self) -> None:
        self.phi = self.fixed()

    def fixed(self) -> Tensor:
        return torch.eye(CLASSES, device=self.fit.drawn.train[0].device)

    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        return parametric_cross_entropy(self.fit.model(x), y, self.phi)

    def after(self, step: int) -> None:
        if (step + 1) % self.fit.setting.window == 0:
            self.decide()

    def decide(self) -> None:
        """After every window."""

    def confusion(self) -> Tensor:
        """Eq. 7, on the validation part."""
        logits, labels = self.fit.predicted(self.fit.drawn.valid), self.fit.drawn.valid[1]
        sums, counts = class_confusion(logits, labels)
        return (sums / counts[:, None]).to(self.phi)


@dataclass
class OffDiagonal(Matrix):
    """The identity, with one number everywhere else.

    Attributes:
        entry: that number.
    """

    entry: float = 0.0

    def fixed(self) -> Tensor:
        return super().fixed() * (1 - self.entry) + self.entry


class RandomMatrix(Matrix):
    """The identity with noise of standard deviation 0.1 on every entry, drawn anew after every window."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.fit.trial.random_seed(SEARCH))
        self.decide()

    def decide(self) -> None:
        noise = NOISE * torch.randn(CLASSES, CLASSES, generator=self.generator)
        self.phi = self.fixed() + noise.to(self.fit.drawn.train[0].device)


class ConfusionMatrix(Matrix):
    """The confusions of Eq. 7 as they stand, over the largest: they reward what is unlikely."""

    def decide(self) -> None:
        confusion = self.confusion()
        self.phi = confusion / confusion.max()


class LikenessMatrix(Matrix):
    """What the confusions of Eq. 7 say of probability: their exponentials, 1 on the diagonal of a perfect model."""

    def decide(self) -> None:
        self.phi = (-self.confusion()).exp()


@dataclass
class Bandit(Matrix):
    """Raises Phi of pairs that are confused, and lowers it for the others.

    Attributes:
        step_size: of a decision, in units of 0.1.
    """

    step_size: float = 1.0

    def decide(self) -> None:
        self.phi = _ala_bandit.moved(self.phi, self.confusion(), 0.1 * self.step_size)


class PairwiseAUCROC(Rule):
    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        return pairwise_auc_roc(self.fit.model(x), y)


class AUCPR(Rule):
    """Multipliers move at a tenth of the learning rate, as in the authors' code."""

    def __post_init__(self) -> None:
        labels = self.fit.drawn.train[1]
        self.saddle = AreaUnderPrecisionRecall(labels.bincount(minlength=CLASSES) / len(labels))
        self.fit.optimizer.add_param_group({"params": [self.saddle.threshold], "lr": self.fit.rate})

    def loss(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.saddle(self.fit.model(x), y)
        return found

    def after(self, step: int) -> None:
        self.saddle.ascend(DUAL * self.fit.optimizer.param_groups[-1]["lr"])


ONE_AGAINST_REST = (PairwiseAUCROC, AUCPR)


def by_rule(
    label: str,
    kind: Callable[..., Rule],
    rate: float,
    *,
    with_validation: bool = False,
    networks: int = 1,
    watching: Watching | None = None,
    **options: float,
) -> Method:
    """Training under a rule's loss; of several networks the best on the validation part is reported.

    ``watching`` makes what is called after every step with its number and its loss, where somebody wants to see them.
    """

    def train(trial: Trial) -> dict[str, float]:
        fits = []
        for child in range(networks):
            fit = ImageFit(trial, rate, child, kind in ONE_AGAINST_REST)
            rule, watch = kind(fit, **options), watching(fit) if watching else None
            for i, x, y in fit.batches(with_validation):
                loss = rule.loss(i, x, y)
                fit.step(loss)
                rule.after(i)
                if watch:
                    watch(i, loss)
            fits.append(fit)
        return best_of(fits).measures()

    settings = {"rate": rate, "with validation": with_validation, "networks": networks, **options}
    return Method(label, train, {"kind": getattr(kind, "__name__", ""), **settings})
