"""The meta-gradient of one training step (AdaLFL, Eq. 5 to 9)."""

from __future__ import annotations

import warnings

from torch import nn
from torch.optim import Optimizer

from lossmeta._batches import Batch, Loss, Output
from lossmeta.adalfl.differentiable_step import DifferentiableStep
from lossmeta.adalfl.records import MetaGradient, StepOptions


def meta_gradient(
    model: nn.Module,
    optimizer: Optimizer,
    loss: nn.Module,
    task_loss: Loss,
    train_batch: Batch,
    valid_batch: Batch,
    *,
    backend: str = "auto",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    approximate: bool = False,
    learning_rates: bool = False,
    output: Output = None,
) -> MetaGradient:
    r"""Takes one training step with ``loss`` and differentiates what it achieved (AdaLFL, Eq. 5 to 9).

    For :math:`\theta' = \theta - \mathrm{step}(g)`, :math:`g = \partial_\theta \mathcal M_\phi(y, f_\theta(x))`, with
    :math:`v = \nabla \mathcal L_T(\theta')` on the validation batch,
    :math:`w = (\partial\,\mathrm{step}/\partial g)^\top v` and :math:`u = J_\theta f\, w`,

    .. math:: \frac{\partial \mathcal L_T(\theta')}{\partial \phi} =
              - \frac{\partial}{\partial \phi} \left\langle \frac{\partial \mathcal M_\phi}{\partial f}, u \right\rangle

    so that only the loss needs second derivatives. Weights, optimizer state, buffers and random state end as one plain
    training step leaves them; if anything fails, as they were.

    The passes of a step must be one function. Random numbers of torch, Python, NumPy and of generators that modules
    own are drawn again; buffers and plain attributes are brought back. A ``torch.autocast`` context around the call
    counts as the option of that dtype of :class:`OnlineLearner`. Then :math:`u` is compared with what a repeated
    training pass says of it; see ``backend``.

    Args:
        model: called as ``model(inputs)``, or ``model(*inputs)`` and ``model(**inputs)`` for a sequence or mapping.
        optimizer: of all the model's trainable parameters and no others. Any that moves each weight by its own
            gradient; SGD, Adam, AdamW, RMSprop and Adagrad cost least.
        loss: module ``loss(prediction, target) -> []`` with the parameters :math:`\phi`.
        task_loss: function of the same arguments, what the validation batch is judged by.
        train_batch: inputs and target of the step.
        valid_batch: inputs and target of the task loss.
        backend: how :math:`u` is computed. ``"double_backward"``: exact, through the graph of the training step.
            ``"jvp"``: exact, by forward-mode differentiation; least memory. ``"finite_difference"``: one forward pass
            more, or two where the model has no ReLU or max-pooling; also for models that forward mode does not know,
            such as compiled ones. Its relative error in float32 is about 1e-3, with two passes 1e-5; see
            docs/results/finite-differences.md for the worst. Under autocast it computes in float32, with one pass more;
            a model of bfloat16 weights costs it a tenth and more. ``"auto"``: see :func:`choose_backend`; where that
            one fails, or does not agree with the backward pass, another, with a warning.
        clip_norm: largest norm of the whole gradient; larger ones are scaled down.
        clip_value: largest absolute value of an element of the gradient.
        approximate: take the step of an optimizer that is not elementwise for ``lr * g``.
        learning_rates: also differentiate with respect to the learning rates of the optimizer's groups.
        output: what of the model's output is the prediction: a key, a position, or a function of it. ``None`` takes a
            tensor as it is, what is called ``logits``, or the only tensor.

    Raises:
        ValueError: for a model and an optimizer whose parameters differ, a loss of the wrong shape, and a prediction in
            float16: a ``GradScaler`` would not see these backward passes. bfloat16 needs none.
        TypeError: for an optimizer of another kind, and a prediction that is no tensor.
        DivergedError: if the learned loss or its slope is not finite, before the step.
        BackendError: if the meta-gradient cannot be computed in the way that was asked for, or in any.

    Example:
        >>> model, loss = torch.nn.Linear(4, 3), lossmeta.losses.LossNetwork()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> result = meta_gradient(model, optimizer, loss, torch.nn.functional.cross_entropy, *batches)
        >>> [g.shape for g in result.gradients]
        [torch.Size([40, 2]), torch.Size([40, 40]), torch.Size([1, 40])]
    """
    options = StepOptions(backend, clip_norm, clip_value, approximate, learning_rates, output=output)
    step = DifferentiableStep(model, optimizer, loss, task_loss, options)
    result = step([train_batch], valid_batch)
    step.forget()
    if result.nearly_nothing:
        warnings.warn(
            f"AdaLFL: the first step of {type(optimizer).__name__} hardly depends on the size of the gradient, so that "
            "nearly nothing is learned from it; start with SGD, or let the optimizer take some steps first",
            stacklevel=2,
        )
    return result
