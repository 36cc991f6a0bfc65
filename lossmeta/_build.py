"""Loads the compiled libraries and says what they hold."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import torch

try:
    from lossmeta import _core as _core
except ImportError as error:
    if "LOSSMETA_CPU_ISA" in str(error):  # the core is there, but was asked for what it cannot run
        raise ImportError(f"lossmeta: {error}") from None
    missing = util.find_spec("lossmeta._core") is None
    reason = "its compiled core is missing" if missing else f"its compiled core cannot be loaded ({error})"
    raise ImportError(
        f"lossmeta is not built here: {reason}; install it with `python -m pip install .` from its source folder"
    ) from None


def _load_cuda() -> str | None:
    """Loads the CUDA operators where torch has CUDA; otherwise says why not."""
    spec = util.find_spec("lossmeta")
    folders = list(spec.submodule_search_locations or []) if spec else []
    library, reason = (
        next((f for folder in folders for f in Path(folder).glob(name)), None)
        for name in ("_cuda.*so", "_why_no_cuda.txt")
    )
    if library is None:
        why = reason.read_text(encoding="utf-8") if reason else "install it again, through pip"
        return f"lossmeta was built without its CUDA operators: {why}"
    if torch.version.cuda is None:
        return "This torch is built without CUDA."
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"The CUDA library could not be loaded: {error}"
    return None


why_no_cuda = _load_cuda()


def why_no_kernel(device_type: str) -> str:
    """The reason why a device has no compiled kernels, and the fix."""
    if device_type == "cuda":
        return why_no_cuda or "The CUDA library is loaded, but this operator has no kernel in it."
    if device_type == "cpu":
        return "The compiled core is loaded, but this operator has no kernel in it."
    return f"lossmeta has kernels for cpu and cuda only: move the tensors there from {device_type}."
