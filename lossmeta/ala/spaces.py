"""The spaces that the library brings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta._checks import check_at_least_one, check_fraction, check_tensors
from lossmeta.ala._adjusted import IGNORED, Adjusted, generalised
from lossmeta.ala.space import LEARNING_RATE, LossSpace, Parameter, Values
from lossmeta.losses import DistanceMixtureLoss, FocalWeightedLoss
from lossmeta.ops import class_confusion, parametric_cross_entropy


class Robust(LossSpace):
    r"""Generalised cross-entropy, against wrong labels: :math:`(1 - p^q) / q` of the probability p of the label.

    From the cross-entropy at :math:`q = 0`, which is the default, to the absolute error at 1. The prediction is logits
    ``[N, C]`` or ``[N, C, d...]``, the target classes, of which -100 does not count.

    Sources:
        Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels" (2018).

    Example:
        >>> space = lossmeta.ala.Robust()
        >>> logits, labels = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> [round(space(logits, labels, {"q": torch.tensor(q)}).item(), 4) for q in (0.0, 1.0)]  # log 4 and 3/4
        [1.3863, 0.75]
    """

    parameters = (Parameter("q", default=0.0, scale=0.3, low=0.0, high=1.0),)

    def loss(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        surprise = F.cross_entropy(prediction, target, reduction="none", ignore_index=IGNORED)
        return _mean(generalised(surprise, values["q"]), target)

    def adjusted(self, values: Values) -> Adjusted:
        return Adjusted(exponent=values["q"])


def _mean(losses: Tensor, target: Tensor) -> Tensor:
    """Over the samples that count."""
    if target.is_floating_point():
        return losses.mean()
    return losses.sum() / (target != IGNORED).sum()


class LogitAdjustment(LossSpace):
    r"""Logits moved before the loss by :math:`\tau \log \pi_c + m_c`, against rare classes.

    :math:`\pi` is the share of each class among the training data. :math:`\tau = 1` with the cross-entropy is the
    logit-adjusted loss, which lowers the balanced error; the margins m move each class on its own. By default both are
    0.

    Args:
        counts: of the training samples of each class, ``[C]``, or their shares.

    Raises:
        ValueError: for counts that are no vector, negative or all 0.

    Sources:
        Menon et al., "Long-tail Learning via Logit Adjustment" (2021).

    Example:
        >>> space = lossmeta.ala.LogitAdjustment(torch.tensor([90, 10]))
        >>> logits, labels = torch.zeros(1, 2), torch.tensor([1])
        >>> values = {"tau": torch.tensor(1.0), "margin": torch.zeros(2)}
        >>> round(space(logits, labels, values).item(), 4)  # log 10: a guess in favour of the frequent class
        2.3026
    """

    shift = "margin"

    def __init__(self, counts: Tensor) -> None:
        check_tensors("LogitAdjustment", counts=counts)
        if counts.dim() != 1 or len(counts) < 2:
            raise ValueError(f"LogitAdjustment: counts must be [C], C at least 2, got {list(counts.shape)}")
        share = counts.detach().double().cpu()
        if not bool((share >= 0).all()) or not 0 < float(share.sum()) < math.inf:
            raise ValueError(
                f"LogitAdjustment: counts must be finite and not negative, one above 0, got {counts.tolist()}"
            )
        # A class without samples counts as a tenth of one; among shares, as a tenth of the rarest.
        least = 0.1 * min(1.0, float(share[share > 0].min()))
        self.log_prior = (share.where(share > 0, least) / share.sum()).log()
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.parameters = (
            Parameter("tau", default=0.0, scale=0.6, low=-1.0, high=3.0),
            Parameter("margin", default=0.0, scale=0.5, low=-8.0, high=8.0, size=len(counts)),
        )

    def transform(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        tau, margin = values["tau"], values["margin"]
        if prediction.shape[1:2] != self.log_prior.shape:
            raise ValueError(
                f"LogitAdjustment: logits must be [N, {len(self.log_prior)}] or [N, {len(self.log_prior)}, d...], got "
                f"{list(prediction.shape)}"
            )
        return prediction + (tau * self._prior(margin) + margin).view(-1, *[1] * (prediction.dim() - 2))

    def adjusted(self, values: Values) -> Adjusted:
        margin = values["margin"]
        return Adjusted(shift=values["tau"][..., None] * self._prior(margin) + margin)

    def _prior(self, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        if key not in self._placed:
            with torch.inference_mode(False):  # it outlives a call that records no gradients
                self._placed[key] = self.log_prior.to(*key)
        return self._placed[key]


class Smoothing(LossSpace):
    r"""Label smoothing :math:`\varepsilon` of the cross-entropy, in [0, 0.5]; 0 by default.

    It adds :math:`\varepsilon \, (\frac{1}{C} \sum_c -\log p_c + \log p_y)`, also to another space's loss.

    Example:
        >>> space = lossmeta.ala.Smoothing()
        >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> value = space(logits, labels, {"smoothing": torch.tensor(0.2)})
        >>> torch.allclose(value, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2))
        True
    """

    parameters = (Parameter("smoothing", default=0.0, scale=0.1, low=0.0, high=0.5),)

    def penalty(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        surprise = F.cross_entropy(prediction, target, reduction="none", ignore_index=IGNORED)
        uniform = -torch.log_softmax(prediction, 1).mean(1)
        difference = uniform - surprise
        if not target.is_floating_point():
            difference = torch.where(target == IGNORED, 0, difference)
        return values["smoothing"] * _mean(difference, target)

    def adjusted(self, values: Values) -> Adjusted:
        return Adjusted(smoothing=values["smoothing"])


class LearningRate(LossSpace):
    """The learning rate itself, as a factor of the optimizer's steps: 1 by default, from 0.1 to 10.

    Right for optimizers whose step is proportional to their rate, as those of ``torch.optim`` are.

    Example:
        >>> space = lossmeta.ala.Robust() * lossmeta.ala.LearningRate()
    """

    parameters = (Parameter(LEARNING_RATE, default=0.0, scale=0.35, low=-math.log(10), high=math.log(10)),)

    def adjusted(self, values: Values) -> Adjusted:
        return Adjusted()


class ClassCorrelation(LossSpace):
    r"""The paper's matrix :math:`\Phi` of the parametric cross-entropy (ALA, Eq. 6), symmetric.

    .. math:: \ell = -\sigma\bigl(y^\top \Phi \log \mathrm{softmax}(x)\bigr)

    Off the diagonal :math:`\Phi` lies in [-1, 1] and is 0 by default. The diagonal is 1 by default and at least
    ``floor``, so that no class pays for being right.

    A negative entry off the diagonal rewards a probability that goes to 0, and the logarithm of that has no bound: with
    enough of them the sigmoid saturates for samples that are wrong, and training stops. ``lowest=0`` rules that out.

    Args:
        num_classes: C.
        activation: ``"sigmoid"``, the paper's, or ``"identity"``, at which the default is the cross-entropy.
        floor: least value of the diagonal.
        lowest: least value off the diagonal, in [-1, 0].

    Example:
        >>> space = lossmeta.ala.ClassCorrelation(3, activation="identity")
        >>> logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        >>> values = {"diagonal": torch.ones(3), "pairs": torch.zeros(3)}
        >>> torch.allclose(space(logits, labels, values), torch.nn.functional.cross_entropy(logits, labels))
        True
    """

    def __init__(
        self, num_classes: int, *, activation: str = "sigmoid", floor: float = 0.1, lowest: float = -1.0
    ) -> None:
        check_at_least_one("ClassCorrelation", "num_classes - 1", num_classes - 1)
        check_fraction("ClassCorrelation", "floor", floor)
        if not -1 <= lowest <= 0:
            raise ValueError(f"ClassCorrelation: lowest must lie in [-1, 0], got {lowest}")
        self.num_classes, self.activation = num_classes, activation
        self.rows, self.columns = torch.triu_indices(num_classes, num_classes, 1, device="cpu")
        self.parameters = (
            Parameter(
                "diagonal", 1.0, scale=0.1, low=floor, high=2.0, size=num_classes, policy="class pairs"
            ),
            Parameter(
                "pairs", 0.0, scale=0.1, low=lowest, high=1.0, size=len(self.rows), policy="class pairs"
            ),
        )

    def matrix(self, diagonal: Tensor, pairs: Tensor) -> Tensor:
        """Φ, [C, C]."""
        rows, columns = self.rows.to(pairs.device), self.columns.to(pairs.device)
        upper = pairs.new_zeros(self.num_classes, self.num_classes).index_put((rows, columns), pairs)
        return upper + upper.T + torch.diag_embed(diagonal)

    def prepared(self, values: Values) -> Values:
        return {**values, "phi": self.matrix(values["diagonal"], values["pairs"])}

    def loss(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        phi = values["phi"] if "phi" in values else self.matrix(values["diagonal"], values["pairs"])
        return parametric_cross_entropy(prediction, target, phi, activation=self.activation)

    def statistics(self, prediction: Tensor, target: Tensor, values: Values) -> dict[str, Tensor]:
        """The confusions ``[C_ij, C_ji]`` of each pair of classes (ALA, Eq. 7)."""
        logits = prediction.movedim(1, -1).reshape(-1, self.num_classes)
        sums, counts = class_confusion(logits, target.reshape(-1), ignore_index=IGNORED)
        confusion = (sums / counts[:, None]).to(prediction.device, torch.float32)
        rows, columns = self.rows.to(confusion.device), self.columns.to(confusion.device)
        own = confusion.diagonal()
        return {
            "diagonal": torch.stack([own, own], 1),
            "pairs": torch.stack([confusion[rows, columns], confusion[columns, rows]], 1),
        }


class ContrastiveShape(LossSpace):
    r"""A softmax over the pairs of a batch, for retrieval, whose shape adapts.

    For embeddings x, which are normalised, with similarities s of pairs, each positive pair (i, j) costs
    :math:`-\log \frac{e^{(s_{ij} - m) / t}}{e^{(s_{ij} - m) / t} + \sum_k w_k e^{s_{ik} / t}}` with the negatives k of
    i. t is the temperature, whose logarithm is adapted, m a margin, and :math:`w_k \propto e^{h s_{ik} / 4t}`, of mean
    1, weights hard negatives by h. The mean over positive pairs, times 3t, so that a step does not depend on t, plus
    ``pull`` times the mean of :math:`1 - s` over them. By default t is 0.1, and m, h and pull are 0.

    The prediction is ``[N, D]``, the target a class per sample ``[N]``; every batch must have two samples of a class.

    Example:
        >>> space = lossmeta.ala.ContrastiveShape()
        >>> names = [p.name for p in space.parameters]
        >>> names
        ['log_temperature', 'margin', 'hardness', 'pull']
    """

    jitter = 0.0
    parameters = (
        Parameter("log_temperature", default=math.log(0.1), scale=0.4, low=math.log(0.01), high=0.0),
        Parameter("margin", default=0.0, scale=0.1, low=-0.2, high=0.6),
        Parameter("hardness", default=0.0, scale=0.5, low=-2.0, high=3.0),
        Parameter("pull", default=0.0, scale=0.3, low=-1.5, high=1.5),
    )

    def loss(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        if prediction.dim() != 2 or target.shape != prediction.shape[:1]:
            raise ValueError(
                f"ContrastiveShape: the prediction must be [N, D] and the target [N], got {list(prediction.shape)} and "
                f"{list(target.shape)}"
            )
        x = F.normalize(prediction, dim=1)
        similarity = x @ x.T
        same = target[:, None] == target
        positive = same & ~torch.eye(len(target), dtype=torch.bool, device=target.device)
        temperature = values["log_temperature"].exp()
        logits = (similarity - values["margin"] * positive) / temperature
        floor = torch.finfo(logits.dtype).min / 4
        negatives = logits.masked_fill(same, floor)
        # Weights of mean 1 over the negatives of a sample; they are constants, as of a focal loss.
        top = negatives.detach().amax(1, keepdim=True)
        weight = values["hardness"] / 4 * (negatives.detach() - top).clamp(-40, 0)
        count = (~same).sum(1, keepdim=True).clamp_min(1)
        weight = (
            weight - weight.masked_fill(same, floor).logsumexp(1, keepdim=True) + count.to(logits.dtype).log()
        )
        against = torch.where(same, floor, negatives + weight.clamp(-20, 20)).logsumexp(1, keepdim=True)
        each = torch.logaddexp(logits, against) - logits
        pairs = positive.sum()
        contrast = torch.where(positive, each, 0).sum() / pairs * 3 * temperature.clamp_min(0.02)
        return contrast + values["pull"] * torch.where(positive, 1 - similarity, 0).sum() / pairs


class ModuleSpace(LossSpace):
    """Bounded tensors of any loss module, such as ``phi`` of :class:`lossmeta.losses.DistanceMixtureLoss`.

    Their values when this is made are the defaults.

    Args:
        loss: ``loss(prediction, target) -> []``.
        bounds: of each of its parameters and buffers that is adapted ``(low, high)``, by name.
        scale: a change that matters, as a share of high minus low.
        jitter: see :class:`LossSpace`.

    Raises:
        ValueError: for a name that the module does not have, and values out of bounds.

    Example:
        >>> loss = lossmeta.losses.DistanceMixtureLoss()
        >>> space = lossmeta.ala.ModuleSpace(loss, {"phi": (0.0, 1.0)})
        >>> [(p.name, p.size) for p in space.parameters]
        [('phi', 10)]
    """

    def __init__(
        self,
        loss: nn.Module,
        bounds: Mapping[str, tuple[float, float]],
        *,
        scale: float = 0.1,
        jitter: float = 0.0,
    ) -> None:
        self.module, self.jitter = loss, jitter
        self.shapes: dict[str, torch.Size] = {}
        tensors = {**dict(loss.named_parameters()), **dict(loss.named_buffers())}
        parameters = []
        for name, (low, high) in bounds.items():
            if name not in tensors:
                raise ValueError(f"ModuleSpace: loss must have a tensor {name!r}, got {', '.join(tensors)}")
            values = tensors[name].detach()
            self.shapes[name] = values.shape
            default = tuple(values.flatten().tolist())
            parameters.append(Parameter(name, default, scale * (high - low), low, high, len(default)))
        self.parameters = tuple(parameters)

    def loss(self, prediction: Tensor, target: Tensor, values: Values) -> Tensor:
        tensors = {name: values[name].view(shape) for name, shape in self.shapes.items()}
        result: Any = torch.func.functional_call(self.module, tensors, (prediction, target))
        return result  # type: ignore[no-any-return]


class DistanceMixture(ModuleSpace):
    r"""The paper's ten weights of functions of a distance (ALA, Eq. 9), in [0, 1].

    The prediction is embeddings ``[M, D]``, the target a class per sample ``[M]``; see
    :class:`lossmeta.losses.DistanceMixtureLoss`, whose mean functions are the derivatives in the weights and so the
    statistics.

    Args:
        options: of that loss.

    Example:
        >>> space = lossmeta.ala.DistanceMixture()
        >>> space.parameters[0].defaults
        (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(DistanceMixtureLoss(**{"device": "cpu", **options}), {"phi": (0.0, 1.0)})


class FocalWeighting(ModuleSpace):
    r"""The paper's two temperatures of a soft hardest-pair loss (ALA, Eq. 10), in [0.1, 10] and 1 by default.

    The prediction is embeddings ``[M, D]``, the target a class per sample ``[M]``; see
    :class:`lossmeta.losses.FocalWeightedLoss`.

    Args:
        options: of that loss.

    Example:
        >>> space = lossmeta.ala.FocalWeighting(offset=0.5)
        >>> space.parameters[0].defaults
        (1.0, 1.0)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            FocalWeightedLoss(**{"device": "cpu", **options}), {"phi": (0.1, 10.0)}, scale=0.1 / 9.9
        )
