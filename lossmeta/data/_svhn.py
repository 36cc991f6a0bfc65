"""Street View House Numbers, cropped digits (Netzer et al., 2011): two MATLAB files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from lossmeta.data._dataset import Dataset, Split
from lossmeta.data._files import Download, Source, bad_file, find, read_checked

MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
SOURCE = Source(
    tuple(tuple(str(Path(folder, file)) for file in MD5) for folder in ("svhn", "SVHN", ".")),
    tuple(
        Download(f"svhn/{file}", f"http://ufldl.stanford.edu/housenumbers/{file}", f"md5:{md5}")
        for file, md5 in MD5.items()
    ),
)


def load_svhn(name: str, folder: Path | str | None, download: bool) -> Dataset:
    train, test = (_split(path) for path in find(name, SOURCE, folder, download))
    return Dataset(name, train, test, 10)


def _split(path: Path) -> Split:
    from scipy.io import loadmat

    content = loadmat(io.BytesIO(read_checked(path, MD5[path.name])))
    images, labels = content["X"], content["y"]  # [32, 32, 3, N], [N, 1] with 10 for the digit 0
    if images.dtype != np.uint8 or images.shape[:3] != (32, 32, 3) or labels.shape != (images.shape[-1], 1):
        got = f"{images.dtype} {images.shape} and {labels.shape}"
        raise bad_file(path, "X uint8 (32, 32, 3, N) and y (N, 1)", got)
    if labels.min() < 1 or labels.max() > 10:
        raise bad_file(path, "labels in [1, 10]", f"[{labels.min()}, {labels.max()}]")
    pixels = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return torch.from_numpy(pixels), torch.from_numpy(labels[:, 0].astype(np.int64) % 10)
