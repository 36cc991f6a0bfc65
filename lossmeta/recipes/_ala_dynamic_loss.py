"""Learning to teach with dynamic loss functions (L2T-DLF): Phi by the gradient of the validation loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.optim import Adam

from lossmeta.adalfl import DivergedError, OnlineLearner
from lossmeta.experiments import Diverged, Method, Trial
from lossmeta.losses import ParametricCrossEntropy
from lossmeta.recipes._ala_images import ImageFit
from lossmeta.recipes._ala_tasks import CLASSES, SEARCH, batches


def learner_of(fit: ImageFit, meta_rate: float) -> OnlineLearner:
    r"""Trains by Eq. 6, and moves :math:`\Phi` by Adam after every step.

    It follows the gradient of the cross-entropy of a validation batch through that step.
    """
    like = fit.drawn.train[0]
    loss = ParametricCrossEntropy(CLASSES, learnable=True, device=like.device, dtype=like.dtype)
    moving = Adam(loss.parameters(), meta_rate)
    return OnlineLearner(
        fit.model, fit.optimizer, loss, F.cross_entropy, meta_optimizer=moving, backend="double_backward"
    )


def dynamic_loss(label: str, rate: float, meta_rate: float) -> Method:
    r"""Training under a matrix that is learned by gradient while the network trains (Wu et al., 2018).

    The loss is that paper's, Eq. 6 of ALA. So is what :math:`\Phi` follows: the gradient of a smooth stand-in of the
    metric, on validation data, through training steps. There a network, the teacher, maps the state of the training to
    :math:`\Phi`, and learns from whole trainings, through all of their steps at once. Here :math:`\Phi` itself is
    learned. It starts as the identity, and each gradient goes through one step alone. The stand-in is the
    cross-entropy. Entries are neither bounded nor symmetric.

    Args:
        label: of the row.
        rate: learning rate of the network.
        meta_rate: of Adam for :math:`\Phi`.
    """

    def train(trial: Trial) -> dict[str, float]:
        fit = ImageFit(trial, rate)
        learner = learner_of(fit, meta_rate)
        held_out = batches(fit.drawn.valid, trial.random_seed(SEARCH), fit.steps, fit.batch)
        try:
            for (_, x, y), valid in zip(fit.batches(), held_out, strict=True):
                learner.step((x, y), valid)
        except DivergedError as error:
            raise Diverged from error
        (phi,) = learner.loss.parameters()
        far = (phi.detach() - torch.eye(CLASSES, device=phi.device, dtype=phi.dtype)).abs().mean().item()
        return {**fit.measures(), "distance from the identity": far}

    return Method(label, train, {"kind": "L2T-DLF", "rate": rate, "meta_rate": meta_rate})
