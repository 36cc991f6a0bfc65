"""Table 1 of the ALA paper: the classification error on CIFAR-10, with the comparisons of Table S3."""

from __future__ import annotations

from functools import partial

from lossmeta.experiments import Method, Tuned
from lossmeta.recipes import _ala_rules as rules
from lossmeta.recipes._ala_controlled import Adaptive
from lossmeta.recipes._ala_curves import watch_first_seed
from lossmeta.recipes._ala_dynamic_loss import dynamic_loss
from lossmeta.recipes._ala_images import ImageFit, Setting
from lossmeta.recipes._ala_learning_to_teach import learning_to_teach
from lossmeta.recipes._ala_methods import population
from lossmeta.recipes._ala_pbt import population_based_training
from lossmeta.recipes._ala_phi import draw_class_correlations
from lossmeta.recipes._ala_rules import by_rule
from lossmeta.recipes._ala_tables import PaperTable
from lossmeta.recipes._ala_tasks import CLEAN
from lossmeta.recipes._ala_tuning import Make, Then, tuned
from lossmeta.recipes.papers import ala as paper

PLAIN = "cross-entropy"
SINGLE, MULTI = "ALA, single network", "ALA, several networks"
LEGEND = """\
All rows train the same network on the same batches. Settings of each row are chosen by the validation part of \
other seeds: the learning rate, for the bandit and the controller also the step of Phi (0.1 in the paper, 0.01 \
or 0.001), for L-Softmax the floor of its lambda, for L2T-DLF the rate of Phi. Validation rows choose settings \
and the best of several networks, and are what controller, bandit, populations, the teacher of L2T and Phi of \
L2T-DLF see; one row trains on them too. L2T: a teacher chooses the samples of each batch, and has learned from \
50 other trainings how soon they reach a validation error; with a reward drawn by chance; or not taught, which \
is a choice by chance. L2T-DLF: Phi follows the gradient of the validation batches' cross-entropy through each \
step. Several networks: each with other first weights, the best one on the validation part is reported, in four \
rows that may be compared with each other. Random reward: the same controller, whose reward is drawn by chance. \
Phi >= 0: the same controller, which cannot go below 0 off the diagonal. Random matrix: the identity with noise \
of 0.1, drawn anew after every window. Confusions: Eq. 7 as they stand, or the probabilities that they stand \
for. The last rows are this library's own population, which adapts the generalised cross-entropy's q, label \
smoothing and the learning rate, with and without the copy that it trains under the plain loss. Paper: \
ResNet-32 on 32 x 32 images and 40,000 rows, where rows without a controller train on 50,000."""


def rows_of(setting: Setting) -> list[Method | Tuned]:
    plain, bounded = {"rate": setting.rates}, {"rate": setting.bounded_rates}
    moving = bounded | {"step_size": setting.step_sizes}
    children = setting.children
    taught = partial(learning_to_teach, episodes=setting.episodes, teacher_rate=setting.teacher_rate)

    def rule(kind: type[rules.Rule]) -> Make:
        return partial(by_rule, kind=kind)

    single = Adaptive().method
    chance, merging = Adaptive(reward="chance").method, Adaptive("merging").method

    def several(adaptive: Adaptive) -> Then:
        return lambda best: adaptive.method("", best.settings["rate"], best.settings["step_size"])

    def searching(**options: bool) -> Then:
        return lambda best: population("", best.settings["rate"], fallback=False, new_fit=ImageFit, **options)

    entropy = rule(rules.CrossEntropy)
    return [
        tuned(PLAIN, setting, partial(entropy, watching=partial(watch_first_seed, row=PLAIN)), plain),
        tuned(
            f"{PLAIN}, validation rows too",
            setting,
            entropy,
            plain,
            lambda best: by_rule("", rules.CrossEntropy, best.settings["rate"], with_validation=True),
        ),
        tuned("self-paced learning", setting, rule(rules.SelfPaced), plain),
        tuned(
            "L-Softmax, m = 2",
            setting,
            rule(rules.LargeMargin),
            plain | {"least_ease": setting.least_eases},
        ),
        tuned("L2T", setting, taught, plain),
        tuned(
            "L2T, random reward",
            setting,
            taught,
            plain,
            lambda best: taught("", best.settings["rate"], reward="chance"),
        ),
        tuned("L2T, teacher not taught", setting, partial(learning_to_teach, episodes=0), plain),
        tuned("L2T-DLF", setting, dynamic_loss, bounded | {"meta_rate": setting.meta_rates}),
        tuned("Phi = identity (Eq. 6)", setting, rule(rules.Matrix), bounded),
        *(
            tuned(
                f"the same, {entry:+g} elsewhere",
                setting,
                rule(rules.OffDiagonal),
                bounded | {"entry": (entry,)},
            )
            for entry in (-0.03, 0.03)
        ),
        tuned("random matrix Phi", setting, rule(rules.RandomMatrix), bounded),
        tuned("Phi = confusions", setting, rule(rules.ConfusionMatrix), bounded),
        tuned("Phi = confusions, probabilities", setting, rule(rules.LikenessMatrix), bounded),
        tuned("contextual bandit", setting, rule(rules.Bandit), moving),
        tuned(
            SINGLE,
            setting,
            partial(single, watching=partial(watch_first_seed, row=SINGLE), finally_=draw_class_correlations),
            moving,
        ),
        tuned(f"{SINGLE}, step 0.1", setting, single, bounded | {"step_size": (1.0,)}),
        tuned(f"{SINGLE}, random reward", setting, chance, moving),
        tuned(f"{SINGLE}, Phi >= 0", setting, merging, moving),
        tuned(
            f"{PLAIN}, several networks",
            setting,
            entropy,
            plain,
            lambda best: by_rule("", rules.CrossEntropy, best.settings["rate"], networks=children),
        ),
        tuned(
            "population-based training",
            setting,
            rule(rules.Matrix),
            bounded,
            lambda best: population_based_training("", best.settings["rate"], children),
        ),
        tuned(MULTI, setting, single, moving, several(Adaptive(children=children))),
        tuned(
            f"{MULTI}, random reward",
            setting,
            chance,
            moving,
            several(Adaptive(children=children, reward="chance")),
        ),
        tuned(
            "our Population: Robust * Smoothing",
            setting,
            entropy,
            plain,
            lambda best: population("", best.settings["rate"], new_fit=ImageFit),
        ),
        tuned("our Population, no plain copy", setting, entropy, plain, searching()),
        tuned("no plain copy, learning rate fixed", setting, entropy, plain, searching(learning_rate=False)),
    ]


REPORTED = {
    PLAIN: paper.ERROR["cross-entropy"],
    "self-paced learning": paper.ERROR["self-paced"],
    "L-Softmax, m = 2": paper.ERROR["L-Softmax"],
    "L2T": paper.ERROR["L2T"],
    "L2T-DLF": paper.ERROR["L2T-DLF"],
    "random matrix Phi": paper.ERROR["random matrix"],
    "Phi = confusions": paper.ERROR["confusion matrix"],
    "contextual bandit": paper.ERROR["contextual bandit"],
    "population-based training": paper.ERROR["PBT"],
    SINGLE: paper.ERROR["single-network"],
    MULTI: paper.ERROR["multi-network"],
}

RECIPES = (
    PaperTable(
        "ala-cifar10-error",
        "ALA, Table 1: the classification error on CIFAR-10",
        CLEAN,
        rows_of,
        (PLAIN, SINGLE, MULTI),
        LEGEND,
        REPORTED,
    ),
)
