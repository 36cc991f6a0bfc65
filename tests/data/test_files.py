"""Where files are looked for, how they are downloaded, and what is said when there are none."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lossmeta.data import MissingDataError, _cifar, _files, _tabular, available, load


def first_label(folder: Path | None = None) -> int:
    return int(load("mnist", folder, download=False).train[1][0])


def test_folder_then_variable_then_cache(
    tmp_path: Path, cache: Path, write_mnist: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingDataError):
        first_label(tmp_path)
    write_mnist(cache / "mnist", first_label=1)
    assert first_label(tmp_path / "own") == 1
    write_mnist(tmp_path / "data", first_label=2)
    monkeypatch.setenv("LOSSMETA_DATA", str(tmp_path / "data"))
    assert first_label() == first_label(tmp_path / "own") == 2
    write_mnist(tmp_path / "own" / "mnist", first_label=3)
    assert first_label(tmp_path / "own") == 3
    assert first_label() == 2
    monkeypatch.setenv("LOSSMETA_DATA", "")  # is as good as none, not the working folder
    monkeypatch.chdir(tmp_path / "data")
    assert first_label() == 1


def test_home_is_expanded(tmp_path: Path, write_mnist: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _files.cache_folder() == tmp_path / ".cache/lossmeta"
    write_mnist(tmp_path / "images", first_label=5)
    assert first_label(Path("~/images")) == 5
    monkeypatch.setenv("LOSSMETA_DATA", "~/images")
    assert first_label() == 5


def test_what_is_missing_is_said(
    tmp_path: Path, cache: Path, write_mnist: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path / "own" / "MNIST/raw")
    (tmp_path / "own/MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    monkeypatch.setenv("LOSSMETA_DATA", str(tmp_path / "data"))
    with pytest.raises(MissingDataError) as caught:
        load("mnist", tmp_path / "own", download=False)
    message = str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)
    assert message.startswith("mnist: its files were not found, and not downloaded: download=False.")
    assert f"Looked in {tmp_path / 'own'}, {tmp_path / 'data'}, {cache}." in message
    assert f"Incomplete: {tmp_path / 'own'} lacks MNIST/raw/t10k-labels-idx1-ubyte.\n" in message
    for file in (
        "mnist/train-images-idx3-ubyte",
        "MNIST/raw/t10k-labels-idx1-ubyte",
        " train-labels-idx1-ubyte",
    ):
        assert file in message
    assert "LOSSMETA_DATA" in message


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fashion-mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py/test_batch"),
        ("cifar100", "cifar-100-binary/train.bin"),
        ("svhn", "svhn/test_32x32.mat"),
        ("communities", "regression/communities.data"),
        ("california", "CaliforniaHousing/cal_housing.data"),
    ],
)
def test_without_pooch(name: str, file: str, tmp_path: Path) -> None:
    source = {"communities": "communities", "california": "cal_housing"}.get(name, "")
    assert not list(tmp_path.rglob(f"{source}*.data"))
    with pytest.raises(MissingDataError, match=r"pooch is not installed \(.*lossmeta\[data\]") as caught:
        load(name, tmp_path) if name != "fashion-mnist" else _files.find(name, fashion(), tmp_path, True)
    assert str(caught.value).startswith(f"{name}: ")
    assert file in str(caught.value)


def fashion() -> _files.Source:
    """Without Debian's folder, which may be there."""
    from lossmeta.data import _idx

    return replace(_idx.SOURCES["fashion-mnist"], installed=())


def test_only_idx_files_may_be_gzipped(tmp_path: Path) -> None:
    (tmp_path / "communities.data.gz").write_bytes(b"")
    with pytest.raises(MissingDataError):
        load("communities", tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"load: name must be one of mnist, .*features, got 'imagenet'"):
        load("imagenet")


def test_available() -> None:
    names = {"mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "communities", "california", "diabetes"}
    assert set(available()) == names | {
        *("digits", "wine", "breast-cancer", "omniglot", "cars196-features", "flowers-features")
    }


# ---- Downloads, from a network that is a dictionary.


class Network:
    """Stands for pooch: checks what it retrieves as pooch does."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.retrieved: list[str] = []

    def retrieve(self, url: str, known_hash: str, fname: str, path: str) -> str:
        self.retrieved.append(url)
        if url not in self.pages:
            raise OSError(f"no route to {url}")
        content = self.pages[url]
        algorithm, expected = known_hash.split(":")
        if hashlib.new(algorithm, content).hexdigest() != expected:
            raise ValueError("the downloaded file does not match the known hash")
        (Path(path) / fname).write_bytes(content)
        return str(Path(path) / fname)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setitem(sys.modules, "pooch", SimpleNamespace(retrieve=network.retrieve))
    return network


def publish(network: Network, source: _files.Source, contents: dict[str, bytes]) -> _files.Source:
    """The source, with these files on the network and their checksums known."""
    downloads = []
    for item in source.downloads:
        content = contents[item.file]
        network.pages[item.url] = content
        downloads.append(replace(item, checksum=f"sha256:{hashlib.sha256(content).hexdigest()}"))
    return replace(source, downloads=tuple(downloads))


def tar(contents: dict[str, bytes]) -> bytes:
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return result.getvalue()


@pytest.fixture
def housing(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tabular, "CALIFORNIA_SHAPE", (1, 9))
    archive = tar({"CaliforniaHousing/cal_housing.data": b"1,2,3,4,5,6,1,8,9\n", "../evil": b"x"})
    monkeypatch.setattr(
        _tabular, "CALIFORNIA", publish(network, _tabular.CALIFORNIA, {"cal_housing.tgz": archive})
    )


@pytest.mark.usefixtures("housing")
def test_archive_is_downloaded_once_into_the_cache(tmp_path: Path, cache: Path, network: Network) -> None:
    for _ in range(2):
        assert load("california", tmp_path / "own").train[1].item() == 9
    assert network.retrieved == ["https://ndownloader.figshare.com/files/5976036"]
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [Path("cache/lossmeta/CaliforniaHousing/cal_housing.data")]


@pytest.mark.usefixtures("housing")
def test_nothing_is_downloaded_that_is_there_or_unwanted(tmp_path: Path, network: Network) -> None:
    with pytest.raises(MissingDataError, match="not downloaded: download=False"):
        load("california", tmp_path, download=False)
    (tmp_path / "cal_housing.data").write_text("1,2,3,4,5,6,1,8,7\n")
    assert load("california", tmp_path).train[1].item() == 7
    assert network.retrieved == []


def test_plain_files_are_downloaded(
    cache: Path, tmp_path: Path, network: Network, write_mnist: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lossmeta.data import _idx

    write_mnist(tmp_path / "server", zipped=True, first_label=6)
    contents = {f"mnist/{path.name}": path.read_bytes() for path in (tmp_path / "server").iterdir()}
    source = publish(network, _idx.SOURCES["mnist"], contents)
    monkeypatch.setitem(_idx.SOURCES, "mnist", source)
    assert load("mnist").train[1].tolist() == [6, 0, 4]
    assert {f"mnist/{path.name}" for path in (cache / "mnist").iterdir()} == set(contents)
    assert all(
        url == f"https://ossci-datasets.s3.amazonaws.com/{file}"
        for url, file in zip(network.retrieved, [item.file for item in source.downloads], strict=True)
    )


def test_wrong_checksum_leaves_nothing(cache: Path, network: Network) -> None:
    (item,) = (_cifar.VERSIONS["cifar100"].download,)
    network.pages[item.url] = b"not the archive"
    with pytest.raises(MissingDataError, match=r"ValueError: .* does not match the known hash"):
        load("cifar100")
    assert list(cache.iterdir()) == []


def test_no_network(cache: Path, network: Network) -> None:
    with pytest.raises(MissingDataError, match=r"svhn: .*not downloaded: OSError: no route to http://ufldl"):
        load("svhn")
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written(cache: Path, network: Network) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in the place of the folder")
    with pytest.raises(MissingDataError, match="FileExistsError"):
        load("svhn")


def downloads() -> list[_files.Download]:
    from lossmeta.data import _idx, _svhn

    sources = [*_idx.SOURCES.values(), _svhn.SOURCE, _tabular.COMMUNITIES, _tabular.CALIFORNIA]
    return [item for source in sources for item in source.downloads] + [
        version.download for version in _cifar.VERSIONS.values()
    ]


@pytest.mark.parametrize("item", downloads(), ids=lambda item: item.file)
def test_downloads_have_checksums_and_fit_their_layout(item: _files.Download) -> None:
    algorithm, digest = item.checksum.split(":")
    assert len(bytes.fromhex(digest)) == hashlib.new(algorithm).digest_size
    assert item.url.startswith(("https://", "http://"))
    assert item.file.endswith((".tgz", ".tar.gz")) or item.url.endswith(Path(item.file).name)


def test_import_is_quick() -> None:
    """Neither scikit-learn, SciPy nor pooch comes in before it is needed."""
    code = (
        "import sys, lossmeta.data, lossmeta.models; print({'sklearn', 'scipy', 'pooch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
