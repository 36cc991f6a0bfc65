"""What differs between a GPU and a rehearsal without one: two objects of one shape."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossmeta import _build

SAMPLES = Path(__file__).with_name("samples")
MEBIBYTE = 2**20  # the caching allocator serves what is larger from other segments

Results = list[Tensor]


class Missing(RuntimeError):
    """A tool that is not here, and where it was looked for."""


class Card:
    """The first CUDA device."""

    dry = False
    device = "cuda"
    patience = 30.0  # seconds of a case, after which it is taken to hang
    # Beside PATH: where NVIDIA's installers put their tools.
    tool_folders = (
        "/usr/local/cuda/bin",
        "/usr/local/cuda/compute-sanitizer",
        "/opt/nvidia/nsight-compute/*",
        "/usr/local/cuda-*/bin",
    )

    def __init__(self) -> None:
        self._side: Any = None
        torch.set_float32_matmul_precision("highest")  # whatever the environment would like

    def why_not(self) -> str | None:
        """Why the CUDA operators cannot be looked at here, if so."""
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return _build.why_no_cuda

    def size(self, number: int) -> int:
        """How large a dimension is that has this size on a GPU."""
        return number

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Memory that tensors may still take."""
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def poison(self, byte: int, sizes: Sequence[int]) -> int:
        """Fills all memory that the allocator holds for the current stream and has not given out.

        Args:
            byte: what it is filled with; 255 makes every float a NaN.
            sizes: in bytes, what will be asked for; for an allocator that cannot be looked into.

        Returns:
            The number of bytes.
        """
        stream, blocks, filled = torch.cuda.current_stream().cuda_stream, [], 0
        for segment in torch.cuda.memory_snapshot():
            if segment["stream"] != stream or tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):
                continue
            small = segment["segment_type"] == "small"
            for block in segment["blocks"]:
                # A small remainder of a large segment is never given out.
                if block["state"] == "inactive" and (small or block["size"] > MEBIBYTE):
                    blocks += _pieces(block["size"], MEBIBYTE if small else block["size"])
        held = []
        for size in sorted(blocks, reverse=True):  # each takes the block of its size
            held.append(torch.empty(size, dtype=torch.uint8, device=self.device).fill_(byte))
            filled += size
        return filled

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Another stream, which begins after what was launched and ends before what comes next."""
        self._side = self._side or torch.cuda.Stream()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield
        torch.cuda.current_stream().wait_stream(self._side)

    def capture(self, function: Callable[[], Results]) -> Callable[[], Results]:
        """``function`` as a CUDA graph: what is returned replays it, waits, and returns its results.

        Raises:
            RuntimeError: if ``function`` waits for the device, or does what cannot be captured.
        """
        with self.side_stream():
            function()
            torch.cuda.set_sync_debug_mode("error")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                results = function()
        except RuntimeError as error:
            # torch stays on the stream of the capture, and tells that it failed, not why.
            torch.cuda.set_stream(before)
            raise (error.__context__ or error) from None

        def replay() -> Results:
            graph.replay()
            torch.cuda.synchronize()
            return results

        return replay

    def is_lost(self) -> bool:
        """Whether the device answers nothing any more in this process."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    # ---- Tools that run a Python module.

    def tool(self, name: str) -> list[str]:
        """The command that a tool is started with.

        Raises:
            Missing: where it is not installed.
        """
        if found := shutil.which(name):
            return [found]
        for pattern in self.tool_folders:
            for folder in sorted(Path("/").glob(pattern[1:]), reverse=True):
                if found := shutil.which(name, path=str(folder)):
                    return [found]
        raise Missing(f"{name} was not found on PATH, nor in {', '.join(self.tool_folders)}")

    def command(self, tool: list[str], options: Sequence[str], *module: str) -> list[str]:
        return [*tool, *options, sys.executable, "-m", *module]

    def output(self, log: Path, sample: str) -> str:
        """What the tool wrote to its log."""
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


class Dry:
    """A rehearsal: CPU tensors of small sizes, calls in place of streams and graphs, recorded outputs of the tools."""

    dry = True
    device = "cpu"
    patience = 600.0

    def __init__(self) -> None:
        torch.set_num_threads(1)  # small tensors only wait for threads

    def why_not(self) -> str | None:
        return None

    def size(self, number: int) -> int:
        """Small, with the same remainders by powers of two up to 32: alignment and tails are as they would be."""
        return number if number <= 32 else 32 + number % 32

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def free_bytes(self) -> int:
        return 2**62

    def release(self) -> None:
        """There is no cache."""

    def poison(self, byte: int, sizes: Sequence[int]) -> int:
        held = [torch.empty(size, dtype=torch.uint8).fill_(byte) for size in sizes]
        return sum(t.nbytes for t in held)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        yield

    def capture(self, function: Callable[[], Results]) -> Callable[[], Results]:
        return function

    def is_lost(self) -> bool:
        return False

    def tool(self, name: str) -> list[str]:
        return []

    def command(self, tool: list[str], options: Sequence[str], *module: str) -> list[str]:
        return [sys.executable, "-m", *module]

    def output(self, log: Path, sample: str) -> str:
        return (SAMPLES / sample).read_text(encoding="utf-8")


def choose(dry: bool) -> Card | Dry:
    return Dry() if dry else Card()


def _pieces(size: int, most: int) -> list[int]:
    return [most] * (size // most) + ([size % most] if size % most else [])
