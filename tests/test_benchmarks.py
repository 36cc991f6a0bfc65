"""How the benchmarks measure on a GPU, seen without one: clock, rotation, and runs that are cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from device import Cpu, Cuda, Dry, Rotation, Smoke, skipped_if_out_of_memory

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Clocked(Cuda):
    """A GPU whose time passes only in calls; its events have the resolution of CUDA's, milliseconds in float32."""

    type = "cpu"
    now = 0.0

    def __init__(self, cache: int = 2**20, memory: int = 2**40) -> None:
        super().__init__()
        self.cache, self.memory = cache, memory

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def _cache(self) -> int:
        return self.cache

    def _memory(self) -> int:
        return self.memory

    def _event(self) -> Any:
        now = self.now

        class Event:
            def elapsed_time(self, other: Any) -> float:
                return torch.tensor(1e3 * (other.now - now), dtype=torch.float32).item()

        event = Event()
        event.now = now  # type: ignore[attr-defined]
        return event

    def _synchronize(self) -> None:
        """Time has passed already."""

    _without_waiting = Dry._without_waiting
    _capture = Dry._capture


def test_the_timer_gives_seconds_also_late_in_a_run() -> None:
    gpu = Clocked()
    start = gpu.timer()
    gpu.pass_time(2.0)
    assert gpu.timer() - start == pytest.approx(2.0)
    for _ in range(100):
        gpu.pass_time(1000.0)
        gpu.timer()
    start = gpu.timer()
    gpu.pass_time(1e-3)
    assert gpu.timer() - start == pytest.approx(1e-3, rel=1e-5)


@pytest.mark.parametrize("size", [2**14, 2**15 + 1, 2**20, 2**22 - 1, 2**22, 2**30])
def test_few_sets_of_inputs_that_cover_the_cache_four_times(size: int) -> None:
    gpu = Clocked(cache=2**20)
    count = gpu._count(size)
    covered = 4 * 2**20
    assert count == gpu.MOST_SETS or count * size >= covered
    assert count == 1 or (count - 1) * size < covered


def test_rotation_stops_where_it_is_no_use_and_where_memory_ends() -> None:
    assert Clocked(cache=2**20)._count(0) == 1
    assert Clocked(cache=2**20)._count(2**20 // Cuda.MOST_SETS) == 1
    assert Clocked(cache=2**20, memory=2**24)._count(2**20) == 2


def test_calls_rotate_and_keep_their_results() -> None:
    alive: list[bool] = [False] * 3

    def call(i: int) -> Callable[[], Any]:
        class Result:
            def __init__(self) -> None:
                assert not alive[i]
                alive[i] = True

            def __del__(self) -> None:
                alive[i] = False

        return Result

    rotation = Rotation([call(i) for i in range(3)])
    for expected in ([True, False, False], [True, True, False], [True] * 3, [True] * 3):
        rotation()
        assert alive == expected
    rotation.forget()
    assert alive == [False] * 3


class Benchmark:
    """What ``time`` asks of pytest-benchmark's fixture."""

    def __init__(self, timer: Callable[[], float]) -> None:
        self.timer = timer

    def pedantic(self, call: Callable[[], Any], *, rounds: int, iterations: int, warmup_rounds: int) -> None:
        start = self.timer()
        for _ in range(rounds * iterations):
            call()
        self.seconds = (self.timer() - start) / (rounds * iterations)


def test_times_of_a_call_by_events_and_in_a_graph() -> None:
    gpu = Clocked(cache=2**10)
    benchmark, sets = Benchmark(gpu.timer), set()

    def make() -> tuple[torch.Tensor, float]:
        return torch.zeros(128), 3e-6

    def call(x: torch.Tensor, seconds: float) -> None:
        sets.add(x.data_ptr())
        gpu.pass_time(seconds)

    result = gpu.time(benchmark, call, make, dtype=torch.bfloat16, no_graph=None)
    assert benchmark.seconds == pytest.approx(3e-6, rel=1e-4)
    assert result["sets"] == len(sets) == 8
    assert result["host_us"] > 0
    # The clock stands still in a replay that is a plain call, but for the first.
    assert result["graph"] == pytest.approx(3e-6, rel=1e-4)
    assert (result["device"], result["dtype"], result["no_graph"]) == ("cuda", "bfloat16", None)
    result = gpu.time(benchmark, call, make, dtype=torch.float32, no_graph="it waits")
    assert (result["graph"], result["no_graph"]) == (None, "it waits")


def test_what_cannot_be_captured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Clocked()

    def refuse(function: Any) -> Any:
        raise RuntimeError("operation not permitted\nwhen capturing")

    monkeypatch.setattr(gpu, "_capture", refuse)
    assert gpu._graph(Rotation([lambda: gpu.pass_time(1e-6)]), 1e-6) == (None, "operation not permitted")


class Event:
    """As torch.cuda.Event, by the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at is not None

    def elapsed_time(self, later: Event) -> float:
        assert self.at is not None
        assert later.at is not None
        return 1e3 * (later.at - self.at)


class Graph:
    def replay(self) -> None:
        """Nothing was captured."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch.cuda is asked for is there, and does nothing but be listed."""
    called: list[str] = []

    @contextmanager
    def capture(graph: Graph, stream: str) -> Iterator[None]:
        assert stream == "stream"
        called.append("capture")
        yield

    generator = SimpleNamespace(
        clone_state=lambda: "clone", graphsafe_set_state=lambda state: called.append(f"generator {state}")
    )
    assert all(hasattr(torch.Generator, name) for name in vars(generator))
    properties = SimpleNamespace(L2_cache_size=2**12, total_memory=2**33)
    stubs: dict[str, Any] = {
        "Stream": lambda: "stream",
        "set_stream": lambda stream: called.append(f"set {stream}"),
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "synchronize": lambda: None,
        "empty_cache": lambda: called.append("empty_cache"),
        "set_sync_debug_mode": lambda mode: called.append(f"waiting: {mode}"),
        "get_device_properties": lambda: properties,
        "get_device_name": lambda: "NVIDIA Card",
        "current_device": lambda: 0,
        "default_generators": (generator,),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 300,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr("device.gc.freeze", lambda: None)
    monkeypatch.setattr("device.importlib.import_module", called.append)
    monkeypatch.setattr(Cuda, "type", "cpu")
    return called


def test_what_is_asked_of_torch_cuda(cuda: list[str]) -> None:
    gpu = Cuda()
    gpu.start()
    assert cuda[0] == "set stream"
    facts = gpu.facts()
    assert (facts["card"], facts["l2_bytes"], facts["memory_bytes"]) == ("NVIDIA Card", 2**12, 2**33)
    del cuda[:]
    benchmark = Benchmark(gpu.timer)
    options: dict[str, Any] = {"dtype": torch.float32, "no_graph": None}
    result = gpu.time(benchmark, torch.neg, lambda: (torch.zeros(1024),), **options)
    assert result["sets"] == 4
    assert 0 < benchmark.seconds < 1e-3
    assert cuda == ["waiting: error", "waiting: default", "capture"]
    assert gpu.peak_memory(lambda: lambda: None) == 200
    assert cuda[-1] == "empty_cache"
    gpu.captured(lambda: None)()
    assert cuda[-1] == "capture"

    def refuse() -> None:
        raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        gpu._capture(refuse)
    assert cuda[-1] == "generator clone"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room\nhints"), RuntimeError("out of memory: could not allocate")]
)
def test_without_memory_a_benchmark_is_skipped_and_frees_what_it_held(error: RuntimeError) -> None:
    freed = []

    class Held:
        def __del__(self) -> None:
            freed.append(True)

    def fail() -> None:
        held = Held()  # noqa: F841
        raise error

    with (
        pytest.raises(pytest.skip.Exception, match=r"^out of memory: ") as caught,
        skipped_if_out_of_memory(),
    ):
        fail()
    assert freed
    assert "hints" not in str(caught.value)


def test_other_errors_stay_errors() -> None:
    with pytest.raises(RuntimeError, match="another"), skipped_if_out_of_memory():
        raise RuntimeError("another")


def test_devices_are_of_one_shape() -> None:
    shape = {name for name in vars(Cpu) if not name.startswith("_")}
    assert shape <= set(dir(Cuda))
    assert shape <= set(dir(Dry))


def test_a_smoke_run_calls_once() -> None:
    calls: list[int] = []
    once = SimpleNamespace(pedantic=lambda call, rounds: [call() for _ in range(rounds)])
    assert Smoke().time(once, calls.append, lambda: (1,), dtype=torch.float32, no_graph=None) == {}
    assert calls == [1]


SUITE = """
import torch
def test_one(measure):
    measure(torch.neg, lambda: (torch.ones(8),), operator="op", size="8", candidate="lossmeta", bytes_moved=64)
def test_large(measure):
    raise torch.OutOfMemoryError("no room")
def test_bad(measure):
    raise ValueError("bad\\nindeed")
def test_lost(device):
    def lost():
        raise RuntimeError("illegal access")
    device.free = lost
def test_never(measure):
    raise AssertionError
"""


def test_a_run_that_is_cut_keeps_what_is_done_and_can_go_on(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((BENCHMARKS / "conftest.py").read_text())
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {BENCHMARKS}\n")
    file = tmp_path / "lines.jsonl"
    # pytest-benchmark does not measure in a worker of pytest-xdist, nor where it believes to be in one.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}

    def run(*options: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
        before = file.read_text() if file.exists() else ""
        command = [sys.executable, "-m", "pytest", "-rs", "--device", "dry", "--lines", str(file), *options]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        added = file.read_text()[len(before) :].strip().splitlines()
        return ended, [json.loads(line) for line in added]

    ended, (session, *records) = run()
    assert ended.returncode == 10
    assert "the device is lost: illegal access" in ended.stdout
    assert "1 failed, 2 passed, 1 skipped" in ended.stdout
    assert session["machine_info"]["device"]["name"] == "dry"
    results = {record.pop("name").partition("::")[2]: record for record in records}
    assert results["test_large"] == {"skipped": "out of memory: no room"}
    assert results["test_bad"] == {"failed": "bad"}
    assert results["test_one"]["stats"]["median"] > 0
    info = results["test_one"]["extra_info"]
    assert (info["operator"], info["device"], info["dtype"]) == ("op", "dry", "float32")
    assert info["graph"] > 0
    assert info["host_us"] > 0

    file.write_text(file.read_text() + '{"name": "cut')
    ended, (_, *records) = run("--seconds", "0")
    assert "3 skipped, 2 deselected" in ended.stdout
    assert ended.stdout.count(Dry.note or "") == 2
    assert [record["name"].partition("::")[2] for record in records] == [
        "test_large",
        "test_lost",
        "test_never",
    ]
    assert {record["skipped"] for record in records} == {"the 0 seconds of --seconds are over"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_is_a_reason() -> None:
    assert Cuda().why_not() == "torch sees no CUDA device"
