"""What the AdaLFL paper reports, mean and standard deviation of 10 runs.

Tables 1 to 6 have mean squared errors or error rates on the test set, Table 7 hours on an RTX A5000.
"""

from __future__ import annotations

Row = tuple[float | None, float | None]

TASKS = (
    "Crime + MLP",
    "Diabetes + MLP",
    "California + MLP",
    "MNIST + Logistic",
    "MNIST + MLP",
    "MNIST + LeNet-5",
    "CIFAR-10 + VGG-16",
    "CIFAR-10 + AllCNN-C",
    "CIFAR-10 + ResNet-18",
    "CIFAR-10 + SqueezeNet",
    "CIFAR-100 + WRN 28-10",
    "SVHN + WRN 16-8",
)

# One line per column of a table, in the order of TASKS.
_COLUMNS = {
    "baseline": """.0274 .0017  .0432 .0013  .0157 .0001  .0766 .0009  .0203 .0006  .0125 .0007
        .1036 .0049  .1030 .0062  .0871 .0057  .1226 .0080  .3046 .0087  .0512 .0043""",
    "offline": """.0270 .0025  .0430 .0012  .0276 .0058  .0710 .0010  .0185 .0004  .0094 .0005
        .1024 .0055  .1015 .0055  .0883 .0041  .1162 .0052  .3108 .0075  .0500 .0034""",
    "adalfl": """.0263 .0023  .0420 .0014  .0151 .0007  .0697 .0010  .0184 .0006  .0091 .0004
        .0903 .0032  .0835 .0050  .0788 .0035  .1083 .0049  .2668 .0283  .0441 .0014""",
    "meta-lr": """.0274 .0018  .0463 .0013  .0154 .0004  .0756 .0008  .0192 .0007  .0097 .0013
        .0966 .0087  .0656 .0017  .0866 .0056  .1173 .0065  .2288 .0019  .0367 .0007""",
    "quadratic": """- -  - -  - -  .0810 .0281  .0205 .0008  .1357 .0728
        .1442 .0025  .1086 .0100  .1133 .0033  .1506 .0092  .2952 .0220  .0494 .0000""",
    "cubic": """.0254 .0015  .0418 .0041  .0783 .0167  .0707 .0009  .0185 .0007  .0096 .0006
        .1439 .0027  .0908 .0020  .1309 .0070  .1367 .0041  .2934 .0621  .0431 .0000""",
    "offline, ReLU": """.0270 .0025  .0481 .0020  .0346 .0087  .0782 .0117  .0167 .0021  .0095 .0006
        .1034 .0058  .1087 .0174  .0972 .0259  .1282 .0086  .3114 .0063  .0500 .0034""",
    "offline, smooth": """.0274 .0029  .0430 .0012  .0276 .0058  .0710 .0015  .0185 .0004  .0094 .0005
        .1024 .0055  .1015 .0055  .0883 .0041  .1162 .0052  .3108 .0075  .0502 .0032""",
    "training objective": ".0267 .0022  .0468 .0016" + "  - -" * 10,
    "validation objective": ".0265 .0021  .0420 .0014" + "  - -" * 10,
    "hours, baseline": ".01 - .01 - .01 - .06 - .06 - .10 - 1.50 - 1.41 - 1.81 - 1.72 - 8.81 - 7.32 -",
    "hours, offline": ".03 - .03 - .03 - .31 - .32 - .38 - 1.85 - 1.72 - 2.18 - 2.02 - 10.3 - 7.61 -",
    "hours, online": ".05 - .05 - .05 - .55 - .56 - .67 - 5.56 - 5.53 - 8.38 - 7.88 - 50.49 - 24.75 -",
}
_ALLCNN = {"inner 1": ".1015 .0055", "inner 5": ".0978 .0052", "inner 10": ".0985 .0050"} | {
    "inner 15": ".0989 .0049",
    "inner 20": ".0974 .0061",
}


def _rows(text: str) -> list[Row]:
    numbers = [None if word == "-" else float(word) for word in text.split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


REPORTED: dict[str, dict[str, Row]] = {
    column: dict(zip(TASKS, _rows(text), strict=True)) for column, text in _COLUMNS.items()
} | {column: {"CIFAR-10 + AllCNN-C": _rows(text)[0]} for column, text in _ALLCNN.items()}


def reported(column: str | None, task: str) -> str:
    """The paper's entry as text; empty where it has none."""
    mean, deviation = REPORTED.get(column or "", {}).get(task, (None, None))
    if mean is None:
        return ""
    return f"{mean:g}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"
