"""MNIST and Fashion-MNIST from files written here."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmeta.data import MissingDataError, _idx, load


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("mnist", "."),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("fashion-mnist", "."),
    ],
)
def test_reads_what_was_written(
    name: str, folder: str, zipped: bool, tmp_path: Path, write_mnist: Any
) -> None:
    arrays = write_mnist(tmp_path / folder, zipped)
    data = load(name, tmp_path, download=False)
    assert (data.name, data.classes) == (name, 10)
    assert data.test is not None
    for (images, labels), prefix in ((data.train, "train"), (data.test, "t10k")):
        expected = torch.from_numpy(arrays[f"{prefix}-images-idx3-ubyte"])
        assert images.dtype == torch.uint8
        assert torch.equal(images, expected[:, None].to(torch.uint8))
        assert labels.dtype == torch.int64
        assert labels.tolist() == arrays[f"{prefix}-labels-idx1-ubyte"].tolist()


def test_one_file_may_be_gzipped_and_another_not(tmp_path: Path, write_mnist: Any) -> None:
    write_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.with_suffix(".gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    assert load("mnist", str(tmp_path)).train[1].tolist() == [9, 0, 4]


def test_flat_files_of_the_other_set_are_not_taken(
    tmp_path: Path, write_mnist: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "a")
    write_mnist(tmp_path / "b", zipped=True, first_label=1)
    digest = hashlib.md5((tmp_path / "a/train-labels-idx1-ubyte").read_bytes()).hexdigest()
    monkeypatch.setitem(_idx.TRAIN_LABELS_MD5, "mnist", digest)
    monkeypatch.setenv("LOSSMETA_DATA", str(tmp_path / "b"))
    assert load("mnist", tmp_path / "a").train[1][0] == 9
    assert load("fashion-mnist", tmp_path / "a").train[1][0] == 1
    monkeypatch.delenv("LOSSMETA_DATA")
    monkeypatch.setitem(_idx.SOURCES, "fashion-mnist", replace(_idx.SOURCES["fashion-mnist"], installed=()))
    with pytest.raises(MissingDataError):
        load("fashion-mnist", tmp_path / "a")


def test_debian_package_is_searched_last(
    tmp_path: Path, write_mnist: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _idx.SOURCES["fashion-mnist"]
    assert source.installed == ("/usr/share/datasets/fashion-mnist",)
    installed, own = tmp_path / "installed", tmp_path / "own"
    monkeypatch.setitem(_idx.SOURCES, "fashion-mnist", replace(source, installed=(str(installed),)))
    write_mnist(installed, first_label=1)
    assert load("fashion-mnist", own).train[1][0] == 1
    write_mnist(own, first_label=2)
    assert load("fashion-mnist", own).train[1][0] == 2


def change(path: Path, start: int, content: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:start] + content + old[start + len(content) :])


@pytest.mark.parametrize(
    ("file", "start", "content", "message"),
    [
        ("train-images-idx3-ubyte", 0, b"\0\0\x0d\3", r"starts with 00000803, got 00000d03"),
        ("train-labels-idx1-ubyte", 0, b"\0\0\x08\3", r"starts with 00000801, got 00000803"),
        (
            "t10k-images-idx3-ubyte",
            4,
            b"\0\0\0\3",
            r"expected 2368 bytes, as its header says, got 1584 bytes",
        ),
        ("train-images-idx3-ubyte", 8, b"\0\0\0\x0e\0\0\0\x38", r"expected images of 28×28, got 14×56"),
        ("t10k-labels-idx1-ubyte", 4, b"\0\0\0\1\7", r"expected 9 bytes, as its header says, got 10 bytes"),
        ("train-labels-idx1-ubyte", 10, b"\x0a", r"expected labels in \[0, 10\), got 10 at index 2"),
    ],
)
def test_bad_file_is_refused(
    file: str, start: int, content: bytes, message: str, tmp_path: Path, write_mnist: Any
) -> None:
    write_mnist(tmp_path)
    change(tmp_path / file, start, content)
    with pytest.raises(ValueError, match=rf"{file}: expected .*{message.removeprefix('expected ')}$"):
        load("mnist", tmp_path)


def test_labels_must_be_as_many_as_images(tmp_path: Path, write_mnist: Any) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1\0\0\0\1\7")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte: expected 2 labels, .* got 1$"):
        load("mnist", tmp_path)


def test_array_is_the_callers_own(tmp_path: Path, write_mnist: Any) -> None:
    write_mnist(tmp_path)
    assert _idx.read_idx(tmp_path / "t10k-images-idx3-ubyte", 3).flags.writeable


@pytest.mark.parametrize("kept", [0, 3, 10])
def test_short_header_is_refused(kept: int, tmp_path: Path, write_mnist: Any) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte: expected an idx header of 16 bytes"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "checksum", "header"])
def test_damaged_gzip_is_refused(damage: str, tmp_path: Path, write_mnist: Any) -> None:
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-20])
    elif damage == "checksum":
        change(path, len(content) - 8, b"abcd")
    else:
        change(path, 2, b"\xff")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: expected a whole gzip file, got \w+"):
        load("mnist", tmp_path)
