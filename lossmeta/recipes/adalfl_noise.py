"""AdaLFL where labels are partly wrong: a loss that is learned from a few right ones, and its rivals."""

from __future__ import annotations

from lossmeta.experiments import Task
from lossmeta.recipes import _noise_methods as methods
from lossmeta.recipes import _noise_tasks as tasks
from lossmeta.recipes._clean_recipe import LEARNED, CleanRecipe

ROWS = (
    methods.clean_alone_tuned("clean samples alone"),
    methods.tuned("cross-entropy", methods.cross_entropy, clean_weight=(0.0, 1.0)),
    methods.tuned("label smoothing", methods.smoothed, smoothing=(0.3,)),
    methods.tuned("bootstrapping", methods.bootstrapped, bootstrap=(0.8,)),
    methods.tuned("generalised cross-entropy", methods.generalized, q=(0.7, 0.9)),
    methods.tuned("symmetric cross-entropy", methods.symmetric, beta=(3.0, 10.0)),
    methods.tuned("gold loss correction", methods.gold_corrected, share=(0.06, 0.25)),
    methods.learned("learned flips, nothing tuned", methods.flips),
    methods.learned("learned weights, nothing tuned", methods.weights),
    methods.drawn_labels("drawn labels, nothing tuned"),
    methods.without_clean("learned loss, no clean samples, nothing tuned"),
    methods.learned("learned loss, given labels, nothing tuned", relabel=False),
    methods.learned(LEARNED),
)
LEGEND = """\
A seed draws rows, wrong labels, weights and the batches of wrong labels, the same for all rows. Clean samples have
labels that are known to be right, as many of each class; every row may use them. Each fixed loss has the learning rate,
the weight decay and the parameter that are best on two other seeds, by a selection part of right labels that trains
nothing: of a grid, and then of what lies beside the best, one step at a time, until nothing is better. Its stop, the
averaging of its weights and a last stage on the clean samples are chosen on each seed by that part.
Clean batches are in every step of it; cross-entropy is tried without them too. The rows of which nothing is tuned have
the defaults of `learn_with_clean` at a learning rate of 0.03 and a weight decay of 0.005, no stop, and do not see the
selection part. Flips and weights are `TransitionLoss` and `LossWeighting` in the place of its default loss; drawn
labels are cross-entropy on the labels that it draws; given labels, its default loss without drawing any; no clean
samples, its default where a tenth of the samples with wrong labels teach the loss, in the place of clean ones. The test
part decides nothing. Differences are to the learned loss, paired by seed."""


def all_tasks(steps: int | None) -> list[Task]:
    noises = (*tasks.UNIFORM, *tasks.PAIRS)
    pairs = [(source, noise) for source in tasks.SOURCES for noise in noises]
    pairs += [(tasks.CIFAR10, tasks.ALIKE), *((source, tasks.NONE) for source in tasks.SOURCES)]
    return [tasks.task(source, noise, steps) for source, noise in pairs]


RECIPE = CleanRecipe(
    "adalfl-noise",
    "AdaLFL: labels that are partly wrong, a loss learned from a few right ones, and tuned rivals",
    all_tasks,
    ROWS,
    LEGEND,
)
RECIPES = (RECIPE,)
"""Ways to train on labels that are partly wrong, with a few that are right."""
