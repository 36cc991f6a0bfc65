"""CIFAR from files of a few records; pickles are read only if they are the published ones."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lossmeta.data import _cifar, load

RECORDS = 2


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Pixels and labels for every file of both sets, of which two records are expected in each."""
    random = np.random.default_rng(0)
    result = {}
    for name, version in _cifar.VERSIONS.items():
        small = replace(version, records=(RECORDS,) * len(version.records))
        monkeypatch.setitem(_cifar.VERSIONS, name, small)
        result[name] = [
            (
                random.integers(0, 256, (RECORDS, 3072), np.uint8),
                random.integers(0, version.classes, RECORDS, np.uint8),
            )
            for _ in version.records
        ]
    return result


def write_binary(folder: Path, name: str, batches: list[Any]) -> list[Path]:
    paths = [folder / file for file in _cifar.VERSIONS[name].binaries]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, (pixels, labels) in zip(paths, batches, strict=True):
        coarse = [np.full((RECORDS, 1), 250, np.uint8)] * (_cifar.VERSIONS[name].label_bytes - 1)
        np.concatenate([*coarse, labels[:, None], pixels], axis=1).tofile(path)
    return paths


def write_pickles(
    folder: Path, name: str, contents: list[Any], patch: pytest.MonkeyPatch | None = None, protocol: int = 2
) -> list[Path]:
    """With ``patch`` their md5s pass for the published ones."""
    version = _cifar.VERSIONS[name]
    paths = [folder / file for file in version.pickles]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(pickle.dumps(content, protocol))
    if patch:
        md5s = {file: hashlib.md5((folder / file).read_bytes()).hexdigest() for file in version.pickles}
        patch.setitem(_cifar.VERSIONS, name, replace(version, pickles=md5s))
    return paths


def as_pickled(name: str, batches: list[Any]) -> list[Any]:
    key = _cifar.VERSIONS[name].labels
    return [{b"data": pixels, key: labels.tolist(), b"batch_label": b"x"} for pixels, labels in batches]


def check(name: str, folder: Path, batches: list[Any]) -> None:
    data = load(name, folder, download=False)
    assert data.classes == (10 if name == "cifar10" else 100)
    assert data.test is not None
    for (images, labels), expected in ((data.train, batches[:-1]), (data.test, batches[-1:])):
        pixels = np.concatenate([batch[0] for batch in expected])
        assert images.dtype == torch.uint8
        assert np.array_equal(images.numpy(), pixels.reshape(-1, 3, 32, 32))
        assert labels.dtype == torch.int64
        assert labels.tolist() == np.concatenate([batch[1] for batch in expected]).tolist()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_binary_version(name: str, tmp_path: Path, batches: dict[str, list[Any]]) -> None:
    write_binary(tmp_path, name, batches[name])
    check(name, tmp_path, batches[name])


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_published_pickles(
    name: str, protocol: int, tmp_path: Path, batches: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pickles(tmp_path, name, as_pickled(name, batches[name]), monkeypatch, protocol)
    check(name, tmp_path, batches[name])


def test_globals_and_strings_as_python_2_wrote_them() -> None:
    """An array of the published files, byte for byte but for its shape and values."""
    array = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x03\x85"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x03\x00\x80\xfftb."
    )
    result = _cifar.OnlyArrays(io.BytesIO(array), encoding="bytes").load()
    assert result.dtype == np.uint8
    assert result.tolist() == [0, 128, 255]


class Evil:
    """What a malicious pickle looks like: reading it runs a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("published", [False, True])
def test_malicious_pickle_does_not_run(
    published: bool, tmp_path: Path, batches: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither without the right checksum nor, were that forged, with it."""
    target = tmp_path / "proof"
    paths = write_pickles(tmp_path, "cifar100", [Evil(target)] * 2, monkeypatch if published else None)
    expected = (
        (pickle.UnpicklingError, "got posix.mkdir")
        if published
        else (ValueError, "train: expected the published")
    )
    with pytest.raises(expected[0], match=expected[1]):
        load("cifar100", tmp_path)
    assert not target.exists()
    pickle.loads(paths[0].read_bytes())
    assert target.exists()  # so it would have run


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("builtins", "getattr"), ("numpy", "load"), ("numpy.core.multiarray", "fromfile")],
)
def test_no_other_global_is_unpickled(module: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(f"c{module}\n{name}\n.".encode())
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match=f"{module}.{name}"):
        _cifar.OnlyArrays(file).load()


def test_pickle_with_another_md5_is_refused(tmp_path: Path, batches: dict[str, list[Any]]) -> None:
    write_pickles(tmp_path, "cifar10", as_pickled("cifar10", batches["cifar10"]))
    with pytest.raises(
        ValueError, match=r"data_batch_1: expected .* md5 c99cafc152244af753f735de768cd75f, got md5 "
    ):
        load("cifar10", tmp_path)


def test_binary_version_is_preferred(tmp_path: Path, batches: dict[str, list[Any]]) -> None:
    write_pickles(tmp_path, "cifar10", as_pickled("cifar10", batches["cifar10"]))
    write_binary(tmp_path, "cifar10", batches["cifar10"])
    check("cifar10", tmp_path, batches["cifar10"])


@pytest.mark.parametrize("cut", [1, 3073])
def test_truncated_binary_is_refused(cut: int, tmp_path: Path, batches: dict[str, list[Any]]) -> None:
    path = write_binary(tmp_path, "cifar10", batches["cifar10"])[3]
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(
        ValueError, match=rf"data_batch_4.bin: expected 2 records of 3073 bytes, got {6146 - cut} "
    ):
        load("cifar10", tmp_path)


def test_labels_out_of_range_are_refused(tmp_path: Path, batches: dict[str, list[Any]]) -> None:
    path = write_binary(tmp_path, "cifar100", batches["cifar100"])[1]
    content = bytearray(path.read_bytes())
    content[3074 + 1] = 100
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"test.bin: expected labels in \[0, 100\), got 100 at index 1"):
        load("cifar100", tmp_path)


@pytest.mark.parametrize("change", ["pixels", "dtype", "labels"])
def test_pickle_of_other_shape_is_refused(
    change: str, tmp_path: Path, batches: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = as_pickled("cifar100", batches["cifar100"])
    if change == "pixels":
        contents[0][b"data"] = contents[0][b"data"][:1]
    elif change == "dtype":
        contents[0][b"data"] = contents[0][b"data"].astype(np.float32)
    else:
        contents[0][b"fine_labels"] = [1]
    write_pickles(tmp_path, "cifar100", contents, monkeypatch, protocol=3)
    with pytest.raises(ValueError, match=r"train: expected pixels uint8 \(2, 3072\) and labels \(2,\), got "):
        load("cifar100", tmp_path)
