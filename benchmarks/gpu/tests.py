"""Runs the tests marked cuda, and writes after each what is known: one that ends the process is named too.

python -m gpu.tests FILE [--dry]

FILE holds ``{"passed", "failed", "skipped", "failures": [names], "slowest": [[name, seconds]], "running": name}``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

SLOWEST = 10


class Recorder:
    """A plugin of pytest."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.outcomes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.running: str | None = None

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid
        self.write()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        # A test that passes may fail when it is torn down.
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_runtest_logfinish(self) -> None:
        self.running = None
        self.write()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
            self.write()

    @property
    def result(self) -> dict[str, Any]:
        slowest = sorted(self.seconds.items(), key=lambda item: -item[1])[:SLOWEST]
        outcomes = [*self.outcomes.values()]
        return {
            **{outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")},
            "failures": [name for name, outcome in self.outcomes.items() if outcome == "failed"],
            "slowest": [[name, round(seconds, 2)] for name, seconds in slowest],
            "running": self.running,
        }

    def write(self) -> None:
        self.file.write_text(json.dumps(self.result, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.tests")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.dry:
        os.environ["LOSSMETA_CUDA_DRY"] = "1"
    recorder = Recorder(options.file)
    recorder.write()
    arguments = ["-m", "cuda and not slow", f"--durations={SLOWEST}", "-q", "-p", "no:cacheprovider"]
    status = int(pytest.main(arguments, plugins=[recorder]))
    recorder.write()
    if not recorder.result["passed"] and not status:
        print("tests: none has run")
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
