"""How much memory a trial needed at its peak."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

PROC = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """From here on; where the system cannot forget, the process's peak counts from its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            (PROC / "clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """In bytes: of tensors on a GPU, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, ValueError, IndexError):
        status = (PROC / "status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
