"""AdaLFL: losses learned while the model trains, by the gradient of what each step achieved."""

from lossmeta.adalfl.differentiable_step import DivergedError, MetaGradient, choose_backend, meta_gradient
from lossmeta.adalfl.initialize import initialize, initialize_learning_rate
from lossmeta.adalfl.online import OnlineLearner, Snapshot, StepReport
from lossmeta.adalfl.plot import plot_loss

__all__ = [
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
