"""What docs/results says of each situation: the figures behind a recommendation, and nothing that is not there.

The names of losses are strings: this floor lies below the controllers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """Rows of a table in docs/results.

    Attributes:
        page: path in the repository.
        table: its heading.
        measure: its first column of figures.
        rows: label and figure, as they stand there.
    """

    page: str
    table: str
    measure: str
    rows: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        rows = "; ".join(f"{label} {figure}" for label, figure in self.rows)
        return f"{self.page}, {self.table.split(';')[0]}, {self.measure}: {rows}"


@dataclass(frozen=True)
class Advice:
    """What to use in a situation.

    Attributes:
        situation: in words.
        use: names of losses and controllers, or ``"none"``.
        note: what the figures do and do not say.
        evidence: the figures.
    """

    situation: str
    use: str
    note: str
    evidence: tuple[Evidence, ...] = ()


def _ala(table: str, measure: str, *rows: tuple[str, str]) -> Evidence:
    against = f"{measure.removesuffix(' (%)')}: difference to population, 8 children"
    return Evidence("docs/results/ala.md", f"{table}; {against}", measure, rows)


TUNED, POPULATION = "cross-entropy, rate and stop tuned per seed", "population, 8 children"
VALIDATION_TOO = "the first, trained on the validation rows too"
SCHEDULE = "its schedule, on the validation rows too"


def _noise(table: str, *rows: tuple[str, str]) -> Evidence:
    against = f"{table}, 10 seeds; error: difference to {LEARNED}"
    return Evidence("docs/results/adalfl-noise.md", against, "error (%)", rows)


LEARNED = "learned loss, nothing tuned"
WITHOUT_CLEAN = "learned loss, no clean samples, nothing tuned"

QUICKSTART = Evidence(
    "docs/results/quickstart.md",
    "Digits with wrong labels, 10 seeds",
    "error (%)",
    (
        ("cross-entropy", "14.98 ± 2.44"),
        ("cross-entropy, clean batches, tuned", "6.76 ± 0.97"),
        ("generalised cross-entropy, tuned", "5.38 ± 0.73"),
        ("symmetric cross-entropy, tuned", "4.48 ± 1.06"),
        ("learned loss, nothing tuned", "4.00 ± 0.87"),
    ),
)

EVEN_WITH_CLEAN = Advice(
    "wrong labels that follow no pairs of classes, and clean samples",
    "lossmeta.adalfl.learn_with_clean, which learns LossNetwork(residual='cross_entropy', normalize_slope=True)",
    "Measured with 40 % of the labels redrawn, and 100 clean digits or 200 images of MNIST; the rivals' settings, stop "
    "and last stage are chosen by more right labels than these. In the quickstart tuned symmetric cross-entropy is "
    "level with it, and 3.4 points ahead with a small CNN on CIFAR-10, where it needs twenty times the weight decay.",
    (
        _noise(
            "digits: 40% uniform",
            ("cross-entropy", "6.26 ± 1.23"),
            ("generalised cross-entropy", "4.40 ± 0.99"),
            ("symmetric cross-entropy", "4.44 ± 1.38"),
            (LEARNED, "2.82 ± 0.70"),
        ),
        _noise(
            "MNIST, 14 x 14: 40% uniform",
            ("cross-entropy", "12.86 ± 0.55"),
            ("symmetric cross-entropy", "9.34 ± 0.50"),
            (LEARNED, "8.45 ± 0.26"),
        ),
        _noise(
            "CIFAR-10, 16 x 16, CNN: 40% uniform",
            ("cross-entropy", "59.17 ± 2.82"),
            ("symmetric cross-entropy", "56.54 ± 1.49"),
            (LEARNED, "59.95 ± 2.06"),
        ),
        QUICKSTART,
    ),
)
EVEN = Advice(
    "wrong labels that follow no pairs of classes, no clean samples",
    "lossmeta.adalfl.CleanLearner(..., clean_weight=0) with held-out samples like the others for clean ones",
    "The other rows have 100 or 200 clean samples, and more for tuning. With 60 % redrawn it is behind them, and where "
    "wrong labels do follow pairs it fails: checking the labels of 100 samples is worth it.",
    (
        _noise(
            "digits: 40% uniform",
            ("cross-entropy", "6.26 ± 1.23"),
            ("symmetric cross-entropy", "4.44 ± 1.38"),
            (WITHOUT_CLEAN, "4.38 ± 1.66"),
        ),
        _noise(
            "MNIST, 14 x 14: 40% uniform",
            ("cross-entropy", "12.86 ± 0.55"),
            ("symmetric cross-entropy", "9.34 ± 0.50"),
            (WITHOUT_CLEAN, "9.29 ± 0.40"),
        ),
    ),
)
TO_CLASS_WITH_CLEAN = Advice(
    "classes that are taken for certain others, and clean samples",
    "lossmeta.adalfl.learn_with_clean, or lossmeta.losses.gold_transition with ForwardCorrectedLoss",
    "Measured where 40 % of the labels name the next class. Gold loss correction, with its settings and stop chosen by "
    "more right labels, is level on the digits and 0.3 points ahead on MNIST.",
    (
        _noise(
            "digits: 40% to the next class",
            ("cross-entropy", "6.40 ± 1.61"),
            ("gold loss correction", "3.02 ± 0.59"),
            (LEARNED, "2.90 ± 0.99"),
        ),
        _noise(
            "MNIST, 14 x 14: 40% to the next class",
            ("cross-entropy", "12.51 ± 1.29"),
            ("gold loss correction", "8.12 ± 0.35"),
            (LEARNED, "8.38 ± 0.38"),
        ),
    ),
)
TO_CLASS = Advice(
    "classes that are taken for certain others, no clean samples",
    "lossmeta.losses.ForwardCorrectedLoss with the estimated transition",
    "No figure for this stands in docs/results, and the transition is only as good as the model that it comes from.",
)
WRONG_AND_RARE = Advice(
    "wrong labels and rare classes",
    "lossmeta.ala.Population on LogitAdjustment(counts) * Robust(), then its schedule on all rows, validation too",
    "Measured with clean, balanced validation rows. Cross-entropy that trains on those too is ahead of the population "
    "alone, and behind its schedule on the digits and CIFAR-10; on MNIST these two are level.",
    (
        _ala(
            "digits: 20 : 1 and 30 % wrong labels, 10 seeds",
            "balanced error (%)",
            (TUNED, "26.48 ± 5.38"),
            (POPULATION, "22.60 ± 5.38"),
            (VALIDATION_TOO, "10.86 ± 1.19"),
            (SCHEDULE, "9.16 ± 1.81"),
        ),
        _ala(
            "cifar10: 20 : 1 and 30 % wrong labels, 8 seeds",
            "balanced error (%)",
            (TUNED, "73.83 ± 1.62"),
            (POPULATION, "71.65 ± 1.54"),
            (VALIDATION_TOO, "70.73 ± 1.70"),
            (SCHEDULE, "68.99 ± 1.40"),
        ),
    ),
)
RARE = Advice(
    "rare classes",
    "lossmeta.ala.Population on LogitAdjustment(counts), or lossmeta.losses.LogitAdjustedLoss",
    "For metrics in which every class counts alike; where the error over samples is what counts, cross-entropy. "
    "Validation rows that may be trained on are worth as much or more on digits and MNIST. Of LogitAdjustedLoss alone "
    "no figure stands in docs/results.",
    (
        _ala(
            "digits: rare classes, 20 : 1, 10 seeds",
            "worst-class recall (%)",
            (TUNED, "68.00 ± 10.99"),
            (POPULATION, "79.20 ± 4.92"),
            (VALIDATION_TOO, "84.40 ± 4.09"),
        ),
        _ala(
            "cifar10: rare classes, 20 : 1, 8 seeds",
            "worst-class recall (%)",
            (TUNED, "3.75 ± 1.96"),
            (POPULATION, "16.06 ± 1.61"),
            (VALIDATION_TOO, "8.69 ± 4.04"),
        ),
    ),
)
OVERFITTING = Advice(
    "overfitting",
    "lossmeta.tuneloss.OnlineTuner, which learns a regulariser in one run",
    "Stopping in time comes near it where only the loss counts; ten runs with weight decay are level on flowers.",
    (
        Evidence(
            "docs/results/tuneloss.md",
            "flowers, softmax regression, 10 seeds",
            "log loss",
            (
                ("plain", "1.3787 ± 0.0608"),
                ("plain, stopped", "0.7166 ± 0.0193"),
                ("l2, 10 runs", "0.6990 ± 0.0201"),
                ("TuneLoss", "0.6991 ± 0.0204"),
            ),
        ),
        Evidence(
            "docs/results/tuneloss.md",
            "digits, MLP, 10 seeds",
            "log loss",
            (
                ("plain", "0.1365 ± 0.0246"),
                ("plain, stopped", "0.1271 ± 0.0191"),
                ("l2, 10 runs", "0.1208 ± 0.0158"),
                ("TuneLoss", "0.1149 ± 0.0156"),
            ),
        ),
    ),
)
CONFIDENCE = Advice(
    "confidence that is not how often the model is right",
    "none",
    "No loss here has been measured for calibration. A temperature fitted on held-out samples is the usual remedy (Guo "
    "et al., 2017).",
)
NOT_BORNE_OUT = Advice(
    "a model that confuses classes whose labels are right",
    "none",
    "The clean samples show no wrong labels: on them the model is wrong as often. A better model or better inputs "
    "help; cross-entropy stays.",
)
UNINFORMATIVE = Advice(
    "a model that says nothing of the labels",
    "none",
    "No loss can be chosen by such predictions. Look at inputs, labels and training first.",
)
NOTHING = Advice(
    "nothing that a loss would mend",
    "torch.nn.functional.cross_entropy",
    "On clean, balanced data at a tuned learning rate nothing here gains.",
    (
        _ala(
            "mnist: right labels, 10 seeds", "error (%)", (TUNED, "8.83 ± 0.86"), (POPULATION, "9.32 ± 0.85")
        ),
        _ala(
            "cifar10: right labels, 8 seeds",
            "error (%)",
            (TUNED, "63.44 ± 1.55"),
            (POPULATION, "63.47 ± 1.20"),
        ),
    ),
)
