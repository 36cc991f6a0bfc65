"""The library's safetensors files: tensors, and a description of them in the header."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lossmeta._files import replace_file


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], header: str, description: str) -> None:
    """Replaces ``path`` in one step by these tensors, with the description under that name in the header.

    Raises:
        OSError: where the file cannot be written.
    """
    from safetensors.torch import save

    kept = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    data = save(kept, {header: description})
    replace_file(Path(path), lambda temporary: temporary.write_bytes(data))


def read(
    where: str, path: str | os.PathLike[str], header: str, newest: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description that stands in a file's header, and its tensors, on the CPU.

    Args:
        where: who asks for which file, for errors.
        path: of the file.
        header: the name under which the description stands.
        newest: format that can be read.

    Raises:
        ValueError: for a file without such a description, of a newer format, and a damaged one.
        OSError: where there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # its errors name the file
        pass
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            text = (file.metadata() or {}).get(header)
            # Copied: the file may change behind a map of it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{where} must be a file that save wrote, got one that cannot be read ({error}); save it again"
        ) from error
    try:
        description = dict(json.loads(text or ""))
        version, newer = description["format"], description["format"] > newest
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} must be a file that save wrote, got one without its header; save it again"
        ) from error
    if newer:
        raise ValueError(f"{where} must have format {newest}, got {version}; update lossmeta")
    return description, tensors
