"""MNIST and Fashion-MNIST: idx files (LeCun et al., 1998; Xiao et al., 2017)."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lossmeta.data._dataset import Dataset, Split
from lossmeta.data._files import Download, Source, bad_file, find

FILES = tuple(
    f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def _source(
    folders: tuple[str, ...], url: str, md5s: tuple[str, ...], installed: tuple[str, ...] = ()
) -> Source:
    layouts = tuple(tuple(str(Path(folder, file)) for file in FILES) for folder in folders)
    downloads = (
        Download(f"{folders[0]}/{file}.gz", f"{url}{file}.gz", f"md5:{md5}")
        for file, md5 in zip(FILES, md5s, strict=True)
    )
    return Source(layouts, tuple(downloads), True, installed)


SOURCES = {
    "mnist": _source(
        ("mnist", "MNIST/raw", "."),
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": _source(
        ("fashion-mnist", "FashionMNIST/raw", "."),
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        installed=("/usr/share/datasets/fashion-mnist",),  # Debian's dataset-fashion-mnist
    ),
}

# Both sets have the same file names, so files lying flat in a folder are told apart by their unzipped training labels.
TRAIN_LABELS_MD5 = {
    "mnist": "a25bea736e30d166cdddb491f175f624",
    "fashion-mnist": "9018921c3c673c538a1fc5bad174d6f9",
}


def load_idx(name: str, folder: Path | str | None, download: bool) -> Dataset:
    others = {md5 for other, md5 in TRAIN_LABELS_MD5.items() if other != name}

    def accept(paths: list[Path]) -> bool:
        return hashlib.md5(_unzipped(paths[1]), usedforsecurity=False).hexdigest() not in others

    train_images, train_labels, test_images, test_labels = find(name, SOURCES[name], folder, download, accept)
    return Dataset(name, _split(train_images, train_labels), _split(test_images, test_labels), 10)


def _split(images_path: Path, labels_path: Path) -> Split:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28):
        raise bad_file(images_path, "images of 28×28", "×".join(map(str, images.shape[1:])))
    if len(labels) != len(images):
        raise bad_file(
            labels_path, f"{len(images)} labels, as many as {images_path.name} has images", len(labels)
        )
    if labels.size and labels.max() > 9:
        raise bad_file(labels_path, "labels in [0, 10)", f"{labels.max()} at index {labels.argmax()}")
    return torch.from_numpy(images[:, None]), torch.from_numpy(labels.astype(np.int64))


def read_idx(path: Path, dimensions: int) -> NDArray[Any]:
    """The array of unsigned bytes of an idx file: two zeros, the type 8, the number of dimensions, sizes, values."""
    content = _unzipped(path)
    start = 4 + 4 * dimensions
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic or len(content) < start:
        raise bad_file(
            path,
            f"an idx header of {start} bytes that starts with {magic.hex()}",
            content[:4].hex() or "nothing",
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, 4).tolist())
    if len(content) != start + math.prod(shape):
        raise bad_file(path, f"{start + math.prod(shape)} bytes, as its header says", f"{len(content)} bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _unzipped(path: Path) -> bytes:
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise bad_file(path, "a whole gzip file", f"{type(error).__name__}: {error}") from error
