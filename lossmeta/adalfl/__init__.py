"""AdaLFL: losses learned while the model trains, by the gradient of what each step achieved."""

from lossmeta.adalfl.differentiable_step import MetaGradient, choose_backend, meta_gradient
from lossmeta.adalfl.initialize import initialize
from lossmeta.adalfl.online import OnlineLearner, StepReport

__all__ = ["MetaGradient", "OnlineLearner", "StepReport", "choose_backend", "initialize", "meta_gradient"]
