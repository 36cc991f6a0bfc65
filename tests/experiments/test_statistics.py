from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lossmeta.experiments.statistics import compare, summary

finite = st.floats(-1e6, 1e6, width=32)
pairs = st.lists(st.tuples(finite, finite), min_size=2, max_size=12)


@given(pairs)
def test_t_test_and_interval_are_scipys(values: list[tuple[float, float]]) -> None:
    a, b = zip(*values, strict=True)
    found = compare(a, b, higher_is_better=True)
    differences = np.subtract(a, b)
    assert found.difference == pytest.approx(differences.mean(), rel=1e-9, abs=1e-9)
    assert found.deviation == pytest.approx(differences.std(ddof=1), rel=1e-9, abs=1e-9)
    if found.t_test is not None:
        expected = stats.ttest_rel(a, b)
        assert found.t_test == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
        assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-6, abs=1e-6)


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=9))
def test_wilcoxon_is_the_permutation_test(differences: list[int]) -> None:
    found = compare(differences, [0] * len(differences), higher_is_better=True).wilcoxon
    signed = np.array([d for d in differences if d])
    if not len(signed):
        assert found is None
        return
    ranks = stats.rankdata(abs(signed))
    signs = np.array(np.meshgrid(*[[0, 1]] * len(signed))).reshape(len(signed), -1)
    sums, seen = ranks @ signs, ranks @ (signed > 0)
    tail = min((sums <= seen + 1e-9).mean(), (sums >= seen - 1e-9).mean())
    assert found == pytest.approx(min(1, 2 * tail))


@pytest.mark.parametrize("count", [2, 5, 10, 30, 60])
def test_wilcoxon_is_scipys_where_no_ranks_are_equal(count: int) -> None:
    generator = np.random.default_rng(count)
    a, b = generator.normal(0.3, 1, count), generator.normal(0, 1, count)
    found = compare(a.tolist(), b.tolist(), higher_is_better=True)
    assert found.wilcoxon == pytest.approx(stats.wilcoxon(a, b, method="exact").pvalue)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=12))
def test_directions_mirror(values: list[tuple[int, int]]) -> None:
    a, b = zip(*values, strict=True)
    higher, lower = (compare(a, b, higher_is_better=h) for h in (True, False))
    assert higher.wins == sum(x > y for x, y in values)
    assert higher.wins + lower.wins + higher.ties == len(values)
    assert (higher.difference, higher.t_test, higher.wilcoxon) == (
        lower.difference,
        lower.t_test,
        lower.wilcoxon,
    )


def test_all_equal_and_all_equally_different() -> None:
    equal = compare([0.1, 0.2], [0.1, 0.2], higher_is_better=False)
    assert (equal.difference, equal.interval, equal.wins, equal.ties) == (0, (0, 0), 0, 2)
    assert equal.t_test is equal.wilcoxon is None
    constant = compare([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], higher_is_better=False)
    assert constant.difference == pytest.approx(-0.1)
    assert constant.t_test is None, "rounding must not make the differences differ"
    assert (constant.wins, constant.wilcoxon) == (3, 0.25)


def test_rounding_makes_no_difference() -> None:
    found = compare([0.1 + 0.2, 0.5], [0.3, 0.6], higher_is_better=False)
    assert (found.wins, found.ties) == (1, 1)


def test_one_seed_has_no_spread() -> None:
    one = compare([0.1], [0.2], higher_is_better=False)
    assert one.difference == pytest.approx(-0.1)
    assert one.deviation is one.interval is one.t_test is None
    assert (one.wins, one.wilcoxon) == (1, 1.0)
    none = compare([], [], higher_is_better=True)
    assert (none.count, none.difference, none.wilcoxon) == (0, None, None)


@pytest.mark.parametrize("higher", [True, False])
def test_divergence_is_worse_than_every_number(higher: bool) -> None:
    found = compare([None, 0.1, None, 5.0], [0.2, None, None, 5.0], higher_is_better=higher)
    assert (found.count, found.wins, found.ties) == (4, 1, 2)
    assert found.difference is found.interval is found.t_test is None
    assert found.wilcoxon == 1.0
    all_worse = compare([None] * 5, [0.2] * 5, higher_is_better=higher)
    assert (all_worse.wins, all_worse.wilcoxon) == (0, 2 / 2**5)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        compare([1.0], [1.0, 2.0], higher_is_better=True)


def test_summary() -> None:
    assert summary([0.1, None, 0.3]) == summary([0.3, 0.1, None])
    two = summary([0.1, 0.3, None])
    assert (two.count, two.diverged) == (3, 1)
    assert (two.mean, two.deviation) == (pytest.approx(0.2), pytest.approx(math.sqrt(0.02)))
    assert summary([0.1]).deviation is summary([None]).mean is None
