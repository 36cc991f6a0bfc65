"""What differs between the devices that the benchmarks run on: an object for each, all of one shape.

``Dry`` is ``Cuda`` with CPU tensors and another clock: it runs what a GPU would run, to be sure of it beforehand.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import peak_memory
import pytest
import torch
from torch import Tensor

Call = Callable[[], Any]
Make = Callable[[], Sequence[Any]]

GPU_DTYPES = [torch.float32, torch.bfloat16]
DTYPES = {"cpu": [torch.float32], "cuda": GPU_DTYPES, "dry": GPU_DTYPES}


def _is_smoke_run() -> bool:
    return bool(os.environ.get("LOSSMETA_BENCHMARK_SMOKE"))


class Cpu:
    """The host's clock around single calls on one set of inputs."""

    name = "cpu"
    threads: Sequence[int] = (1, 2)
    timer: Callable[[], float] | None = None
    captures = False
    note: str | None = None

    def why_not(self) -> str | None:
        """Why nothing can be measured here, if so."""
        return None

    def start(self) -> None:
        """Called once, before the first benchmark."""

    def facts(self) -> dict[str, Any]:
        return {"name": self.name}

    def column(self, threads: int, dtype: torch.dtype) -> str:
        """What sets a group of benchmarks apart from others of the same operator and size."""
        return str(threads)

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return torch.compile(function, **options)

    def time(
        self,
        benchmark: Any,
        function: Callable[..., Any],
        make: Make,
        *,
        dtype: torch.dtype,
        no_graph: str | None,
    ) -> dict[str, Any]:
        """Times ``function(*make())``, and returns what else there is to say of it.

        Args:
            benchmark: pytest-benchmark's fixture, which keeps the times.
            function: what is timed.
            make: makes a set of its arguments.
            dtype: of the inputs.
            no_graph: why a CUDA graph of it is not to be tried, if so.
        """
        torch.manual_seed(0)
        call = partial(function, *make())
        call()
        benchmark.pedantic(call, rounds=self._rounds(call), warmup_rounds=3)
        return {}

    def captured(self, function: Call) -> Call:
        """``function`` as a CUDA graph, on tensors that stay where they are."""
        return function

    def peak_memory(self, make: Callable[[], Call]) -> int | None:
        """Most bytes allocated at once during a step of ``make()``, all that it has made included."""
        return peak_memory.peak_memory(make)

    def free(self) -> None:
        """Called after every benchmark."""

    def _rounds(self, call: Call) -> int:
        """Enough rounds for a steady median in about half a second."""
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        return int(min(2000, max(15, 0.5 / max(elapsed, 1e-6))))


class Smoke(Cpu):
    """Every benchmark of the CPU once, with one thread, to see that it runs: its figures mean nothing."""

    name = "smoke"
    threads = (1,)
    note = "SMOKE: every benchmark ran once; no figure means anything"

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        # Traced and differentiated as ever. The code that Inductor would write takes most of a run to compile.
        return torch.compile(function, backend="aot_eager", **options)

    def time(
        self,
        benchmark: Any,
        function: Callable[..., Any],
        make: Make,
        *,
        dtype: torch.dtype,
        no_graph: str | None,
    ) -> dict[str, Any]:
        torch.manual_seed(0)
        benchmark.pedantic(partial(function, *make()), rounds=1)
        return {}

    def peak_memory(self, make: Callable[[], Call]) -> int | None:
        return None  # a profile of several steps for each, and tests measure with it anyway


class Cuda:
    """CUDA events around many calls, over sets of inputs that together do not fit into the cache."""

    name = "cuda"
    type = "cuda"
    threads: Sequence[int] = ()  # not parametrised: as many as there are
    captures = True
    note: str | None = None

    WARM_UP = 5  # one more than OnlineLearner takes until it has captured its step
    CACHES = 4  # sizes of the L2 cache that the sets of inputs cover
    MOST_SETS = 128
    ROUND = 5e-3  # seconds between two events, unless a single call takes longer
    TOTAL = 0.1
    ROUNDS = (3, 20)
    GRAPH = 2e-3  # seconds of calls in a graph: a replay adds two small kernels of its own
    MOST_PASSES = 64
    HOST = (3, 50)

    def __init__(self) -> None:
        self._last: Any = None
        self._seconds = 0.0

    def why_not(self) -> str | None:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        from lossmeta import _build  # not before: what a machine is, is asked before anything is built there

        return _build.why_no_cuda

    def start(self) -> None:
        # All on one stream that is not the default one: autograd keeps to the stream of the forward pass, and a graph
        # can be captured on no other.
        self._stream = torch.cuda.Stream()
        torch.cuda.set_stream(self._stream)
        torch.backends.cuda.matmul.allow_tf32 = False
        importlib.import_module("torch._inductor.compile_fx")
        gc.collect()
        gc.freeze()  # what is imported need not be searched after every benchmark

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "card": self._card(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
            "l2_bytes": self._cache(),
            "memory_bytes": self._memory(),
        }

    def column(self, threads: int, dtype: torch.dtype) -> str:
        return _name(dtype)

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return torch.compile(function, **options)

    def time(
        self,
        benchmark: Any,
        function: Callable[..., Any],
        make: Make,
        *,
        dtype: torch.dtype,
        no_graph: str | None,
    ) -> dict[str, Any]:
        torch.manual_seed(0)
        rotation = Rotation(self._sets(function, make))
        for _ in range(max(self.WARM_UP, len(rotation.calls))):
            rotation()
        seconds = self._estimate(rotation)
        rounds, iterations = self._plan(seconds)
        benchmark.pedantic(rotation, rounds=rounds, iterations=iterations, warmup_rounds=1)
        host = self._host(rotation, seconds)
        graph, reason = (None, no_graph) if no_graph else self._graph(rotation, seconds)
        return {
            "device": self.name,
            "dtype": _name(dtype),
            "sets": len(rotation.calls),
            "host_us": 1e6 * host,
            "graph": graph,
            "no_graph": reason,
        }

    def captured(self, function: Call) -> Call:
        for _ in range(3):
            function()
        return self._capture(function)

    def peak_memory(self, make: Callable[[], Call]) -> int | None:
        with torch.device(self.type):
            self.free()
            before = self._reset_peak()
            step = make()
            for _ in range(self.WARM_UP):
                step()
        return self._peak(before)

    def free(self) -> None:
        gc.collect()
        self._empty_cache()

    # ---- Sets of inputs.

    def _sets(self, function: Callable[..., Any], make: Make) -> list[Call]:
        with torch.device(self.type):
            first = make()
            size = sum(argument.nbytes for argument in first if isinstance(argument, Tensor))
            others = [make() for _ in range(self._count(size) - 1)]
        return [partial(function, *inputs) for inputs in (first, *others)]

    def _count(self, size: int) -> int:
        """As few sets of ``size`` bytes as cover the cache several times; one where the most that we take would fit."""
        if size * self.MOST_SETS <= self._cache():
            return 1
        covered = min(self.CACHES * self._cache(), self._memory() // 8)
        return max(1, min(self.MOST_SETS, math.ceil(covered / size)))

    # ---- Times.

    def timer(self) -> float:
        """Seconds on the GPU's clock, once all that was launched is done."""
        event = self._event()
        if self._last is not None:
            # From event to event: a float32 of milliseconds since the first one would soon be too coarse.
            self._seconds += self._between(self._last, event)
        self._last = event
        return self._seconds

    def _estimate(self, call: Call) -> float:
        """Seconds of a call."""
        seconds, count = 0.0, 1
        for _ in range(2):
            start = self.timer()
            for _ in range(count):
                call()
            seconds = max((self.timer() - start) / count, 1e-7)
            count = _within(self.ROUND / seconds, 1, 100)
        return seconds

    def _plan(self, seconds: float) -> tuple[int, int]:
        """Rounds, and calls in each, for calls of so many seconds."""
        if _is_smoke_run():
            return 1, 1
        iterations = max(1, math.ceil(self.ROUND / seconds))
        return _within(self.TOTAL / (iterations * seconds), *self.ROUNDS), iterations

    def _host(self, call: Call, seconds: float) -> float:
        """Median seconds until a call returns, with an idle GPU and nothing waited for."""
        times = []
        for _ in range(_within(self.TOTAL / seconds, *self.HOST)):
            self._synchronize()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        self._synchronize()
        return statistics.median(times)

    def _graph(self, rotation: Rotation, seconds: float) -> tuple[float | None, str | None]:
        """Median seconds of a call within the replay of a CUDA graph of whole passes over the sets, or why not."""
        sets = len(rotation.calls)
        count = sets * _within(self.GRAPH / (seconds * sets), 1, self.MOST_PASSES)

        def passes() -> None:
            for _ in range(count):
                rotation()

        try:
            with self._without_waiting():
                rotation()
            rotation.forget()
            replay = self._capture(passes)
        except RuntimeError as error:
            rotation.forget()
            traceback.clear_frames(error.__traceback__)
            return None, first_line(error)
        replay()
        rounds, iterations = self._plan(seconds * count)
        times = []
        for _ in range(rounds):
            start = self.timer()
            for _ in range(iterations):
                replay()
            times.append((self.timer() - start) / (iterations * count))
        return statistics.median(times), None

    # ---- What only a GPU can do: all that Dry replaces.

    def _card(self) -> str:
        return torch.cuda.get_device_name()

    def _cache(self) -> int:
        return torch.cuda.get_device_properties().L2_cache_size

    def _memory(self) -> int:
        return torch.cuda.get_device_properties().total_memory

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event

    def _between(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) / 1e3

    def _synchronize(self) -> None:
        torch.cuda.synchronize()

    @contextmanager
    def _without_waiting(self) -> Iterator[None]:
        """Raises where the host waits for the GPU: a capture that ends so leaves torch in a bad state."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _capture(self, function: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                function()
        except RuntimeError:
            # Otherwise the generator would believe in a capture that never ended, and refuse to draw.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return Replay(graph, function)

    def _reset_peak(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _peak(self, before: int) -> int | None:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _empty_cache(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Dry(Cuda):
    """The CUDA suite with CPU tensors of tiny sizes: its figures mean nothing."""

    name = "dry"
    type = "cpu"
    captures = False
    note = "DRY: the CUDA suite with tiny CPU tensors; no figure means anything"

    MOST_SETS = 8
    ROUND = 1e-5
    TOTAL = 1e-5
    ROUNDS = (2, 3)
    GRAPH = 1e-5
    HOST = (2, 3)

    def why_not(self) -> str | None:
        return None

    def start(self) -> None:
        torch.set_num_threads(1)  # tiny tensors only wait for threads

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return torch.compile(function, backend="eager", **options)

    def _card(self) -> str:
        return "none"

    def _cache(self) -> int:
        return 1024

    def _memory(self) -> int:
        return 2**30

    def _event(self) -> Any:
        return time.perf_counter()

    def _between(self, first: Any, second: Any) -> float:
        return second - first

    def _synchronize(self) -> None:
        """There is nothing to wait for."""

    @contextmanager
    def _without_waiting(self) -> Iterator[None]:
        yield

    def _capture(self, function: Call) -> Call:
        function()
        return function

    def _reset_peak(self) -> int:
        return 0

    def _peak(self, before: int) -> int | None:
        return None

    def _empty_cache(self) -> None:
        """There is none."""


DEVICES = {"cpu": Smoke if _is_smoke_run() else Cpu, "cuda": Cuda, "dry": Dry}


class Rotation:
    """Calls over several sets of inputs in turn, each of which keeps its result: outputs rotate as inputs do."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self._next = 0
        self.forget()

    def __call__(self) -> None:
        i = self._next
        self._results[i] = None  # before, so that there is no more than one result for a set
        self._results[i] = self.calls[i]()
        self._next = (i + 1) % len(self.calls)

    def forget(self) -> None:
        self._results: list[Any] = [None] * len(self.calls)


class Replay:
    """A captured call; it keeps what its graph reads and writes."""

    def __init__(self, graph: Any, function: Call) -> None:
        self.graph, self.function = graph, function

    def __call__(self) -> None:
        self.graph.replay()


@contextmanager
def skipped_if_out_of_memory() -> Iterator[None]:
    """Skips the benchmark that needs more memory than there is, and frees what it held."""
    try:
        yield
        return
    except RuntimeError as error:
        # An operator of lossmeta has only a RuntimeError to say it with.
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error).lower():
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors
        reason = first_line(error)
    pytest.skip(f"out of memory: {reason}")


def _within(value: float, least: int, most: int) -> int:
    return max(least, min(most, math.ceil(value)))


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None
