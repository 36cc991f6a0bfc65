"""Finds the files of a data set on this machine, or downloads them."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class MissingDataError(FileNotFoundError):
    """The files of a data set are in none of the folders, and could not be downloaded."""


@dataclass(frozen=True)
class Download:
    """One file on the network: its name here, its address and its checksum, ``"md5:..."`` or ``"sha256:..."``."""

    file: str
    url: str
    checksum: str


@dataclass(frozen=True)
class Source:
    """Where the files of a data set are met.

    ``layouts`` are alternatives, each a list of files that belong together, relative to the folder that is searched. A
    download comes to lie as the first of them; the members of an archive that is downloaded have those names.
    ``gzipped``: a file may also have ``.gz`` added to its name. ``installed``: folders of the operating system,
    searched last.
    """

    layouts: tuple[tuple[str, ...], ...]
    downloads: tuple[Download, ...]
    gzipped: bool = False
    installed: tuple[str, ...] = ()


def cache_folder() -> Path:
    """Where downloads go: ``lossmeta`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lossmeta"


def find(
    name: str,
    source: Source,
    folder: Path | str | None,
    download: bool,
    accept: Callable[[list[Path]], bool] = lambda paths: True,
) -> list[Path]:
    """The files of the first layout that is complete and accepted, in the first folder that has one.

    Searched are ``folder``, the folder in ``LOSSMETA_DATA``, the cache and ``source.installed``, in this order.
    """
    named = (folder, os.environ.get("LOSSMETA_DATA") or None)
    folders = [Path(place).expanduser() for place in named if place is not None]
    folders += [cache_folder(), *map(Path, source.installed)]
    incomplete = []
    for place in folders:
        for layout in source.layouts:
            paths = [_existing(place / file, source.gzipped) for file in layout]
            there = [path for path in paths if path is not None]
            if len(there) == len(layout) and accept(there):
                return there
            if 0 < len(there) < len(layout):
                absent = [file for file, path in zip(layout, paths, strict=True) if path is None]
                incomplete.append(f"{place} lacks {', '.join(absent)}")

    reason = _download(source) if download else "download=False"
    if reason is None:
        paths = [_existing(cache_folder() / file, source.gzipped) for file in source.layouts[0]]
        return [path for path in paths if path is not None]
    wanted = "\n  or ".join(", ".join(layout) for layout in source.layouts)
    raise MissingDataError(
        f"{name}: its files were not found, and not downloaded: {reason}.\n"
        f"Looked in {', '.join(map(str, folders))}.\n"
        + "".join(f"Incomplete: {line}.\n" for line in incomplete)
        + f"Put\n     {wanted}\ninto one of these folders, or set LOSSMETA_DATA to the folder that has them."
    )


def _existing(path: Path, gzipped: bool) -> Path | None:
    names = [path, path.with_name(f"{path.name}.gz")] if gzipped else [path]
    return next((name for name in names if name.is_file()), None)


def _download(source: Source) -> str | None:
    """Puts the first layout into the cache, each file whole or not at all; returns why not, or None."""
    try:
        import pooch
    except ImportError:
        return 'pooch is not installed (python -m pip install "lossmeta[data]")'
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            for item in source.downloads:
                file = Path(pooch.retrieve(item.url, item.checksum, Path(item.file).name, temporary))
                if item.file.endswith((".tar.gz", ".tgz")):
                    _unpack(file, source.layouts[0], cache)
                else:
                    _move(file, cache / item.file)
    except (OSError, ValueError) as error:  # no network, no space; a wrong checksum
        return f"{type(error).__name__}: {error}".rstrip(".")
    return None


def _unpack(archive: Path, members: tuple[str, ...], folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in members:
            content = tar.extractfile(member)
            assert content is not None, member  # the archive has the published checksum
            temporary = archive.with_name("member")
            temporary.write_bytes(content.read())
            _move(temporary, folder / member)


def _move(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    file.replace(target)


def read_checked(path: Path, md5: str) -> bytes:
    """The content of a file, if it is the published one."""
    content = path.read_bytes()
    got = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if got != md5:
        raise bad_file(path, f"the published file with md5 {md5}", f"md5 {got}")
    return content


def bad_file(path: Path, expected: str, got: object) -> ValueError:
    """The error for a file that is not what it should be."""
    return ValueError(f"{path}: expected {expected}, got {got}")
