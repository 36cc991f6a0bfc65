"""What is installed, and which operator runs compiled on which device."""

from __future__ import annotations

import platform
from typing import Any

import torch

from lossmeta import _build, _core, ops
from lossmeta.ops._operator import OPERATORS


def info() -> dict[str, Any]:
    """Versions, the instruction set in use, the state of CUDA, and for every operator its backend per device.

    Returns:
        A JSON-ready dictionary: ``lossmeta``, ``torch``, ``python`` (versions), ``cpu`` (``isa`` in use and
        ``best_isa``), ``cuda`` (``compiled`` and ``why_not``, ``device`` or None), and ``operators``: name ->
        device type -> ``"compiled"`` where every form of it has a kernel (that which writes in place, the backward),
        otherwise ``"reference: "`` and the reason.

    Example:
        >>> info()["operators"]["parametric_cross_entropy"]["cpu"]
        'compiled'
    """
    from lossmeta import __version__

    return {
        "lossmeta": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": {"isa": _core.isa(), "best_isa": _core.best_isa()},
        "cuda": {
            "compiled": _build.why_no_cuda is None,
            "why_not": _build.why_no_cuda,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "operators": {
            name: {device: _backend(name, device) for device in ("cpu", "cuda")}
            for name in sorted(OPERATORS.keys() & ops.__all__)
        },
    }


def _backend(name: str, device: str) -> str:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    forms = [f for f in torch._C._dispatch_get_all_op_names() if f.startswith(f"lossmeta::{name}")]
    if all(registered(form, device.upper()) for form in forms):
        return "compiled"
    return f"reference: {_build.why_no_kernel(device)}"
