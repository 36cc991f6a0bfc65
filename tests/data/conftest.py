"""No test here sees the user's data, the cache or the network."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WriteMnist = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("LOSSMETA_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "pooch", None)
    return tmp_path / "cache" / "lossmeta"


def idx(array: np.ndarray[Any, Any]) -> bytes:
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def write_mnist() -> WriteMnist:
    """Writes three training and two test images into a folder and returns the arrays by file name."""

    def write(folder: Path, zipped: bool = False, first_label: int = 9) -> dict[str, Any]:
        random = np.random.default_rng(0)
        arrays = {
            "train-images-idx3-ubyte": random.integers(0, 256, (3, 28, 28)),
            "train-labels-idx1-ubyte": np.array([first_label, 0, 4]),
            "t10k-images-idx3-ubyte": random.integers(0, 256, (2, 28, 28)),
            "t10k-labels-idx1-ubyte": np.array([7, 2]),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            content = idx(array)
            (folder / (f"{name}.gz" if zipped else name)).write_bytes(
                gzip.compress(content) if zipped else content
            )
        return arrays

    return write
