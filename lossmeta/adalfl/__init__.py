"""AdaLFL: losses learned while the model trains, by the gradient of what each step achieved."""

from lossmeta.adalfl.backends import choose_backend
from lossmeta.adalfl.differentiable_step import MetaGradient, meta_gradient
from lossmeta.adalfl.initialization import initialize, initialize_learning_rate
from lossmeta.adalfl.learned_loss import DivergedError
from lossmeta.adalfl.online import OnlineLearner, Snapshot, StepReport
from lossmeta.adalfl.plot import plot_loss
from lossmeta.adalfl.verification import BackendError

__all__ = [
    "BackendError",
    "DivergedError",
    "MetaGradient",
    "OnlineLearner",
    "Snapshot",
    "StepReport",
    "choose_backend",
    "initialize",
    "initialize_learning_rate",
    "meta_gradient",
    "plot_loss",
]
