"""Ablations of the ALA paper: its Tables 4, 5 and S4, and Figures 3 and S1, on CIFAR-10."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from lossmeta.ala.policy import PARTS
from lossmeta.experiments import Method, Tuned
from lossmeta.recipes._ala_controlled import Adaptive
from lossmeta.recipes._ala_images import TRAINING, Setting
from lossmeta.recipes._ala_reward_design import reward_design
from lossmeta.recipes._ala_rules import CrossEntropy, Matrix, by_rule
from lossmeta.recipes._ala_tables import PaperTable
from lossmeta.recipes._ala_tasks import CLEAN
from lossmeta.recipes._ala_tuning import tuned
from lossmeta.recipes.papers import ala as paper

DEFAULT = "ALA, default"
LEGEND = """\
The default: one network, a policy of two hidden layers of 32 units, which sees 10 time steps, T = 1, rewarded by \
the validation error. Every other row of the controller differs in what it is called by, and trains at the learning \
rate and the step of Phi that suit the default best on other seeds; cross-entropy and the fixed identity have rates \
of their own. Several networks share a policy: the first one of them, so that only the policy can be better, or the \
best one on the validation part. In ala-ablations-merging Phi cannot go below 0 off the diagonal. Policy not \
trained: as it is drawn at first. Second run: begins with the policy that a first run with another network on the \
same rows has learned, frozen or learning on. From digits: a frozen policy learned on 8 x 8 digits. Paper: \
ResNet-32, 10 networks; Table S4 only has what a row adds to the default's error."""


def rows_of(space: str, setting: Setting) -> list[Method | Tuned]:
    grid = {"rate": setting.bounded_rates, "step_size": setting.step_sizes}

    def default(label: str, rate: float, step_size: float) -> Method:
        return Adaptive(space).method(label, rate, step_size)

    def row(label: str, adaptive: Adaptive) -> Method | Tuned:
        def then(best: Method) -> Method:
            return replace(adaptive, space=space).method(
                "", best.settings["rate"], best.settings["step_size"]
            )

        return tuned(label, setting, default, grid, then)

    def without(part: str) -> Adaptive:
        return Adaptive(options={"parts": tuple(other for other in PARTS if other != part)})

    several = setting.children
    return [
        tuned(
            "cross-entropy",
            setting,
            lambda label, **given: by_rule(label, CrossEntropy, **given),
            {"rate": setting.rates},
        ),
        tuned(
            "Phi = identity (Eq. 6)",
            setting,
            lambda label, **given: by_rule(label, Matrix, **given),
            {"rate": setting.bounded_rates},
        ),
        row("policy not trained", Adaptive(learn=False)),
        row("random reward", Adaptive(reward="chance")),
        row("policy of 1 layer", Adaptive(options={"hidden": (32,)})),
        row("policy of 3 layers", Adaptive(options={"hidden": (32, 32, 32)})),
        row("without history", without("history")),
        row("without change", without("change")),
        row("without values", without("values")),
        row("without progress", without("progress")),
        row("T = 2", Adaptive(options={"episode": 2})),
        row("T = 5", Adaptive(options={"episode": 5})),
        row(f"{several} networks, the first", Adaptive(children=several, best=False)),
        row(f"{several} networks, the best", Adaptive(children=several)),
        row("rewarded by validation loss", Adaptive(reward="loss")),
        row("rewarded by training error", Adaptive(rewarded_on="train")),
        row("rewarded by training loss", Adaptive(reward="loss", rewarded_on="train")),
        row("second run, policy frozen", Adaptive(policy="first run", learn=False)),
        row("second run, policy learns on", Adaptive(policy="first run")),
        row("policy from digits, frozen", Adaptive(policy="digits", learn=False)),
        row(DEFAULT, Adaptive()),
    ]


REPORTED = {
    "cross-entropy": paper.ABLATIONS["cross-entropy"],
    "policy of 1 layer": paper.ABLATIONS["1 layer"],
    "policy of 3 layers": paper.ABLATIONS["3 layers"],
    "without history": paper.ABLATIONS["without history"],
    "without change": paper.ABLATIONS["without change"],
    "without values": paper.ABLATIONS["without values"],
    "without progress": paper.ABLATIONS["without progress"],
    "second run, policy frozen": paper.ABLATIONS["second run"],
    "second run, policy learns on": paper.ABLATIONS["second run, finetuned"],
    DEFAULT: paper.ABLATIONS["default"],
}

# Figure 3: two losses that stay, and what the controller is rewarded by.
REWARDS = {
    "cross-entropy": "none: cross-entropy",
    "Phi = identity (Eq. 6)": "none: Eq. 6",
    "random reward": "chance",
    "rewarded by training loss": "training loss",
    "rewarded by training error": "training error",
    "rewarded by validation loss": "validation loss",
    DEFAULT: "validation error",
}

RECIPES = tuple(
    PaperTable(
        name,
        f"ALA, Tables 4, 5, S4 and Figures 3, S1: what the controller needs{remark}",
        CLEAN,
        partial(rows_of, space),
        (DEFAULT,),
        LEGEND,
        REPORTED,
        (TRAINING,),
        {"reward-design.png": partial(reward_design, rows=REWARDS)},
    )
    for name, space, remark in (
        ("ala-ablations", "paper", ""),
        ("ala-ablations-merging", "merging", ", with no negative Phi"),
    )
)
