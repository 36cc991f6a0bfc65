"""How every benchmark here measures: one group holds the baselines and lossmeta on the same input and threads.

``--device`` says where (``device.py``). A test takes its sizes from a table by device:
``@pytest.mark.by_device("size", {"cpu": [...], "cuda": [...], "dry": [...]})``. A smoke run takes those of
"smoke" where the table has them, else those of the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICES, first_line, skipped_if_out_of_memory
from lines import Lines, read

import lossmeta

DEVICE = pytest.StashKey[Any]()
START = pytest.StashKey[float]()
LINES = pytest.StashKey[Lines]()
DONE = pytest.StashKey[set[str]]()

DEVICE_LOST = 10  # exit status: what is left needs a new process

# What comes first where time is short; then all others.
ORDER = ["copy", "parametric_cross_entropy", "loss_network", "class_confusion", "adalfl"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lossmeta benchmarks")
    group.addoption(
        "--device",
        choices=sorted(DEVICES),
        default="cpu",
        help="where to measure; dry runs the CUDA suite on tiny CPU tensors, and its figures mean nothing",
    )
    group.addoption(
        "--seconds", type=float, metavar="N", help="after N seconds of the session skip what is left"
    )
    group.addoption(
        "--lines",
        type=Path,
        metavar="FILE",
        help="add each benchmark to FILE at once, as a line of JSON; what FILE already holds is not run again",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "by_device(names, table): parametrises with the values for the device")
    device = DEVICES[config.getoption("--device")]()
    config.stash[DEVICE] = device
    config.stash[START] = time.monotonic()
    if reason := device.why_not():
        raise pytest.UsageError(f"--device {device.name}: {reason}")
    if config.getoption("--collect-only"):
        return
    device.start()
    if path := config.getoption("--lines"):
        done = read(path)[0] if path.exists() else []
        config.stash[DONE] = {record["name"] for record in done if "stats" in record or "failed" in record}
        config.stash[LINES] = lines = Lines(path)
        lines.add(_session(config))


def _session(config: pytest.Config) -> dict[str, Any]:
    """What the JSON of pytest-benchmark says beside its benchmarks."""
    machine = config.hook.pytest_benchmark_generate_machine_info(config=config)
    config.hook.pytest_benchmark_update_machine_info(config=config, machine_info=machine)
    return {
        "machine_info": machine,
        "commit_info": config.hook.pytest_benchmark_generate_commit_info(config=config),
        "datetime": datetime.now(timezone.utc).isoformat(),
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["lossmeta"] = lossmeta.info()
    machine_info["device"] = config.stash[DEVICE].facts()


def pytest_report_header(config: pytest.Config) -> str | None:
    return config.stash[DEVICE].note


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if note := config.stash[DEVICE].note:
        terminalreporter.write_line(note)


# ---- Which benchmarks, and in what order.


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.stash[DEVICE]
    for marker in metafunc.definition.iter_markers("by_device"):
        names, table = marker.args
        key = "cpu" if device.name == "smoke" and "smoke" not in table else device.name
        metafunc.parametrize(names, table[key], ids=_id)
    if "threads" in metafunc.fixturenames and device.threads:
        ids = [f"{count}thread{'s' * (count > 1)}" for count in device.threads]
        metafunc.parametrize("threads", device.threads, ids=ids, indirect=True)


def _id(value: Any) -> str | None:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = config.stash.get(DONE, set())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]
    device = config.stash[DEVICE]
    if device.timer is None:
        return
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=device.timer))
    items.sort(key=_rank)


def _rank(item: Any) -> tuple[int, int]:
    """What torch.compile need not see first: it takes seconds for each. Then it takes the sizes of the module's
    ``COMPILED_FIRST``, parameters of which all must agree, then the others."""
    operator = item.module.__name__.rpartition(".")[2].removeprefix("test_")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    stage = 0
    if str(parameters.get("candidate", "")).startswith("compile"):
        first = getattr(item.module, "COMPILED_FIRST", [{}])
        stage = 1 if any(choice.items() <= parameters.items() for choice in first) else 2
    return stage, ORDER.index(operator) if operator in ORDER else len(ORDER)


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - item.config.stash[START] >= seconds:
        pytest.skip(f"the {seconds:g} seconds of --seconds are over")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Any:
    with skipped_if_out_of_memory():
        return (yield)


# ---- Measuring.


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Any:
    return request.config.stash[DEVICE]


@pytest.fixture(autouse=True)
def _free_memory(device: Any) -> Iterator[None]:
    yield
    try:
        device.free()
    except RuntimeError as error:
        pytest.exit(f"the device is lost: {first_line(error)}", returncode=DEVICE_LOST)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", before))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark: Any, threads: int, device: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``measure(function, make, operator=, size=, candidate=, bytes_moved=)``: times ``function(*make())``.

    ``make`` returns a set of inputs, of ``dtype``; it is called on the device, for as many sets as that rotates among.
    ``candidate`` is ``"eager"``, ``"compile"``, another baseline's name, or ``"lossmeta"``; ``bytes_moved`` the least
    memory traffic that the operation needs, forward and backward together. ``no_graph`` says why a CUDA graph of it is
    not to be tried.
    """

    def run(
        function: Callable[..., Any],
        make: Callable[[], Any],
        *,
        operator: str,
        size: str,
        candidate: str,
        bytes_moved: int,
        dtype: torch.dtype = torch.float32,
        no_graph: str | None = None,
        **info: Any,
    ) -> None:
        benchmark.group = f"{operator} | {size} | {device.column(threads, dtype)}"
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
        benchmark.extra_info.update(device.time(benchmark, function, make, dtype=dtype, no_graph=no_graph))
        if lines := request.config.stash.get(LINES, None):
            stats = {
                name: getattr(benchmark.stats.stats, name) for name in ("median", "iqr", "min", "rounds")
            }
            lines.add({"name": request.node.nodeid, "extra_info": benchmark.extra_info, "stats": stats})

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Lines for what was skipped, and for what failed."""
    report = yield
    lines = item.config.stash.get(LINES, None)
    if lines and report.outcome != "passed" and report.when in ("setup", "call"):
        message = str(call.excinfo.value) or call.excinfo.typename
        lines.add({"name": item.nodeid, report.outcome: message.strip().splitlines()[0][:300]})
    return report
