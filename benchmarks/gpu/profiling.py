"""Nsight Compute on the kernels that matter most.

python -m gpu.profiling FILE [--dry] [--until TIME]

FILE holds a list of ``{"kernel", "duration_us", "dram_percent", "sm_percent", "registers", "occupancy_percent"}``.
Where there is nothing to tell, ``kernel`` says why.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu import parsers
from gpu.backend import Card, Dry, Missing, choose

KERNELS = ("forward_rows", "backward_rows", "table_forward_kernel", "table_backward_kernel", "sum_class")
OPTIONS = (
    "--csv",
    *("--print-units", "base"),
    *("--metrics", ",".join(parsers.METRICS)),
    *("--kernel-name", f"regex:^({'|'.join(KERNELS)})$"),
    *("--profile-from-start", "off"),
    *("--clock-control", "none"),  # the card is measured as it is found
)


def profile(backend: Card | Dry, until: float) -> list[dict[str, Any]]:
    """An entry for each kernel, or one that says why there is none."""
    try:
        tool = backend.tool("ncu")
    except Missing as error:
        return [_nothing(str(error))]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        options = [*OPTIONS, "--log-file", str(log)]
        command = backend.command(tool, options, "gpu.profiled_calls", *["--dry"] * backend.dry)
        # LC_ALL: how numbers are written.
        process = subprocess.Popen(command, env={**os.environ, "LC_ALL": "C"}, start_new_session=True)
        why = ""
        try:
            status = process.wait(None if until == math.inf else until - time.time())
            why = f"ncu ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            why = "ncu was stopped: out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = backend.output(log, "ncu.csv")
    kernels = parsers.profile(text)
    if not kernels:
        return [_nothing("; ".join(filter(None, [why, parsers.complaint(text)])) or "ncu profiled no kernel")]
    seen = {kernel["kernel"] for kernel in kernels}
    return kernels + [_nothing(f"{name}: not seen") for name in KERNELS if name not in seen]


def _nothing(why: str) -> dict[str, Any]:
    return {"kernel": why, **dict.fromkeys(parsers.METRICS.values())}


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.profiling")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--until", type=float, default=math.inf)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is stopped
    backend = choose(options.dry)
    if reason := backend.why_not():
        print(f"profile: {reason}")
        return 1
    kernels = profile(backend, options.until)
    options.file.write_text(json.dumps(kernels, indent=1))
    for kernel in kernels:
        print(", ".join(f"{name} {value}" for name, value in kernel.items() if value is not None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
