"""The documented accuracy of finite differences, docs/results/finite-differences.md, with room for another machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from finite_difference_accuracy import MODELS, RATES, error

TABLE = (Path(__file__).parents[2] / "docs" / "results" / "finite-differences.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODELS)
def test_accuracy_is_as_documented(name: str) -> None:
    (row,) = re.findall(rf"^\| {re.escape(name)} \| \d (.*)\|$", TABLE, re.MULTILINE)
    for rate, cell in zip(RATES, re.findall(r"\| [\d.e-]+, ([\d.e-]+) ", row), strict=True):
        for seed in range(2):
            assert error(MODELS[name], rate, seed) <= 3 * float(cell), (rate, seed)
