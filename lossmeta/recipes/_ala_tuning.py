"""Rows whose settings are chosen on other seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from lossmeta.experiments import Method, Tuned
from lossmeta.recipes._ala_images import Setting
from lossmeta.recipes._ala_methods import TUNING_SEEDS
from lossmeta.recipes._ala_tasks import SELECTION

Make = Callable[..., Method]
Then = Callable[[Method], Method]


def tuned(
    label: str,
    setting: Setting,
    make: Make,
    grid: Mapping[str, tuple[float, ...]],
    then: Then | None = None,
) -> Method | Tuned:
    """The method at the settings that suit it best on other seeds, by the validation part.

    Where there is only one setting, the method at that one.

    Args:
        label: of the row.
        setting: the size.
        make: makes a candidate, called with a label and what the grid has.
        grid: values by name; all combinations are tried.
        then: makes the row of the best candidate, where that is another method.
    """
    candidates = []
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        text = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in given.items())
        candidates.append(make(f"{make('', **given).settings['kind']}, {text}", **given))
    if len(candidates) == 1:
        only = then(candidates[0]) if then else candidates[0]
        return Method(label, only.train, only.settings)
    return Tuned(label, tuple(candidates), SELECTION.name, TUNING_SEEDS[: setting.tuning_seeds], then)
