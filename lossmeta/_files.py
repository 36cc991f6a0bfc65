"""Files that are either the old one or the whole new one, never a torn one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary name in the same folder, then renames that file to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays at the end: a figure's format follows from it.
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` in one step; whatever fails, the old file stays."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Replaces ``path`` in one step by ``content`` as JSON, which has neither NaN nor infinity."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
