"""Photographs as features of a network that was trained on ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lossmeta.data._dataset import Dataset
from lossmeta.data._files import Source, bad_file, find

FILES = {
    "cars196-features": ("cars196half_efflite0.npz", 196),
    "flowers-features": ("flowers5_efflite0.npz", 5),
}


def load_features(name: str, folder: Path | str | None, download: bool) -> Dataset:
    file, classes = FILES[name]
    # Nobody publishes them: ``features`` [N, D] and ``labels`` [N] of whatever network are read.
    (path,) = find(name, Source(((f"features/{file}",), (file,)), ()), folder, download=False)
    with np.load(path, allow_pickle=False) as content:
        try:
            features, labels = content["features"], content["labels"]
        except KeyError as error:
            raise bad_file(path, "features and labels", f"no {error}") from error
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise bad_file(path, "features [N, D] and labels [N]", f"{features.shape} and {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise bad_file(path, f"labels in [0, {classes})", f"[{labels.min()}, {labels.max()}]")
    inputs = torch.from_numpy(features.astype(np.float32))
    if not inputs.isfinite().all():
        raise bad_file(path, "finite features", "others")
    return Dataset(name, (inputs, torch.from_numpy(labels.astype(np.int64))), None, classes)
