"""The readers on the data sets themselves, where LOSSMETA_DATA names a folder that has them."""

from __future__ import annotations

import os

import pytest
import torch

from lossmeta.data import Dataset, MissingDataError, load

FOLDER = os.environ.get("LOSSMETA_DATA")


def read(name: str) -> Dataset:
    if not FOLDER:
        pytest.skip("LOSSMETA_DATA is not set")
    try:
        return load(name, FOLDER, download=False)
    except MissingDataError:
        pytest.skip(f"the folder in LOSSMETA_DATA has no {name}")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"])
def test_images(name: str) -> None:
    data = read(name)
    shape = (1, 28, 28) if "mnist" in name else (3, 32, 32)
    train, test = {"mnist": (60_000, 10_000), "svhn": (73_257, 26_032)}.get(
        name.removeprefix("fashion-"), (50_000, 10_000)
    )
    assert data.test is not None
    for (images, labels), size in ((data.train, train), (data.test, test)):
        assert images.shape == (size, *shape)
        assert labels.shape == (size,)
        counts = torch.bincount(labels)
        assert len(counts) == data.classes
        if name not in ("mnist", "svhn"):
            assert (counts == size // len(counts)).all()


def test_mnist_begins_as_known() -> None:
    images, labels = read("mnist").train
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert (images.double().mean() / 255).item() == pytest.approx(0.1307, abs=5e-5)
    assert (images.double().std() / 255).item() == pytest.approx(0.3081, abs=5e-5)


def test_cifar10_has_the_published_pixels() -> None:
    images, labels = read("cifar10").train
    assert labels[:5].tolist() == [6, 9, 9, 4, 1]
    means = images.double().mean((0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)


def test_communities() -> None:
    data = read("communities")
    inputs, targets = data.train
    assert inputs.shape == (1994, 99)
    assert inputs.min() == 0 and inputs.max() == 1
    assert targets[:3].flatten().tolist() == pytest.approx([0.2, 0.67, 0.43])
    assert targets.mean().item() == pytest.approx(0.238, abs=5e-4)  # communities.names


def test_california() -> None:
    inputs, targets = read("california").train
    assert inputs.shape == (20_640, 8)
    # Means in scikit-learn's description of the set.
    assert inputs.double().mean(0)[[0, 1]].tolist() == pytest.approx([3.8707, 28.6395], abs=1e-4)
    assert (targets.min(), targets.max()) == (14_999, 500_001)
