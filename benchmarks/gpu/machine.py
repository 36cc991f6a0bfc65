"""Says what this machine is.

python -m gpu.machine FILE [--dry]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from device import DEVICES

ROOT = Path(__file__).resolve().parents[2]
BUILD_TOOLS = ("pip", "setuptools", "pybind11", "cmake", "ninja", "pytest", "pytest-benchmark", "hypothesis")


def machine(dry: bool) -> dict[str, Any]:
    """Everything that a figure depends on; what cannot be found out is None."""
    present = dry or torch.cuda.is_available()
    facts = DEVICES["dry" if dry else "cuda"]().facts() if present else {}
    card = not dry and present
    return {
        "card": facts.get("card"),
        "driver": facts.get("driver"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": facts.get("triton"),
        "python": sys.version.split()[0],
        "nvcc": nvcc(),
        "lossmeta": version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dry": dry,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if card else None,
        "memory_gib": round(facts["memory_bytes"] / 2**30, 1) if card else None,
        "l2_mib": round(facts["l2_bytes"] / 2**20, 1) if card else None,
        "cpu": cpu(),
    }


def version() -> str | None:
    """Of the source, which may not be installed yet."""
    match = re.search(
        r'__version__ = "(.+)"', (ROOT / "lossmeta" / "__init__.py").read_text(encoding="utf-8")
    )
    return match[1] if match else None


def commit() -> str | None:
    """Of git, where this is a repository; else $LOSSMETA_COMMIT."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD") if (ROOT / ".git").exists() else ""
    if not head:
        return os.environ.get("LOSSMETA_COMMIT") or None
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + ("-dirty" if changed else "")


def nvcc() -> str | None:
    program = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    release = re.search(r"release (\d+\.\d+)", _output(program, "--version")) if program else None
    return release[1] if release else None


def cpu() -> str:
    """The model, and how many cores this process may use."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        model = match[1] if match else ""
    return f"{model or 'unknown'}, {len(os.sched_getaffinity(0))} cores"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _package(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.machine")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    facts = machine(options.dry)
    options.file.write_text(json.dumps(facts, indent=1))
    print("\n".join(f"{name}: {fact}" for name, fact in facts.items()))
    print("; ".join(map(_package, BUILD_TOOLS)))
    if not options.dry and facts["card"] is None:
        print("machine: torch sees no CUDA device")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
