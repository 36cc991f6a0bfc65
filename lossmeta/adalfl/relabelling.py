"""Training labels drawn anew from what an averaged model makes of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossmeta._checks import check_at_least_one, check_fraction
from lossmeta.losses._class_indices import check, rows

WHERE = "Relabelling"
START = 20.0  # samples of each class that the transition matrix is believed to have seen at the start
BEGINNING = 400  # steps until what the model believes is all that decides
MEMORY = 0.01  # share of a step in the mean over the last ones
INTERVAL = 50  # steps until it is looked anew at how wrong labels are spread
ALARM = 10.0  # a tenth fewer wrong labels than before is alarm enough


class Drawn(NamedTuple):
    """Labels of a batch of S samples, and what they say of how labels go wrong."""

    labels: Tensor
    """of the shape of those that were given"""
    given: Tensor
    """``[S]``: those that were given, 0 where the sample does not count"""
    classes: Tensor
    """``[S, C]``: probabilities of the classes, 0 where the sample does not count"""


class Relabelling:
    r"""Draws labels anew, by what a model that lags behind the training makes of the sample and of its label.

    With :math:`p` the softmax of that model and :math:`T_{ky}` the probability that a sample of class k bears label y,
    the class has the probabilities

    .. math:: q_k = \frac{p_k\,T_{ky}}{\sum_j p_j\,T_{jy}}

    and a share of the labels is replaced by draws from q. T is learned beside it, as in the EM algorithm of Dawid and
    Skene (1979), from all samples so far: :math:`T_{ky}` is the share of label y in the sums of :math:`q_k`. It starts
    at half right, half uniform, with the weight of 20 samples a class.

    Which share is best depends on the labels, and follows what is believed of them:

    .. math:: \rho = \rho_0 + (1 - \rho_0) \max\Bigl(s,\;\; 10\,\bigl(1 - \tfrac{w_t}{\bar w}\bigr),\;\;
                     1 - \tfrac{t}{400}\Bigr)

    limited to 1. Where the wrong labels of a class are spread over all others, the shape of a loss can tell them from
    right ones by how unlikely they are; where they name one class, it cannot. :math:`s` is 0 in the first case and 1 in
    the second: one minus the entropy of the wrong labels of a class over its greatest value, in the mean over the wrong
    labels; with two classes it is 1. It is looked at every fifty steps. A model that learns the given labels by heart
    sees ever fewer wrong ones: :math:`w_t`, the share of wrong labels in the last hundred steps or so, falls below
    :math:`\bar w`, that of all so far. The last term is of the first steps t, in which the model knows nothing yet.

    It keeps :math:`C^2` numbers.

    Args:
        num_classes: C.
        least: :math:`\rho_0`, in [0, 1], of the labels that are drawn at least; 1 draws all, always.
        seed: of the draws.
        ignore_index: label that is left as it is. So are those that are no class.
        device: of the labels.

    Raises:
        ValueError: for options outside the values above.

    Example:
        >>> relabelling = Relabelling(3)
        >>> sure = 9 * torch.eye(3)  # of classes 0, 1, 2
        >>> drawn = relabelling.draw(sure, torch.tensor([0, 1, 1]))  # at the start all are drawn
        >>> drawn.labels.tolist()
        [0, 1, 2]
        >>> relabelling.learn(drawn)
    """

    def __init__(
        self,
        num_classes: int,
        least: float = 0.5,
        *,
        seed: int = 0,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
    ) -> None:
        check_at_least_one(WHERE, "num_classes", num_classes)
        check_fraction(WHERE, "least", least)
        self.least, self.ignore_index = least, ignore_index
        right = torch.eye(num_classes, device=device, dtype=torch.float32)
        self._seen = START * (0.5 * right + 0.5 / num_classes)  # by label and class
        self._of_class = self._seen.sum(0)
        self._wrong = self._seen.sum() - self._seen.trace()
        self._recent = self._wrong / self._of_class.sum()
        self._concentration = self.concentration
        self._steps = 0
        self._generator = torch.Generator(self._seen.device).manual_seed(seed)

    @property
    def transition(self) -> Tensor:
        """T, ``[C, C]``, of now."""
        return (self._seen / self._of_class).T.contiguous()

    @property
    def concentration(self) -> Tensor:
        """:math:`s` of now, ``[]``: 0 where wrong labels are spread evenly, 1 where a class is taken for one other."""
        wrong = self.transition.fill_diagonal_(0)
        count = wrong.sum(1)
        if len(wrong) < 3:
            return torch.ones_like(count[0])
        least = torch.finfo(wrong.dtype).tiny
        shares = wrong / count[:, None].clamp_min(least)
        entropy = -torch.xlogy(shares, shares).sum(1) / math.log(len(wrong) - 1)
        return ((1 - entropy) * count).sum() / count.sum().clamp_min(least)

    @property
    def share(self) -> Tensor:
        r""":math:`\rho`, ``[]``: of the labels that are drawn now."""
        before = self._wrong / self._of_class.sum()
        by_heart = ALARM * (1 - self._recent / before.clamp_min(torch.finfo(before.dtype).tiny))
        most = self._concentration.maximum(by_heart).clamp(max(0.0, 1 - self._steps / BEGINNING), 1)
        return self.least + (1 - self.least) * most

    @torch.no_grad()
    def draw(self, logits: Tensor, labels: Tensor) -> Drawn:
        """Labels to train on. Nothing is learned from them until :meth:`learn`.

        Args:
            logits: of the model that lags behind, ``[N, C]`` or ``[N, C, d...]``.
            labels: class indices (int64 or uint8), ``[N]`` or ``[N, d...]``.

        Raises:
            ValueError: for shapes, dtypes or devices that do not fit.
            TypeError: for something that is not a tensor.
        """
        classes = check(WHERE, logits, labels, (len(self._seen), "num_classes"), "logits")
        given = labels.reshape(-1)
        counts = (given >= 0) & (given < classes) & (given != self.ignore_index)
        y = given.long().where(counts, 0)
        p = rows(logits, classes).float().softmax(1)
        q = p * (self._seen[y] / self._of_class)
        total = q.sum(1, keepdim=True)
        # Where the model is sure of a class that never bears the label, what it says stands.
        q = torch.where(total > 0, q / total, p)
        # The least of exponential times with rates q is that of class k with probability q_k.
        times = torch.empty_like(q).exponential_(generator=self._generator)
        chosen = torch.rand(len(y), generator=self._generator, device=y.device) < self.share
        found = torch.where(counts & chosen, (q / times).argmax(1), given.long())
        return Drawn(found.to(labels.dtype).view(labels.shape), y, q.where(counts[:, None], 0))

    def learn(self, *drawn: Drawn) -> None:
        """Takes the batches of a step into what is believed; those of a model that was not finite are left out."""
        self._steps += 1
        for one in drawn:
            count = one.classes.sum()
            usable = count.isfinite() & (count > 0)
            classes = one.classes.where(usable, 0)
            wrong = count - one.classes.gather(1, one.given[:, None]).sum()
            self._seen.index_put_(
                (one.given,), classes, accumulate=True
            )  # unlike index_add_ the same in every run
            self._of_class += classes.sum(0)
            self._wrong = self._wrong + wrong.where(usable, 0)
            recent = (wrong / count).where(usable, self._recent)
            self._recent = self._recent.lerp(recent, MEMORY / len(drawn))
        if self._steps % INTERVAL == 0:
            self._concentration = self.concentration

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self._seen.clone(),
            "of_class": self._of_class.clone(),
            "wrong": self._wrong.clone(),
            "recent": self._recent.clone(),
            "concentration": self._concentration.clone(),
            "steps": self._steps,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Wherever the state has been loaded to; a generator takes its own from the CPU alone.
        for name in ("seen", "of_class", "wrong", "recent", "concentration"):
            getattr(self, f"_{name}").copy_(state[name])
        self._steps = state["steps"]
        self._generator.set_state(state["generator"].cpu())
