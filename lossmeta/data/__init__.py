"""The data sets of the papers' experiments and a few small ones, each as tensors by one call of :func:`load`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lossmeta.data._cifar import load_cifar
from lossmeta.data._dataset import Dataset
from lossmeta.data._features import load_features
from lossmeta.data._files import MissingDataError
from lossmeta.data._idx import load_idx
from lossmeta.data._omniglot import load_omniglot
from lossmeta.data._svhn import load_svhn
from lossmeta.data._tabular import (
    load_california,
    load_communities,
    load_diabetes,
    load_digits,
    load_table,
)

__all__ = ["Dataset", "MissingDataError", "available", "load"]

READERS: dict[str, Callable[[str, Path | str | None, bool], Dataset]] = {
    "mnist": load_idx,
    "fashion-mnist": load_idx,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "svhn": load_svhn,
    "communities": load_communities,
    "california": load_california,
    "diabetes": load_diabetes,
    "digits": load_digits,
    "wine": load_table,
    "breast-cancer": load_table,
    "omniglot": load_omniglot,
    "cars196-features": load_features,
    "flowers-features": load_features,
}


def available() -> tuple[str, ...]:
    """The names that :func:`load` knows; their files need not be on this machine."""
    return tuple(READERS)


def load(name: str, folder: Path | str | None = None, *, download: bool = True) -> Dataset:
    """Reads a data set whole into memory.

    ================= ================= ======= ======= ==========================================================
    name              inputs            classes N       files, as they are met in a folder
    ================= ================= ======= ======= ==========================================================
    ``mnist``         uint8 [1, 28, 28] 10      60 000  idx, gzipped or not, in ``mnist``, ``MNIST/raw`` or flat
    ``fashion-mnist`` uint8 [1, 28, 28] 10      60 000  the same in ``fashion-mnist``, ``FashionMNIST/raw`` or flat, or
                                                        Debian's package dataset-fashion-mnist
    ``cifar10``       uint8 [3, 32, 32] 10      50 000  ``cifar-10-batches-bin`` or ``cifar-10-batches-py``
    ``cifar100``      uint8 [3, 32, 32] 100     50 000  ``cifar-100-binary`` or ``cifar-100-python``; fine labels
    ``svhn``          uint8 [3, 32, 32] 10      73 257  ``{train,test}_32x32.mat`` in ``svhn``, ``SVHN`` or flat
    ``communities``   float32 [99]      –       1994    ``communities.data`` in ``communities``, ``regression`` or flat
    ``california``    float32 [8]       –       20 640  ``cal_housing.data`` in ``CaliforniaHousing``, ``regression`` or
                                                        flat
    ``diabetes``      float32 [10]      –       442     with scikit-learn
    ``digits``        uint8 [1, 8, 8]   10      1797    with scikit-learn
    ``wine``          float32 [13]      3       178     with scikit-learn
    ``breast-cancer`` float32 [30]      2       569     with scikit-learn
    ``omniglot``      uint8             1623    19 280  ``images_{background,evaluation}.zip`` in ``omniglot-py``,
                      [1, 105, 105]                     ``omniglot`` or flat; or ``omniglot/omniglot.npz``
    ``cars196-``      float32 [D]       196     8144    ``features/cars196half_efflite0.npz``: ``features`` [N, D] and
    ``features``                                        ``labels`` [N] of any network
    ``flowers-``      float32 [D]       5       4317    ``features/flowers5_efflite0.npz``, the same
    ``features``
    ================= ================= ======= ======= ==========================================================

    N is the size of ``train``. The first five have an official test split (``svhn`` 26 032, the others 10 000), and so
    has ``omniglot`` (13 180 drawings of 659 characters that are not among the 964 of ``train``; ink is 255). Features
    are never downloaded. Choices of ours: ``communities`` leaves out the five columns that are not predictive and the
    23 that have missing values; its target is ViolentCrimesPerPop as published, scaled to [0, 1]; ``california`` has
    the features of scikit-learn's ``fetch_california_housing`` and a target in dollars; ``diabetes`` is not scaled; the
    grey levels 0 to 16 of ``digits`` are stretched to 0 to 255.

    Args:
        name: one of :func:`available`.
        folder: searched first; then the folder in the environment variable ``LOSSMETA_DATA``, then ``lossmeta`` in the
            user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``).
        download: whether files found nowhere are downloaded from their authors into the cache folder; needs ``pooch``
            (``pip install "lossmeta[data]"``). What comes must have the published checksum.

    Returns:
        The :class:`Dataset`, in the order of its files.

    Raises:
        MissingDataError: where the files are not found and not downloaded; says what to put where.
        ValueError: for an unknown name, and for a file that is not what it should be. CIFAR's pickles and SVHN's files
            must have their published md5; a pickle is never read otherwise.

    Example:
        >>> images, labels = load("digits").train
        >>> images.shape, images.dtype
        (torch.Size([1797, 1, 8, 8]), torch.uint8)
    """
    if name not in READERS:
        raise ValueError(f"load: name must be one of {', '.join(READERS)}, got {name!r}")
    return READERS[name](name, folder, download)
