"""What the sweep checks of a case: its error, and its bits in poisoned memory, on a side stream, in a graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.backend import Card, Dry
from gpu.case import Case, Draw
from gpu.evaluation import (
    evaluate,
    evaluate_by_chunks,
    exactly,
    nudged,
    outputs_of,
    result_names,
    select,
    widely,
)
from gpu.judge import Verdict, judge, same_bits

LOST = "the device is lost"
POISONS = (255, 63)  # memory full of NaN, then of 0.75: a result that depends on it differs
NUDGES = 2
POISONED = (1000, 300_000, 5_000_000, 60_000_000)  # bytes: of small and large segments

Pulls = list[Tensor | None]


class Checks:
    """Of cases, on a backend."""

    def __init__(self, backend: Card | Dry) -> None:
        self.backend = backend

    def record(self, case: Case, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        """The line of a case."""
        start = time.monotonic()
        record = nothing_known(case, dtype, seed)
        try:
            if self.backend.free_bytes() < case.gibibytes * 2**30:
                free = self.backend.free_bytes() / 2**30
                note = f"skipped: it takes {case.gibibytes:g} GiB of memory, {free:.0f} are free"
            else:
                note = self._run(case, dtype, seed, record)
        except Exception as error:
            note = f"{type(error).__name__}: {_first_line(error)}"
            # An operator has only a RuntimeError to say it with.
            record["ok"] = None if case.large and "out of memory" in note.lower() else False
        # Here no frame of the case holds its tensors any more.
        if self.backend.is_lost():
            note, record["ok"] = f"{LOST}: {note}", False
        elif case.large or record["ok"] is not True:
            self.backend.release()
        return {**record, "seconds": round(time.monotonic() - start, 3), "note": note}

    def _run(self, case: Case, dtype: torch.dtype, seed: int, record: dict[str, Any]) -> str:
        """Fills in the record, and returns the note."""
        draw = Draw(seed, dtype, self.backend.device, self.backend.size)
        inputs = case.make(draw)
        pulls = self._pulls(case, draw, inputs)
        call = partial(evaluate, case.ours, inputs, pulls)
        notes = []

        # Twice, with both results kept: then there are blocks of every size to poison.
        kept = [call() for _ in range(2 if case.checks else 1)]
        sizes = [t.nbytes for t in kept[0]]
        del kept
        self.backend.poison(POISONS[0], sizes)
        results = call()
        self.backend.poison(POISONS[1], sizes)
        again = call()
        record["bit_equal"] = same_bits(again, results)
        del again
        if case.large:
            self.backend.release()

        verdicts = self._compare(case, dtype, inputs, pulls, results, draw)
        worst = max(verdicts, key=lambda verdict: verdict.share)
        record.update(error=worst.error, allowed=worst.allowed)
        notes += [f"{v.name}: error {v.error:.3g}, allowed {v.allowed:.3g}" for v in verdicts if not v.ok]
        if len(verdicts) > 1 and not notes:
            notes.append(f"worst: {worst.name}")
        if case.checks:
            record["side_stream"] = self._side_stream(case, call, results, verdicts)
            try:
                record["replay"] = self._replay(case, draw, inputs, pulls, results, verdicts)
            except RuntimeError as error:
                record["replay"] = False
                notes.append(f"not captured: {_first_line(error)}")
        else:
            notes.append("no side stream, no graph: not enough memory for both")
        unequal = [what for what in ("bit_equal", "side_stream", "replay") if record[what] is False]
        record["ok"] = all(v.ok for v in verdicts) and not unequal
        return "; ".join(notes)

    def _pulls(self, case: Case, draw: Draw, inputs: Mapping[str, Tensor]) -> Pulls:
        """Incoming gradients of the outputs that have one."""
        outputs = outputs_of(case.ours, inputs)
        return [
            draw.normal(*o.shape, dtype=o.dtype).add_(0.5)
            if o.requires_grad and (case.pulled is None or name in case.pulled)
            else None
            for name, o in zip(case.outputs, outputs, strict=True)
        ]

    def _compare(
        self,
        case: Case,
        dtype: torch.dtype,
        inputs: Mapping[str, Tensor],
        pulls: Pulls,
        results: list[Tensor],
        draw: Draw,
    ) -> list[Verdict]:
        names = result_names(case.outputs, inputs)
        verdicts = []
        if case.pick:
            verdicts = [
                Verdict(f"{name}, elsewhere", 0.0 if _all_finite(r) else float("nan"), 0.0)
                for name, r in zip(names, results, strict=True)
            ]
            first = inputs[case.by_row[0]]
            rows = case.pick(*first.shape[:2]).to(first.device)
            inputs, pulls = select(inputs, pulls, case.by_row, rows)
            results = [r[rows] for r in results]
        expected = self._theirs(case, exactly, inputs, pulls)
        theirs = self._several(case, dtype, inputs, pulls, draw)
        floors = case.all_floors(dtype, names)
        return judge(names, results, theirs, expected, case.precision_for(dtype), floors) + verdicts

    def _several(
        self, case: Case, dtype: torch.dtype, inputs: Mapping[str, Tensor], pulls: Pulls, draw: Draw
    ) -> Iterator[list[Tensor]]:
        """PyTorch's composition; again at inputs that are off by a rounding, so that its luck does not judge."""
        yield self._theirs(case, widely, inputs, pulls)
        if case.precision_for(dtype) == torch.float64 or case.gibibytes:
            return
        wide, pulls = widely(inputs, pulls)
        for _ in range(NUDGES):
            yield self._theirs(case, widely, nudged(wide, draw.generator), pulls)

    def _theirs(
        self, case: Case, cast: Callable[..., Any], inputs: Mapping[str, Tensor], pulls: Pulls
    ) -> list[Tensor]:
        inputs, pulls = cast(inputs, pulls)
        if case.chunk is None:
            return evaluate(case.theirs, inputs, pulls)
        return evaluate_by_chunks(case.theirs, inputs, pulls, case.by_row, case.chunk(inputs))

    def _side_stream(
        self, case: Case, call: Callable[[], list[Tensor]], results: list[Tensor], verdicts: list[Verdict]
    ) -> bool:
        with self.backend.side_stream():
            call()
            self.backend.poison(POISONS[0], [t.nbytes for t in results])
            aside = call()
        self.backend.synchronize()
        return self._same(case, aside, results, verdicts)

    def _replay(
        self,
        case: Case,
        draw: Draw,
        inputs: Mapping[str, Tensor],
        pulls: Pulls,
        results: list[Tensor],
        verdicts: list[Verdict],
    ) -> bool:
        """Whether a graph gives what a call gives, and again for inputs put in the place of the captured ones."""
        fresh = case.make(draw)
        fresh_pulls = self._pulls(case, draw, fresh)
        expected = evaluate(case.ours, fresh, fresh_pulls)
        replay = self.backend.capture(partial(evaluate, case.ours, inputs, pulls))
        if not self._same(case, replay(), results, verdicts):
            return False
        with torch.no_grad():
            for static, new in zip((*inputs.values(), *pulls), (*fresh.values(), *fresh_pulls), strict=True):
                if static is not None and new is not None:
                    static.copy_(new)
        return self._same(case, replay(), expected, verdicts)

    def _same(
        self, case: Case, actual: list[Tensor], expected: list[Tensor], verdicts: list[Verdict]
    ) -> bool:
        """Bit for bit; where other matrix products may be part of it, as close as to float64."""
        if case.own_bits or same_bits(actual, expected):
            return same_bits(actual, expected)
        return all(
            bool((a.double() - e.double()).abs().max() <= 2 * v.allowed)
            for a, e, v in zip(actual, expected, verdicts, strict=True)
        )

    def self_test(self) -> dict[str, Any]:
        """Whether poison is what a tensor is made of that is asked for next."""
        start = time.monotonic()

        def ask() -> list[Tensor]:
            return [torch.empty(n, dtype=torch.uint8, device=self.backend.device) for n in POISONED]

        asked = ask()
        del asked
        filled = self.backend.poison(POISONS[0], POISONED)
        hits = sum(bool((t == POISONS[0]).all()) for t in ask())
        return {
            "operator": "self-test",
            "case": "poisoned memory",
            "dtype": "uint8",
            "seed": None,
            "error": None,
            "allowed": None,
            "ok": self.backend.dry or hits == len(POISONED),
            "bit_equal": None,
            "side_stream": None,
            "replay": None,
            "seconds": round(time.monotonic() - start, 3),
            "note": f"{filled} bytes filled, {hits} of {len(POISONED)} blocks poisoned",
        }


def nothing_known(case: Case, dtype: torch.dtype, seed: int | None) -> dict[str, Any]:
    """The line of a case that has not run."""
    return {
        "operator": case.operator,
        "case": case.name,
        "dtype": dtype_name(dtype),
        "seed": seed,
        **dict.fromkeys(("error", "allowed", "ok", "bit_equal", "side_stream", "replay")),
    }


def _all_finite(t: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in t.reshape(-1).split(2**28))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
