"""Tables: Communities and Crime, California Housing, and the data sets that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lossmeta.data._dataset import Dataset
from lossmeta.data._files import Download, Source, bad_file, find

COMMUNITIES = Source(
    tuple((str(Path(folder, "communities.data")),) for folder in ("communities", "regression", ".")),
    (
        Download(
            "communities/communities.data",
            "https://archive.ics.uci.edu/ml/machine-learning-databases/communities/communities.data",
            "sha256:09e0b5c07eae24c1efab19b2edee05e160e7f5743b6f31e31eec3d73624da2ea",
        ),
    ),
)
# Not predictive: state, county, community, communityname, fold. With missing values: OtherPerCap (one of 1994) and the
# 22 columns of the police survey (1675 of 1994).
COMMUNITIES_DROPPED = (*range(5), 30, *range(101, 118), *range(121, 125), 126)
COMMUNITIES_SHAPE = (1994, 128)

CALIFORNIA = Source(
    tuple((str(Path(folder, "cal_housing.data")),) for folder in ("CaliforniaHousing", "regression", ".")),
    (
        Download(
            "cal_housing.tgz",
            "https://ndownloader.figshare.com/files/5976036",
            "sha256:aaa5c9a6afe2225cc2aed2723682ae403280c4a3695a2ddda4ffb5d8215ea681",
        ),
    ),
)
CALIFORNIA_SHAPE = (20640, 9)


def load_communities(name: str, folder: Path | str | None, download: bool) -> Dataset:
    (path,) = find(name, COMMUNITIES, folder, download)
    kept = [column for column in range(COMMUNITIES_SHAPE[1]) if column not in COMMUNITIES_DROPPED]
    table = _numbers(path, COMMUNITIES_SHAPE, kept)
    return _regression(name, table[:, :-1], table[:, -1])


def load_california(name: str, folder: Path | str | None, download: bool) -> Dataset:
    (path,) = find(name, CALIFORNIA, folder, download)
    table = _numbers(path, CALIFORNIA_SHAPE, list(range(9)))
    longitude, latitude, age, rooms, bedrooms, population, households, income, value = table.T
    per_household = (rooms / households, bedrooms / households, population, population / households)
    features = np.stack([income, age, *per_household, latitude, longitude], axis=1)
    return _regression(name, features, value)


def _numbers(path: Path, shape: tuple[int, int], columns: list[int]) -> NDArray[Any]:
    """The given columns of a comma-separated file without header, all finite numbers."""
    lines = path.read_text(encoding="latin-1").splitlines()
    if len(lines) != shape[0]:
        raise bad_file(path, f"{shape[0]} lines", len(lines))
    table = np.empty((shape[0], len(columns)))
    for number, (line, row) in enumerate(zip(lines, table, strict=True), 1):
        values = line.split(",")
        if len(values) != shape[1]:
            raise bad_file(path, f"{shape[1]} values in line {number}", len(values))
        try:
            row[:] = [float(values[column]) for column in columns]
        except ValueError as error:
            raise bad_file(path, f"numbers in line {number}", error) from error
        if not np.isfinite(row).all():
            raise bad_file(path, f"finite numbers in line {number}", row[~np.isfinite(row)][0])
    return table


def _regression(name: str, features: NDArray[Any], target: NDArray[Any]) -> Dataset:
    inputs = torch.from_numpy(features.astype(np.float32))
    return Dataset(name, (inputs, torch.from_numpy(target.astype(np.float32)[:, None])), None, None)


def load_diabetes(name: str, folder: Path | str | None, download: bool) -> Dataset:
    from sklearn import datasets

    features, target = datasets.load_diabetes(return_X_y=True, scaled=False)
    return _regression(name, features, target)


def load_digits(name: str, folder: Path | str | None, download: bool) -> Dataset:
    from sklearn import datasets

    content = datasets.load_digits()
    images = torch.from_numpy((content.images[:, None] * (255 / 16)).round().astype(np.uint8))
    return Dataset(name, (images, torch.from_numpy(content.target.astype(np.int64))), None, 10)


def load_table(name: str, folder: Path | str | None, download: bool) -> Dataset:
    from sklearn import datasets

    content = {"wine": datasets.load_wine, "breast-cancer": datasets.load_breast_cancer}[name]()
    inputs = torch.from_numpy(content.data.astype(np.float32))
    labels = torch.from_numpy(content.target.astype(np.int64))
    return Dataset(name, (inputs, labels), None, len(content.target_names))
