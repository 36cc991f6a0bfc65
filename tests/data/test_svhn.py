"""SVHN from small MATLAB files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from lossmeta.data import _svhn, load

LABELS = {"train_32x32.mat": [10, 1, 9], "test_32x32.mat": [3, 10]}


def write(folder: Path, patch: pytest.MonkeyPatch, **changed: Any) -> dict[str, Any]:
    """``changed`` replaces X or y of the training file."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for file, labels in LABELS.items():
        content = {
            "X": random.integers(0, 256, (32, 32, 3, len(labels)), np.uint8),
            "y": np.array(labels, np.uint8)[:, None],
        }
        contents[file] = content | (changed if file.startswith("train") else {})
        savemat(folder / file, contents[file], do_compression=True)
        patch.setitem(_svhn.MD5, file, hashlib.md5((folder / file).read_bytes()).hexdigest())
    return contents


@pytest.mark.parametrize("folder", ["svhn", "SVHN", "."])
def test_reads_what_was_written(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = write(tmp_path / folder, monkeypatch)
    data = load("svhn", tmp_path, download=False)
    assert data.classes == 10
    assert data.test is not None
    for (images, labels), file in ((data.train, "train_32x32.mat"), (data.test, "test_32x32.mat")):
        x = contents[file]["X"]
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert images.shape == (x.shape[3], 3, 32, 32)
        assert images[1, 2, 5, 7] == x[5, 7, 2, 1]
        assert labels.dtype == torch.int64
        assert labels.tolist() == [label % 10 for label in LABELS[file]]


def test_other_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, monkeypatch)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"test_32x32.mat: expected .* md5 {_svhn.MD5[path.name]}, got md5 "
    ):
        load("svhn", tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"X": np.zeros((32, 32, 3, 2), np.uint8)},
            r"expected X uint8 \(32, 32, 3, N\) and y \(N, 1\), got uint8",
        ),
        (
            {"X": np.zeros((32, 32, 1, 3), np.uint8)},
            r"expected X uint8 \(32, 32, 3, N\) and y \(N, 1\), got uint8",
        ),
        ({"X": np.zeros((32, 32, 3, 3))}, r"expected X uint8 \(32, 32, 3, N\) and y \(N, 1\), got float64"),
        ({"y": np.array([[0], [1], [2]])}, r"expected labels in \[1, 10\], got \[0, 2\]"),
        ({"y": np.array([[1], [11], [2]])}, r"expected labels in \[1, 10\], got \[1, 11\]"),
    ],
)
def test_bad_content_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, monkeypatch, **changed)
    with pytest.raises(ValueError, match=f"train_32x32.mat: {message}"):
        load("svhn", tmp_path)
