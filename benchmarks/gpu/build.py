"""Installs lossmeta from this source for the card's own architecture, and looks at what came of it.

python -m gpu.build [--dry]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where it goes if the environment's own folder cannot be written; check.sh has it on PYTHONPATH.
OWN_FOLDER = ROOT / "build" / "gpu-site"
NEEDED = ("setuptools", "pybind11")  # by the build, which is not isolated

LOOK = """
import os, sys, torch, lossmeta
folder = os.path.dirname(os.path.realpath(lossmeta.__file__))
print("lossmeta in", folder)
if folder == os.path.realpath("lossmeta"):
    sys.exit("the source folder holds a core of its own, which is used instead: delete lossmeta/_c*.so")
info = lossmeta.info()
bad = [f"{name}: {backends}" for name, backends in info["operators"].items() if backends["cuda"] != "compiled"]
print(f"{len(info['operators']) - len(bad)} of {len(info['operators'])} operators are compiled for CUDA")
sys.exit("\\n".join([f"no CUDA operators: {info['cuda']['why_not']}", *bad]) if bad else 0)
"""


def arguments() -> list[str]:
    """Of ``pip install``, but for those that only some environments need."""
    return ["--no-build-isolation", "--no-deps", "--force-reinstall", "--disable-pip-version-check"]


def environment() -> dict[str, str]:
    import torch

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    jobs = str(len(os.sched_getaffinity(0)))
    return {**os.environ, "TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": os.environ.get("MAX_JOBS", jobs)}


def install() -> int:
    """The build, with more arguments where pip demands them."""
    options = [*arguments(), "-v"]
    if not os.access(sysconfig.get_paths()["purelib"], os.W_OK):
        print(f"build: {sysconfig.get_paths()['purelib']} cannot be written: installing into {OWN_FOLDER}")
        options += ["--target", str(OWN_FOLDER), "--upgrade"]
    status, output = pip(options, environment())
    if status and "externally-managed-environment" in output:
        status, output = pip([*options, "--break-system-packages"], environment())
    return status


def pip(options: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output, which is shown as it comes."""
    command = [sys.executable, "-m", "pip", "install", *options, str(ROOT)]
    print("$", " ".join(command), flush=True)
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    return process.returncode, "".join(lines)


def look() -> int:
    """Whether Python, started as the later stages start it, finds every operator compiled for CUDA."""
    return subprocess.run([sys.executable, "-c", LOOK], cwd=ROOT, check=False).returncode


def rehearse() -> int:
    """What pip makes of the arguments, without building or installing anything."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"build: not rehearsed, this environment has no {' and no '.join(missing)}")
        return 0
    return pip([*arguments(), "--dry-run", "--quiet"], dict(os.environ))[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.build")
    parser.add_argument("--dry", action="store_true")
    if parser.parse_args().dry:
        return rehearse()
    import torch

    if not torch.cuda.is_available():
        print("build: torch sees no CUDA device")
        return 1
    return install() or look()


if __name__ == "__main__":
    sys.exit(main())
