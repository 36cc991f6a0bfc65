"""Tables written here, and those of scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lossmeta.data import _tabular, load

ROWS = 3
MISSING = [1, 2, 30, *range(101, 118), *range(121, 125), 126]


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tabular, "COMMUNITIES_SHAPE", (ROWS, 128))
    monkeypatch.setattr(_tabular, "CALIFORNIA_SHAPE", (ROWS, 9))


def write(path: Path, lines: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines), encoding="latin-1")


def communities() -> list[list[Any]]:
    lines: list[list[Any]] = [
        [(1000 * row + column) / 10_000 for column in range(128)] for row in range(ROWS)
    ]
    for line in lines[:2]:
        for column in MISSING:
            line[column] = "?"
        line[3] = "Cañontown"
    return lines


@pytest.mark.parametrize("folder", ["communities", "regression", "."])
def test_communities(folder: str, tmp_path: Path) -> None:
    write(tmp_path / folder / "communities.data", communities())
    data = load("communities", tmp_path, download=False)
    assert (data.test, data.classes) == (None, None)
    inputs, targets = data.train
    kept = [column for column in range(5, 127) if column not in MISSING]
    assert inputs.dtype == targets.dtype == torch.float32
    assert inputs.shape == (ROWS, 99) == (ROWS, len(kept))
    assert torch.equal(inputs[1], (1000 + torch.tensor(kept, dtype=torch.float64)).div(10_000).float())
    assert torch.equal(targets, torch.tensor([[0.0127], [0.1127], [0.2127]]))


@pytest.mark.parametrize("folder", ["CaliforniaHousing", "regression", "."])
def test_california(folder: str, tmp_path: Path) -> None:
    lines = [
        [-122.23, 37.88, 41.0, 880.0, 129.0, 322.0, 126.0, 8.3252, 452600.0],
        [-122.22, 37.86, 21.0, 7099.0, 1106.0, 2401.0, 1138.0, 8.3014, 358500.0],
        [-119.0, 36.0, 1.0, 12.0, 6.0, 9.0, 3.0, 2.5, 14999.0],
    ]
    write(tmp_path / folder / "cal_housing.data", lines)
    inputs, targets = load("california", tmp_path, download=False).train
    assert inputs.dtype == targets.dtype == torch.float32
    assert inputs[2].tolist() == [2.5, 1.0, 4.0, 2.0, 9.0, 3.0, 36.0, -119.0]
    # What scikit-learn's user guide shows for the first row.
    shown = [8.3252, 41.0, 6.98412698, 1.02380952, 322.0, 2.55555556, 37.88, -122.23]
    torch.testing.assert_close(inputs[0], torch.tensor(shown))
    assert targets.tolist() == [[452600.0], [358500.0], [14999.0]]


@pytest.mark.parametrize(
    ("line", "column", "value", "message"),
    [
        (0, 7, "?", r"expected numbers in line 1, got could not convert string to float: '\?'"),
        (2, 127, "", "expected numbers in line 3, got could not convert"),
        (1, 6, "nan", "expected finite numbers in line 2, got nan"),
        (1, 6, "1,2", "expected 128 values in line 2, got 129"),
    ],
)
def test_bad_value_is_refused(line: int, column: int, value: str, message: str, tmp_path: Path) -> None:
    lines = communities()
    lines[line][column] = value
    write(tmp_path / "communities.data", lines)
    with pytest.raises(ValueError, match=f"communities.data: {message}"):
        load("communities", tmp_path)


@pytest.mark.parametrize(("name", "file"), [("communities", "communities"), ("california", "cal_housing")])
@pytest.mark.parametrize("rows", [0, 2, 4])
def test_other_number_of_lines_is_refused(rows: int, name: str, file: str, tmp_path: Path) -> None:
    width = 9 if name == "california" else 128
    write(tmp_path / f"{file}.data", [[1.0] * width] * rows)
    with pytest.raises(ValueError, match=rf"{file}.data: expected 3 lines, got {rows}"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("wine", (178, 13), 3), ("breast-cancer", (569, 30), 2)],
)
def test_tables_of_scikit_learn(name: str, shape: tuple[int, int], classes: int) -> None:
    data = load(name, download=False)
    inputs, labels = data.train
    assert (inputs.dtype, inputs.shape) == (torch.float32, shape)
    assert (labels.dtype, labels.shape) == (torch.int64, shape[:1])
    assert labels.unique().tolist() == list(range(classes)) == list(range(data.classes or 0))
    assert data.test is None


def test_diabetes_is_not_scaled() -> None:
    data = load("diabetes", download=False)
    inputs, targets = data.train
    assert (inputs.dtype, inputs.shape, data.classes) == (torch.float32, (442, 10), None)
    assert (targets.dtype, targets.shape) == (torch.float32, (442, 1))
    assert inputs[0, :3].tolist() == [59.0, 2.0, pytest.approx(32.1)]  # age, sex, body mass index
    assert targets[:2].tolist() == [[151.0], [75.0]]


def test_digits_span_the_grey_levels_of_other_images() -> None:
    from sklearn.datasets import load_digits

    images, labels = load("digits", download=False).train
    assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (1797, 1, 8, 8), torch.int64)
    assert (images.min(), images.max()) == (0, 255)
    levels = (images[:, 0].numpy() * (16 / 255)).round()
    assert np.array_equal(levels, load_digits().images)
    assert images.unique()[[1, 8, 15]].tolist() == [16, 128, 239]  # to the nearest
