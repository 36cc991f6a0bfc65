"""What is wrong with a data set or a training, and which loss is for that."""

from lossmeta.diagnosis._diagnose import diagnose
from lossmeta.diagnosis._evidence import Evidence
from lossmeta.diagnosis._measures import Balance, CleanComparison, Confidence, Overfitting
from lossmeta.diagnosis._recommendation import Recommendation
from lossmeta.diagnosis._result import Diagnosis
from lossmeta.diagnosis.confident_joint import ConfidentJoint, confident_joint
from lossmeta.diagnosis.folds import out_of_fold

__all__ = [
    "Balance",
    "CleanComparison",
    "Confidence",
    "ConfidentJoint",
    "Diagnosis",
    "Evidence",
    "Overfitting",
    "Recommendation",
    "confident_joint",
    "diagnose",
    "out_of_fold",
]
