"""compute-sanitizer on small calls of every kernel of lossmeta, its tools beside one another.

python -m gpu.sanitizer FILE [--dry] [--until TIME]

FILE holds ``{tool: {"errors": number or null, "summary": text}}``, and is written anew whenever a tool has ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PLANTED = "memcheck_planted"
ALL_MADE = "all calls made"  # what gpu.small_calls says last
ENDED_EARLY, OUT_OF_TIME = "the calls ended early", "out of time"
NOT_FOUND = "A PLANTED FAULT WAS NOT FOUND"
# Every kernel of lossmeta has its namespace in its mangled name; those of PyTorch are left alone.
OPTIONS = ("--kernel-name", "kns=8lossmeta4cuda", "--error-exitcode", "86", "--show-backtrace", "device")
PORTS = 49152  # the first; each tool has a range of its own


class Run:
    """One tool on the calls, in the background."""

    def __init__(self, backend: Card | Dry, tool: list[str], name: str, number: int, folder: Path) -> None:
        self.name = name
        self.backend = backend
        self.log, self.said = folder / f"{name}.log", folder / f"{name}.out"
        kind = name.partition("_")[0]
        options = [*OPTIONS, "--tool", kind, "--print-limit", "20"]
        options += ["--padding", "4096"] if kind == "memcheck" else []  # the next tensor is not right behind
        options += ["--port", str(PORTS + 20 * number), "--log-file", str(self.log)]
        module = ["gpu.small_calls"] + ["--dry"] * backend.dry + ["--planted"] * (name == PLANTED)
        # Each tensor in memory of its own: in the allocator's large blocks nothing is out of bounds.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "LC_ALL": "C"}
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                backend.command(tool, options, *module),
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict[str, Any]:
        text = self.backend.output(self.log, f"{self.name}.txt")
        result = parsers.sanitizer(text)
        said = self.said.read_text(encoding="utf-8", errors="replace").strip()
        if result["errors"] == 0 and ALL_MADE not in said:
            last = said.splitlines()[-1] if said else "they said nothing"
            result = {"errors": None, "summary": f"{ENDED_EARLY}: {last}; {result['summary']}"}
        if result["errors"] != 0 and self.name != PLANTED:
            print(f"---- {self.name}\n{text[:3000]}\n{said[-1500:]}", flush=True)
        return result


def look(backend: Card | Dry, until: float, file: Path) -> dict[str, Any]:
    """All tools at once; what is not done in time is stopped."""
    results: dict[str, Any] = {tool: {"errors": None, "summary": "did not run"} for tool in TOOLS}
    try:
        tool = backend.tool("compute-sanitizer")
    except Missing as error:
        results = {name: {"errors": None, "summary": str(error)} for name in TOOLS}
        file.write_text(json.dumps(results, indent=1))
        return results
    with tempfile.TemporaryDirectory() as folder:
        # In a rehearsal reading beyond the end of memory would be no joke.
        names = [*TOOLS] if backend.dry else [*TOOLS, PLANTED]
        runs = [Run(backend, tool, name, i, Path(folder)) for i, name in enumerate(names)]
        try:
            while runs and time.time() < until:
                for run in [run for run in runs if run.process.poll() is not None]:
                    results[run.name] = run.result()
                    runs.remove(run)
                    _write(results, file)
                time.sleep(0.1)
        finally:
            for run in runs:
                run.stop()
        for run in runs:
            found = parsers.sanitizer(run.backend.output(run.log, ""))
            results[run.name] = {
                "errors": found["errors"] or None,
                "summary": f"{OUT_OF_TIME}; {found['summary']}",
            }
        if backend.dry:
            results[PLANTED] = parsers.sanitizer(backend.output(Path(), f"{PLANTED}.txt"))
        return _write(results, file)


def _write(results: dict[str, Any], file: Path) -> dict[str, Any]:
    """Without the planted fault, of which memcheck's summary tells."""
    shown = {name: dict(result) for name, result in results.items() if name != PLANTED}
    if planted := results.get(PLANTED):
        found = "a planted fault was found" if planted["errors"] else f"{NOT_FOUND}: {planted['summary']}"
        shown["memcheck"]["summary"] += f"; {found}"
    file.write_text(json.dumps(shown, indent=1))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.sanitizer")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--until", type=float, default=float("inf"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is stopped
    backend = choose(options.dry)
    if reason := backend.why_not():
        print(f"sanitizer: {reason}")
        return 1
    results = look(backend, options.until, options.file)
    for name, result in results.items():
        print(f"{name}: {'no result' if result['errors'] is None else result['errors']}; {result['summary']}")
    return status(results)


def status(results: dict[str, Any]) -> int:
    """The exit status: 1 if something was found or the calls failed. A tool that does not work here is no failure."""
    summaries = " ".join(result["summary"] for result in results.values())
    if (
        any(result["errors"] for result in results.values())
        or ENDED_EARLY in summaries
        or NOT_FOUND in summaries
    ):
        return 1
    return 124 if OUT_OF_TIME in summaries else 0


if __name__ == "__main__":
    sys.exit(main())
