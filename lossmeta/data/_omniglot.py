"""Omniglot: handwritten characters of 50 alphabets, 20 drawings of each (Lake et al., 2015)."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lossmeta.data._dataset import Dataset, Split
from lossmeta.data._files import Download, Source, bad_file, find, read_checked

SIDE = 105
MD5 = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
PACKED = "omniglot.npz"
SOURCE = Source(
    (
        *(tuple(str(Path(folder, file)) for file in MD5) for folder in ("omniglot-py", "omniglot", ".")),
        (f"omniglot/{PACKED}",),
        (PACKED,),
    ),
    tuple(
        Download(
            f"omniglot-py/{file}",
            f"https://raw.githubusercontent.com/brendenlake/omniglot/master/python/{file}",
            f"md5:{md5}",
        )
        for file, md5 in MD5.items()
    ),
)


def load_omniglot(name: str, folder: Path | str | None, download: bool) -> Dataset:
    paths = find(name, SOURCE, folder, download)
    train, test = _packed(paths[0]) if len(paths) == 1 else (_zipped(path) for path in paths)
    characters = int(train[1].max()) + 1
    return Dataset(name, train, (test[0], test[1] + characters), characters + int(test[1].max()) + 1)


def _numbered(characters: list[str]) -> torch.Tensor:
    """From 0 on, in the order of their names."""
    numbers = {character: i for i, character in enumerate(sorted(set(characters)))}
    return torch.tensor([numbers[character] for character in characters], dtype=torch.int64)


def _zipped(path: Path) -> Split:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "omniglot: its images are PNG files, which pillow reads (pip install pillow)"
        ) from error
    images: list[NDArray[np.bool_]] = []
    characters = []
    with zipfile.ZipFile(io.BytesIO(read_checked(path, MD5[path.name]))) as archive:
        for member in sorted(archive.namelist()):
            if member.endswith(".png"):
                image = np.asarray(Image.open(io.BytesIO(archive.read(member))).convert("1"))
                if image.shape != (SIDE, SIDE):
                    raise bad_file(path, f"images of {SIDE}×{SIDE}", f"{member} of {image.shape}")
                images.append(~image)
                characters.append(member.rpartition("/")[0])
    if not images:
        raise bad_file(path, "PNG images", "none")
    return _inked(np.stack(images)), _numbered(characters)


def _packed(path: Path) -> tuple[Split, Split]:
    """Both parts from one archive of NumPy arrays.

    ``bits`` are the images, a bit for a pixel, 1 for ink; ``character`` says which of ``characters`` each is, whose
    names tell the parts.
    """
    with np.load(path, allow_pickle=False) as content:
        try:
            bits, character, names = (content[key] for key in ("bits", "character", "characters"))
        except KeyError as error:
            raise bad_file(path, "bits, character and characters", f"no {error}") from error
    if (
        bits.shape != (len(character), -(-SIDE * SIDE // 8))
        or character.min() < 0
        or character.max() >= len(names)
    ):
        raise bad_file(path, f"bits of images of {SIDE}×{SIDE}, one for each character", f"{bits.shape}")
    background = np.array(["images_background" in name for name in names])[character]
    parts = []
    for chosen in (background, ~background):
        pixels = np.unpackbits(bits[chosen], axis=1)[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE)
        parts.append((_inked(pixels.astype(np.bool_)), _numbered([str(names[c]) for c in character[chosen]])))
    return parts[0], parts[1]


def _inked(pixels: NDArray[np.bool_]) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.uint8) * np.uint8(255))[:, None]
