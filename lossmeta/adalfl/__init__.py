"""AdaLFL: losses learned while the model trains, by the gradient of what each step achieved."""

from lossmeta.adalfl.averaged_weights import AveragedWeights
from lossmeta.adalfl.choice_of_backend import choose_backend
from lossmeta.adalfl.clean_learner import CleanLearner, learn_with_clean
from lossmeta.adalfl.initialization import initialize, initialize_learning_rate
from lossmeta.adalfl.learned_loss import PAPER_META_RATE, DivergedError
from lossmeta.adalfl.meta_gradient import meta_gradient
from lossmeta.adalfl.meta_schedule import seldom_later
from lossmeta.adalfl.online import OnlineLearner
from lossmeta.adalfl.plot import plot_loss
from lossmeta.adalfl.records import MetaGradient, Snapshot, StepReport
from lossmeta.adalfl.relabelling import Relabelling
from lossmeta.adalfl.verification import BackendError

__all__ = [
    "PAPER_META_RATE",
    "AveragedWeights",
    "BackendError",
    "CleanLearner",
    "DivergedError",
    "MetaGradient",
    "OnlineLearner",
    "Relabelling",
    "Snapshot",
    "StepReport",
    "choose_backend",
    "initialize",
    "initialize_learning_rate",
    "learn_with_clean",
    "meta_gradient",
    "plot_loss",
    "seldom_later",
]
