"""Every operator against float64 on the device; its bits in poisoned memory, on a side stream, and in a graph.

python -m gpu.sweep FILE [--dry] [--until TIME] [--seed N] [--only TEXT] [--go-on]

Each case is one line of JSON in FILE, written when it is known. ``--seed`` and ``--only`` repeat a line: the seed and a
part of "operator case dtype". A case that hangs, or that leaves the device unusable, ends the process with status 10;
``--go-on`` then does what is left of the other operators. No case is started after ``--until``, in seconds since 1970.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lines import Lines, read

from gpu.backend import choose
from gpu.case import Case
from gpu.cases import all_cases
from gpu.checks import LOST, Checks, dtype_name, nothing_known
from lossmeta.ops import FallbackWarning

DEVICE_LOST = 10  # exit status: what is left needs a new process, with --go-on
DOUBT = 4.0  # an error that is larger than allowed by less than this may be bad luck: two more seeds decide


def jobs(only: str) -> list[tuple[Case, torch.dtype]]:
    """Cheap ones of every operator first, then the large ones."""
    pairs = [(case, dtype) for case in all_cases() for dtype in case.dtypes]
    return [
        (case, dtype) for case, dtype in pairs if only in f"{case.operator} {case.name} {dtype_name(dtype)}"
    ]


def settled(checks: Checks, case: Case, dtype: torch.dtype, seed: int | None) -> dict[str, Any]:
    """The line of a case; without a seed, one that three fresh ones agree on where the first left a doubt."""
    if seed is not None:
        return checks.record(case, dtype, seed)
    first = checks.record(case, dtype, _fresh_seed())
    if not _is_doubtful(first):
        return first
    for _ in range(2):
        again = checks.record(case, dtype, _fresh_seed())
        if not _is_doubtful(again):
            again["note"] = f"seed {first['seed']} gave {first['note']}; {again['note']}"
            return again
    return first


def _fresh_seed() -> int:
    return random.SystemRandom().getrandbits(31)


def _is_doubtful(record: Mapping[str, Any]) -> bool:
    """Whether nothing is wrong but an error that is slightly too large."""
    if record["ok"] is not False or record["error"] is None:
        return False
    bits = (record["bit_equal"], record["side_stream"], record["replay"])
    return False not in bits and record["error"] <= DOUBT * record["allowed"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.sweep")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--until", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--only", default="")
    parser.add_argument("--go-on", action="store_true", help="after what FILE holds already")
    options = parser.parse_args()
    backend = choose(options.dry)
    if reason := backend.why_not():
        print(f"sweep: {reason}")
        return 1
    records = read(options.file)[0] if options.go_on else []
    if not options.go_on:
        options.file.unlink(missing_ok=True)
    done = {(r["operator"], r["case"], r["dtype"]) for r in records}
    lost = {r["operator"] for r in records if str(r["note"]).startswith(LOST)}
    warnings.simplefilter("error", FallbackWarning)  # the reference would agree with itself
    gc.freeze()  # what is imported need not be searched again
    lines, checks = Lines(options.file), Checks(backend)
    if not options.go_on:
        records.append(checks.self_test())
        lines.add(records[-1])
    left_out = 0
    for case, dtype in jobs(options.only):
        if (case.operator, case.name, dtype_name(dtype)) in done:
            continue
        if case.operator in lost or time.time() >= options.until:
            left_out += 1
            continue
        hung = (lines, case, dtype, backend.patience)
        watch = threading.Timer(backend.patience, _give_up, hung)
        watch.daemon = True
        watch.start()
        record = settled(checks, case, dtype, options.seed)
        watch.cancel()
        lines.add(record)
        records.append(record)
        if not record["ok"]:
            print(_told(record), flush=True)
        if str(record["note"]).startswith(LOST):
            _leave()
    return _summary(records, left_out, lost)


def _give_up(lines: Lines, case: Case, dtype: torch.dtype, seconds: float) -> None:
    """Called while a case waits for the device."""
    record = nothing_known(case, dtype, None)
    note = f"{LOST}: it has not answered for {seconds:.0f} seconds"
    lines.add({**record, "ok": False, "seconds": seconds, "note": note})
    print(_told({**record, "ok": False, "note": note}), flush=True)
    _leave()


def _leave() -> NoReturn:
    """At once: with a device that is lost an orderly end may fail."""
    sys.stdout.flush()
    os._exit(DEVICE_LOST)


def _told(record: Mapping[str, Any]) -> str:
    what = "FAILED" if record["ok"] is False else "skipped"
    unequal = [k for k in ("bit_equal", "side_stream", "replay") if record[k] is False]
    return (
        f"{what}: {record['operator']} {record['case']} {record['dtype']} seed {record['seed']}: "
        + "; ".join(filter(None, [", ".join(f"{k} is false" for k in unequal), record["note"]]))
    )


def _summary(records: Sequence[Mapping[str, Any]], left_out: int, lost: set[str]) -> int:
    """Printed, and the exit status: 1 if something was found."""
    failed = [r for r in records if r["ok"] is False]
    for operator in dict.fromkeys(r["operator"] for r in records):
        own = [r for r in records if r["operator"] == operator]
        shares = [r["error"] / r["allowed"] for r in own if r["error"] is not None and r["allowed"]]
        worst = f", worst error {max(shares):.2f} of what is allowed" if shares else ""
        seconds = sum(r["seconds"] for r in own)
        bad = sum(r["ok"] is False for r in own)
        print(f"{operator}: {len(own)} cases, {bad} failed{worst}, {seconds:.1f} s")
    skipped = sum(r["ok"] is None for r in records)
    print(f"sweep: {len(records)} cases, {len(failed)} failed, {skipped} skipped, {left_out} left out")
    if lost:
        print(
            f"sweep: the device was lost, and what was left of these operators not tried: {', '.join(sorted(lost))}"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
