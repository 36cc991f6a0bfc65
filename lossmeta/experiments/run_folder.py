"""A run on disk: ``run.json`` says what it is, ``trials.jsonl`` has one finished trial a line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lossmeta
from lossmeta._files import write_json
from lossmeta.experiments._contents import header_of, parsed, record_of
from lossmeta.experiments.lock import locked
from lossmeta.experiments.old import OLD, convert
from lossmeta.experiments.records import REMEDY, FolderError, Header, Record, Run

# 1 was results.json, all in one file.
SCHEMA = 2
HEADER, TRIALS, LOCK = "run.json", "trials.jsonl", ".lock"


def read(path: Path) -> Run:
    """A run as it is, finished or not.

    Raises:
        FolderError: for a folder without a run, with a corrupt one or with one of a newer lossmeta.
        OSError: where it cannot be read.
    """
    if not (path / HEADER).exists():
        if (path / OLD).exists():
            return convert(path, _json(path / OLD))
        raise FolderError(f"{path} holds no run: it has neither {HEADER} nor {OLD}")
    header = _read_header(path / HEADER)
    trials, good, size = _read_trials(path / TRIALS, header)
    return Run(path, header, trials, cut=good < size)


class Writer:
    """A folder that this process alone writes to."""

    def __init__(self, path: Path, header: Header, trials: list[Record], file: int) -> None:
        self.path = path
        self.header = header
        self.trials = trials
        self._file = file

    def append(self, record: Record) -> None:
        """Puts a finished trial on the disk.

        Raises:
            OSError: where it does not fit; what was written before stays as it is.
        """
        content = asdict(record)
        for name in ("series", "failure"):
            if not content[name]:  # so that an earlier lossmeta reads it too
                del content[name]
        line = json.dumps(content, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            # One call: an interrupt comes before or after it, never within the line.
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, size)
            raise
        self.trials.append(record)


@contextmanager
def opened(path: Path, header: Header) -> Iterator[Writer]:
    """The folder for a run to begin or to go on in. One in which no trial was finished is left as it was found.

    Raises:
        FolderError: for a folder that another process writes to, that holds something else or that is corrupt.
        OSError: where it cannot be written to.
    """
    new_folder = not path.exists()
    _plan(path, header)  # what is refused is left without a trace
    path.mkdir(parents=True, exist_ok=True)
    with locked(path / LOCK) as holder:
        if holder is not None:
            raise FolderError(
                f"{path} is being written to by process {holder}; wait for it, or choose another --output"
            )
        earlier, kept = _plan(path, header)
        try:
            trials, good, _ = _read_trials(path / TRIALS, kept)
            if kept != earlier:
                content = asdict(kept)
                if not kept.corrected:  # so that an earlier lossmeta reads it too
                    del content["corrected"]
                write_json(path / HEADER, {"schema": SCHEMA, **content})
            file = os.open(path / TRIALS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.ftruncate(file, good)
                _sync_folder(path)
                yield Writer(path, kept, trials, file)
            finally:
                os.close(file)
        finally:
            if earlier is None and not finished(path):
                with suppress(OSError):
                    for name in (TRIALS, HEADER, LOCK):
                        (path / name).unlink(missing_ok=True)
                    if new_folder:
                        path.rmdir()


def finished(path: Path) -> int:
    """How many trials are really on the disk."""
    with suppress(OSError):
        return (path / TRIALS).read_bytes().count(b"\n")
    return 0


def environment(device: str, threads: int) -> dict[str, Any]:
    """Where a run is made."""
    from datetime import datetime, timezone

    return {
        **lossmeta.info(),
        "processor": _processor(),
        "device": device,
        "threads": threads,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    import platform

    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _sync_folder(path: Path) -> None:
    """So that the files' names, too, outlast a loss of power."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _plan(path: Path, header: Header) -> tuple[Header | None, Header]:
    """What the folder is, and what it is to be."""
    if (path / HEADER).exists():
        earlier = _read_header(path / HEADER)
        return earlier, _continued(path, earlier, header)
    if (path / TRIALS).exists():
        raise FolderError(f"{path} holds {TRIALS} without its {HEADER}; {REMEDY}")
    if (path / OLD).exists():
        raise FolderError(
            f"{path} holds {OLD} of an earlier lossmeta (schema 1, this one writes {SCHEMA}), which no run can go on "
            f"with; `lossmeta report {path}` shows it; choose another --output for the new run"
        )
    return None, header


def _continued(path: Path, earlier: Header, now: Header) -> Header:
    """The header of a run that goes on: everything as it is now, but where it began."""

    def fixed(header: Header) -> dict[str, Any]:
        where = {name: header.environment.get(name) for name in ("lossmeta", "torch", "device")}
        return {"recipe": header.recipe, **where, **header.settings}

    there, here = fixed(earlier), fixed(now)
    different = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if different:
        list_of = "; ".join(
            f"{name} is {there.get(name)} there and {here.get(name)} now" for name in different
        )
        raise FolderError(f"{path} holds results of other settings: {list_of}; {REMEDY}")
    seeds = tuple(sorted({*earlier.seeds, *now.seeds}))
    return replace(now, seeds=seeds, environment=earlier.environment)


def _json(path: Path) -> Any:
    try:
        return parsed(path.read_bytes())
    except ValueError as error:
        raise FolderError(f"{path} is damaged ({type(error).__name__}: {error}); {REMEDY}") from error


def _read_header(path: Path) -> Header:
    content = _json(path)
    schema = content.pop("schema", None) if isinstance(content, dict) else None
    if type(schema) is int and schema > SCHEMA:
        where = content.get("environment")
        version = where.get("lossmeta", "?") if isinstance(where, dict) else "?"
        raise FolderError(
            f"{path} was written by lossmeta {version} with schema {schema}; lossmeta {lossmeta.__version__} reads "
            f"schemas up to {SCHEMA}: use the newer lossmeta, or choose another --output"
        )
    if type(schema) is not int or schema != SCHEMA:
        raise FolderError(f"{path} must say schema {SCHEMA}, got {schema!r}; {REMEDY}")
    try:
        return header_of(content)
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{path} is damaged ({type(error).__name__}: {error}); {REMEDY}") from error


def _read_trials(path: Path, header: Header) -> tuple[list[Record], int, int]:
    """The trials, where the last whole line ends, and the file: a process that is killed can leave half a line."""
    content = path.read_bytes() if path.exists() else b""
    good = content.rfind(b"\n") + 1
    trials = []
    for number, line in enumerate(content[:good].split(b"\n")[:-1], 1):
        try:
            trials.append(record_of(parsed(line), header.tasks))
        except (TypeError, ValueError) as error:
            raise FolderError(
                f"{path}, line {number}, is damaged ({type(error).__name__}: {error}); "
                "delete that line, and the same command trains its trial again"
            ) from error
    return trials, good, len(content)
