"""Peak memory on the CPU, from the allocator's own events: the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

WARM_UP = 2


def peak_memory(make: Callable[[], Callable[[], Any]]) -> int:
    """Most bytes allocated at once during a step.

    ``make()`` builds all that the step uses and returns it. Counted is everything since: batches, parameters,
    gradients, optimizer state, activations, and the operators' own temporaries.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step = make()
        for _ in range(WARM_UP):
            step()
        with record_function("measured"):
            step()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns())  # type: ignore[union-attr]
    start = next(e.start_ns() for e in events if e.name() == "measured")
    end = next(e.end_ns() for e in events if e.name() == "measured")
    allocated = peak = 0
    for event in events:
        if event.name() == "[memory]":
            allocated += event.nbytes()
            if start <= event.start_ns() <= end:
                peak = max(peak, allocated)
    return peak
