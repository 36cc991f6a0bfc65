"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the binary version, or the published pickles."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lossmeta.data._dataset import Dataset, Split
from lossmeta.data._files import Download, Source, bad_file, find, read_checked

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Version:
    """Folders and files of one data set. The last file is the test split; ``pickles`` are names and published md5s."""

    classes: int
    records: tuple[int, ...]  # per file
    label_bytes: int  # before the pixels of a record; the last is the label
    binaries: tuple[str, ...]
    pickles: dict[str, str]
    labels: bytes  # key in a pickle
    download: Download


VERSIONS = {
    "cifar10": Version(
        classes=10,
        records=(10_000,) * 6,
        label_bytes=1,
        binaries=tuple(
            f"cifar-10-batches-bin/{batch}.bin"
            for batch in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
        ),
        pickles={
            "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
            "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
            "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        },
        labels=b"labels",
        download=Download(
            "cifar-10-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "md5:c32a1d4ab5d03f1284b67883e8d87530",
        ),
    ),
    "cifar100": Version(
        classes=100,
        records=(50_000, 10_000),
        label_bytes=2,
        binaries=("cifar-100-binary/train.bin", "cifar-100-binary/test.bin"),
        pickles={
            "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
            "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
        labels=b"fine_labels",
        download=Download(
            "cifar-100-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "md5:03b5dce01913d631647c71ecec9e9cb8",
        ),
    ),
}


def load_cifar(name: str, folder: Path | str | None, download: bool) -> Dataset:
    version = VERSIONS[name]
    source = Source((version.binaries, tuple(version.pickles)), (version.download,))
    paths = find(name, source, folder, download)
    if paths[0].suffix == ".bin":
        parts = [_binary(path, version, n) for path, n in zip(paths, version.records, strict=True)]
    else:
        published = zip(paths, version.records, version.pickles.values(), strict=True)
        parts = [_pickled(path, version, n, md5) for path, n, md5 in published]
    return Dataset(name, _join(parts[:-1]), _join(parts[-1:]), version.classes)


def _join(parts: list[tuple[NDArray[Any], NDArray[Any]]]) -> Split:
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.astype(np.int64))


def _binary(path: Path, version: Version, records: int) -> tuple[NDArray[Any], NDArray[Any]]:
    content, size = np.fromfile(path, np.uint8), version.label_bytes + PIXELS
    if len(content) != records * size:
        raise bad_file(path, f"{records} records of {size} bytes", f"{len(content)} bytes")
    rows = content.reshape(records, size)
    return rows[:, version.label_bytes :], _checked(path, rows[:, version.label_bytes - 1], version.classes)


def _pickled(path: Path, version: Version, records: int, md5: str) -> tuple[NDArray[Any], NDArray[Any]]:
    content = read_checked(path, md5)
    batch = OnlyArrays(io.BytesIO(content), encoding="bytes").load()
    pixels, labels = batch[b"data"], np.asarray(batch[version.labels])
    if pixels.dtype != np.uint8 or pixels.shape != (records, PIXELS) or labels.shape != (records,):
        got = f"{pixels.dtype} {pixels.shape} and {labels.shape}"
        raise bad_file(path, f"pixels uint8 ({records}, {PIXELS}) and labels ({records},)", got)
    return pixels, _checked(path, labels, version.classes)


def _checked(path: Path, labels: NDArray[Any], classes: int) -> NDArray[Any]:
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        raise bad_file(path, f"labels in [0, {classes})", f"{labels[bad.argmax()]} at index {bad.argmax()}")
    return labels


class OnlyArrays(pickle.Unpickler):
    """Reads numbers, strings, containers and NumPy arrays; refuses every other global, so that nothing can run."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"a CIFAR batch holds arrays and lists, got {module}.{name}")
