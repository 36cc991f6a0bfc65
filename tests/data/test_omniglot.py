"""Omniglot from small archives, and features from small files."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lossmeta.data import MissingDataError, _omniglot, load

CHARACTERS = {
    "images_background.zip": ["Greek/character01", "Greek/character02", "Latin/character01"],
    "images_evaluation.zip": ["Tifinagh/character01", "ULOG/character03"],
}
DRAWINGS = 2


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((105, 105)) < 0.1


def drawings(file: str) -> list[tuple[str, np.ndarray]]:
    """Of each character, whose images are drawn by its name."""
    return [
        (character, pixels(1000 * (sum(map(ord, character)) % 997) + i))
        for character in CHARACTERS[file]
        for i in range(DRAWINGS)
    ]


def zipped(folder: Path, patch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow writes the images")
    folder.mkdir(parents=True, exist_ok=True)
    for file in CHARACTERS:
        with zipfile.ZipFile(folder / file, "w") as archive:
            for i, (character, ink) in enumerate(drawings(file)):
                content = io.BytesIO()
                image.fromarray(~ink).save(content, "PNG")
                archive.writestr(f"{Path(file).stem}/{character}/{i:04}.png", content.getvalue())
        patch.setitem(_omniglot.MD5, file, hashlib.md5((folder / file).read_bytes()).hexdigest())


def packed(folder: Path, **changed: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names, character, bits = [], [], []
    for file in CHARACTERS:
        for name, ink in drawings(file):
            full = f"Omniglot Dataset/{Path(file).stem}/{name}"
            if full not in names:
                names.append(full)
            character.append(names.index(full))
            bits.append(np.packbits(ink))
    content = {
        "bits": np.stack(bits),
        "character": np.array(character),
        "characters": np.array(names),
        **changed,
    }
    np.savez(folder / "omniglot.npz", **{k: v for k, v in content.items() if v.ndim})  # type: ignore[arg-type]


def check(folder: Path) -> None:
    data = load("omniglot", folder, download=False)
    assert data.classes == 5
    assert data.test is not None
    for (images, labels), file in zip((data.train, data.test), CHARACTERS, strict=True):
        assert images.dtype == torch.uint8
        expected = torch.from_numpy(np.stack([ink for _, ink in drawings(file)]))
        assert torch.equal(images[:, 0] == 255, expected)
        assert torch.equal(images[:, 0] == 0, ~expected)
        first = 0 if file == "images_background.zip" else 3
        assert labels.tolist() == [first + i // DRAWINGS for i in range(len(images))]


@pytest.mark.parametrize("folder", ["omniglot-py", "omniglot", "."])
def test_zipped(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(tmp_path / folder, monkeypatch)
    check(tmp_path)


@pytest.mark.parametrize("folder", ["omniglot", "."])
def test_packed(folder: str, tmp_path: Path) -> None:
    packed(tmp_path / folder)
    check(tmp_path)


def test_another_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(tmp_path, monkeypatch)
    path = tmp_path / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"images_evaluation\.zip: expected .* md5"):
        load("omniglot", tmp_path, download=False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": np.array(0)}, "expected bits, character and characters"),
        ({"bits": np.zeros((3, 7), np.uint8)}, "expected bits of images of 105×105"),
        ({"character": np.full(10, 9)}, "expected bits of images"),
    ],
)
def test_other_arrays_are_refused(changed: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    packed(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        load("omniglot", tmp_path, download=False)


def test_features(tmp_path: Path) -> None:
    file = tmp_path / "features" / "flowers5_efflite0.npz"
    with pytest.raises(MissingDataError, match="flowers5_efflite0"):
        load("flowers-features", tmp_path)
    file.parent.mkdir()
    features, labels = np.arange(12, dtype=np.float16).reshape(4, 3), np.array([0, 4, 1, 1])
    np.savez(file, features=features, labels=labels)
    data = load("flowers-features", tmp_path)
    assert data.test is None and data.classes == 5
    assert torch.equal(data.train[0], torch.arange(12.0).view(4, 3))
    assert data.train[1].tolist() == labels.tolist()
    for content, message in (
        ({"features": features}, "features and labels"),
        ({"features": features, "labels": labels[1:]}, r"features \[N, D\]"),
        ({"features": features, "labels": labels + 1}, r"labels in \[0, 5\)"),
        ({"features": np.full((4, 3), np.inf), "labels": labels}, "finite"),
    ):
        np.savez(file, **content)
        with pytest.raises(ValueError, match=message):
            load("flowers-features", tmp_path)
