"""Runs a small recipe in processes that are killed, interrupted or short of disk; started by test_kill.py.

One interpreter with torch loaded forks them all: to load it takes longer than the recipe does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lossmeta import experiments, plot
from lossmeta.experiments import Measure, Method, Task, Trial, Tuned

MEASURES = (Measure("error", higher_is_better=False),)
KILLS = 25


def prepare(seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(50, 4, device=device)


def method(label: str, rate: float) -> Method:
    """A few steps of a linear fit, with random numbers of every kind, some of them from what methods share."""

    def train(trial: Trial) -> dict[str, float | None]:
        if "target" not in trial.scratch:
            with trial.seeded(7):
                trial.scratch["target"] = torch.randn(50)
        weights = torch.randn(4) + random.random()
        for step in range(20):
            error = trial.data @ weights - trial.scratch["target"]
            weights = weights - rate * trial.data.T @ error / 50
            trial.progress(step / 20)
        time.sleep(0.01)
        return {"error": error.square().mean().item()}

    return Method(label, train, {"rate": rate})


def run(folder: Path) -> int:
    rates = tuple(method(f"plain, rate {rate:g}", rate) for rate in (0.01, 0.1))
    return experiments.run(
        "toy",
        [Task(name, prepare, MEASURES, {"name": name}) for name in ("first", "second")],
        [method("plain", 0.01), Tuned("tuned", rates, "error", (100, 101)), method("other", 0.05)],
        seeds=4,
        device="cpu",
        folder=folder,
        settings={},
        reference="plain",
        threads=1,
    )


def fork(work: Callable[[], int], output: Path) -> int:
    """The process's number; what it writes goes to a file. An interrupt waits until it can be caught."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return child
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            status = work()
        except BaseException as error:
            print(repr(error), flush=True)
            status = 99
        sys.stdout.flush()
        os._exit(status)


def ended(child: int) -> int:
    """Its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trials(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "trials.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in t.items() if k not in ("seconds", "peak_memory")} for t in found]


def check(condition: bool, *what: Any) -> None:
    if not condition:
        raise SystemExit(" ".join(map(str, what)))


def kill(work: Path, whole: Path, seconds: float) -> None:
    """At random moments, a run going on until it is whole; then another, until there were enough."""
    rng = random.Random(0)
    kills = runs = 0
    torn = 0
    while kills < KILLS:
        runs += 1
        folder = work / f"killed-{runs}"
        while True:
            child = fork(lambda folder=folder: run(folder), work / "output")  # type: ignore[misc]
            time.sleep(rng.uniform(0, seconds / 4))
            os.kill(child, signal.SIGKILL)
            status = ended(child)
            if status == 0:
                break
            check(status == -signal.SIGKILL, "ended with", status, (work / "output").read_text())
            kills += 1
            with contextlib.suppress(FileNotFoundError):
                torn += not (folder / "trials.jsonl").read_bytes().endswith(b"\n")
            if kills >= KILLS:
                check(ended(fork(lambda folder=folder: run(folder), work / "output")) == 0)  # type: ignore[misc]
                break
        check(trials(folder) == trials(whole), "other trials after", kills, "kills:", folder)
    print(f"{kills} kills, {runs} runs, {torn} torn")


def _finished(folder: Path) -> int:
    path = folder / "trials.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _is_over(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def interrupt(work: Path, whole: Path) -> None:
    """Ctrl-C at random moments, after more and more trials, names what is on the disk."""
    rng, folder = random.Random(1), work / "interrupted"
    stopped = 0
    for wanted in (0, 1, 2, 5, 9, 14, 20):
        child = fork(lambda: run(folder), work / "output")
        while _finished(folder) < wanted and not _is_over(child):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGINT)  # also one that is over has its number until it is waited for
        status, said = ended(child), (work / "output").read_text()
        if status == 0:
            break
        # Before the run has begun, there is nothing that could catch it.
        check(status == 130 or "KeyboardInterrupt" in said, "ended with", status, said)
        if status == 130:
            stopped += 1
            path = folder / "trials.jsonl"
            count = len(trials(folder)) if path.exists() else 0
            expected = f"{count} trial{'s are' if count > 1 else ' is'} in {path}, the same command goes on from there"
            nothing = "no trial was finished, nothing is kept"
            check((expected if count else nothing) in said, "expected", expected, "got", said)
    check(stopped > 0, "no interrupt met the run")
    check(ended(fork(lambda: run(folder), work / "output")) == 0, (work / "output").read_text())
    check(trials(folder) == trials(whole), "other trials after interrupts")
    print(f"{stopped} interrupts")


def fill(work: Path, whole: Path) -> None:
    """No file may grow beyond what is left of the disk."""
    folder = work / "full"

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
        return run(folder)

    status, said = ended(fork(limited, work / "output")), (work / "output").read_text()
    check(status == 1 and "the results could not be written" in said, "ended with", status, said)
    kept = trials(folder)
    check(f"{len(kept)} trials are in {folder / 'trials.jsonl'}" in said, said)
    check(0 < len(kept) < len(trials(whole)), len(kept), "trials")
    check(ended(fork(lambda: run(folder), work / "output")) == 0, (work / "output").read_text())
    check(trials(folder) == trials(whole), "other trials after a full disk")
    print(f"full after {len(kept)} trials")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    torch.set_num_threads(1)
    plot.installed = lambda: False
    work = Path(sys.argv[1])
    start = time.monotonic()
    check(ended(fork(lambda: run(work / "whole"), work / "output")) == 0, (work / "output").read_text())
    seconds = time.monotonic() - start
    kill(work, work / "whole", seconds)
    interrupt(work, work / "whole")
    fill(work, work / "whole")
