"""Table 2 of the ALA paper: the area under the precision-recall curve on CIFAR-10."""

from __future__ import annotations

from functools import partial

from lossmeta.experiments import Method, Tuned
from lossmeta.recipes import _ala_rules as rules
from lossmeta.recipes._ala_controlled import Adaptive
from lossmeta.recipes._ala_curves import watch_first_seed
from lossmeta.recipes._ala_images import ImageFit, Setting
from lossmeta.recipes._ala_methods import population
from lossmeta.recipes._ala_phi import draw_class_correlations
from lossmeta.recipes._ala_rules import by_rule
from lossmeta.recipes._ala_tables import PaperTable
from lossmeta.recipes._ala_tasks import AUCPR
from lossmeta.recipes._ala_tuning import Make, tuned
from lossmeta.recipes.papers import ala as paper

PLAIN = "cross-entropy"
SINGLE, MULTI = "ALA, single network", "ALA, several networks"
LEGEND = """\
AUCPR: average precision of each class against the rest, and of the classes the mean. The two losses for areas under \
curves rank by their scores, the others by probabilities. Settings of each row are chosen by the validation part of \
other seeds: the learning rate, for the controller also the step of Phi. Validation rows choose settings and the \
best of several networks, and are what controller and population see. Random reward: the same controller, whose \
reward is drawn by chance. Phi >= 0: the same controller, which cannot go below 0 off the diagonal. The last rows are \
this library's own population, which adapts the generalised cross-entropy's q, label smoothing and the learning \
rate, with and without the copy that it trains under the plain loss. Paper: the model of Eban et al. \
(2017), 40,000 rows."""


def rows_of(setting: Setting) -> list[Method | Tuned]:
    plain, bounded = {"rate": setting.rates}, {"rate": setting.bounded_rates}
    moving = bounded | {"step_size": setting.step_sizes}
    children = setting.children

    def rule(kind: type[rules.Rule]) -> Make:
        return partial(by_rule, kind=kind)

    single = Adaptive().method
    chance, merging = Adaptive(reward="chance").method, Adaptive("merging").method
    entropy = rule(rules.CrossEntropy)
    return [
        tuned(PLAIN, setting, partial(entropy, watching=partial(watch_first_seed, row=PLAIN)), plain),
        tuned(
            f"{PLAIN}, several networks",
            setting,
            entropy,
            plain,
            lambda best: by_rule("", rules.CrossEntropy, best.settings["rate"], networks=children),
        ),
        tuned("pairwise AUCROC loss", setting, rule(rules.PairwiseAUCROC), bounded),
        tuned("AUCPR loss", setting, rule(rules.AUCPR), bounded),
        tuned("Phi = identity (Eq. 6)", setting, rule(rules.Matrix), bounded),
        tuned(
            SINGLE,
            setting,
            partial(single, watching=partial(watch_first_seed, row=SINGLE), finally_=draw_class_correlations),
            moving,
        ),
        tuned(f"{SINGLE}, random reward", setting, chance, moving),
        tuned(f"{SINGLE}, Phi >= 0", setting, merging, moving),
        tuned(
            MULTI,
            setting,
            single,
            moving,
            lambda best: Adaptive(children=children).method(
                "", best.settings["rate"], best.settings["step_size"]
            ),
        ),
        tuned(
            "our Population: Robust * Smoothing",
            setting,
            entropy,
            plain,
            lambda best: population("", best.settings["rate"], new_fit=ImageFit),
        ),
        tuned(
            "our Population, no plain copy",
            setting,
            entropy,
            plain,
            lambda best: population("", best.settings["rate"], fallback=False, new_fit=ImageFit),
        ),
    ]


REPORTED = {
    PLAIN: paper.AUCPR["cross-entropy"],
    "pairwise AUCROC loss": paper.AUCPR["pairwise AUCROC"],
    "AUCPR loss": paper.AUCPR["AUCPR"],
    MULTI: paper.AUCPR["ALA"],
}

RECIPES = (
    PaperTable(
        "ala-cifar10-aucpr",
        "ALA, Table 2: the area under the precision-recall curve on CIFAR-10",
        AUCPR,
        rows_of,
        (PLAIN, SINGLE, MULTI),
        LEGEND,
        REPORTED,
    ),
)
