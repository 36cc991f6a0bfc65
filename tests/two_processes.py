"""A program run in two processes that know one another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BEFORE = """
import os, sys, time
sys.path[:0] = os.environ["EXTRA_PATH"].split(os.pathsep)
import torch, torch.distributed as dist
folder, rank, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
"""

AFTER = """
# Gloo's threads sometimes abort a process that ends in the usual way: leave at once, when both have their results.
open(f"{folder}/{rank}.done", "w").close()
while not os.path.exists(f"{folder}/{1 - rank}.done"):
    time.sleep(0.01)
os._exit(0)
"""


def run(program: str, folder: Path, *arguments: str) -> None:
    """``program`` finds ``torch``, ``dist``, ``folder``, ``rank`` and ``arguments``, and leaves its results in files.

    Raises:
        AssertionError: with what they printed, where one of them fails.
    """
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "EXTRA_PATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BEFORE + program + AFTER, str(folder), str(rank), *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=200)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)
