"""How every benchmark here measures: one group holds the baselines and lossmeta on the same input and threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lossmeta


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["lossmeta"] = lossmeta.info()


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark: Any, threads: int) -> Callable[..., Any]:
    """``measure(function, operator=, size=, candidate=, bytes_moved=)``: times ``function()``.

    ``candidate`` is ``"eager"``, ``"compile"``, another baseline's name, or ``"lossmeta"``; ``bytes_moved`` the least
    memory traffic that the operation needs, forward and backward together.
    """

    def run(
        function: Callable[[], Any],
        *,
        operator: str,
        size: str,
        candidate: str,
        bytes_moved: int,
        **info: Any,
    ) -> Any:
        benchmark.group = f"{operator} | {size} | {threads}"
        benchmark.extra_info.update(
            operator=operator,
            size=size,
            candidate=candidate,
            threads=threads,
            bytes_moved=bytes_moved,
            **info,
        )
        # A candidate is compiled for its own size: never a recompilation for many sizes, nor the limit on those.
        torch._dynamo.reset()
        function()
        return benchmark.pedantic(function, rounds=_rounds(benchmark, function), warmup_rounds=3)

    return run


def _rounds(benchmark: Any, function: Callable[[], Any]) -> int:
    """Enough rounds for a steady median in about half a second; one in a smoke run."""
    import os
    import time

    if os.environ.get("LOSSMETA_BENCHMARK_SMOKE"):
        return 1
    start = time.perf_counter()
    function()
    elapsed = time.perf_counter() - start
    return int(min(2000, max(15, 0.5 / max(elapsed, 1e-6))))
