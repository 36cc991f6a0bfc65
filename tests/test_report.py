from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "report.py"
spec = importlib.util.spec_from_file_location("report", SCRIPT)
assert spec is not None
assert spec.loader is not None
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)


def benchmark(candidate: str, median: float, iqr: float = 0.1, **info: Any) -> dict[str, Any]:
    info = {
        "operator": "op",
        "size": "8×3",
        "threads": 1,
        "bytes_moved": 2_000_000,
        "candidate": candidate,
        **info,
    }
    return {"extra_info": info, "stats": {"median": median, "iqr": iqr * median}}


@pytest.fixture
def run() -> dict[str, Any]:
    cuda = {"compiled": False, "why_not": "no", "device": None}
    lossmeta = {
        "lossmeta": "1.2.3",
        "torch": "2.13.0",
        "python": "3.11.7",
        "cpu": {"isa": "avx2"},
        "cuda": cuda,
    }
    return {
        "datetime": "2026-01-02T03:04:05",
        "commit_info": {"id": "0123456789abcdef"},
        "machine_info": {"cpu": {"brand_raw": "Some CPU"}, "lossmeta": lossmeta},
        "benchmarks": [
            benchmark("eager", 4e-3, iqr=0.3),
            benchmark("compile", 3e-3),
            benchmark("lossmeta", 1e-3),
            benchmark("eager", 8e-6, size="2×2", bytes_moved=100),
            benchmark("lossmeta", 0.5e-3, threads=2),
            benchmark("eager", 0.1, operator="copy", size="256 MiB", bytes_moved=1_000_000_000),
        ],
    }


def rows(text: str) -> dict[tuple[str, str], list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {(cells[0], cells[1]): cells[2:] for cells in lines}


def test_table(run: dict[str, Any]) -> None:
    text = report.report(run)
    assert "\n## op\n" in text
    assert "## copy" not in text
    table = rows(text)
    assert table["size", "threads"] == ["lossmeta", "eager", "compile", "bytes", "GB/s", "of copy"]
    # 2 MB in 1 ms are 2 GB/s; the copy moves 1 GB in 0.1 s, 10 GB/s.
    expected = ["1.00 ms", "~4.00 ms (4.00×)", "3.00 ms (3.00×)", "2.0 MB", "2.0", "20 %"]
    assert table["8×3", "1"] == expected
    assert table["8×3", "2"] == ["500.0 µs", "–", "–", "2.0 MB", "4.0", "–"]
    assert table["2×2", "1"] == ["–", "8.0 µs", "–", "100 B", "–", "–"]
    assert list(table)[2:] == [("8×3", "1"), ("8×3", "2"), ("2×2", "1")]
    assert "Copy bandwidth: 10.0 GB/s with 1 thread.\n" in text


def test_variants_of_lossmeta_are_no_baselines(run: dict[str, Any]) -> None:
    run["benchmarks"] = [
        benchmark("eager", 12e-3),
        benchmark("lossmeta exact", 3e-3),
        benchmark("lossmeta", 0.1e-3),
    ]
    lines = [line for line in report.report(run).splitlines() if line.startswith("| 8×3")]
    assert lines == [
        "| 8×3 | 1 | default | 100.0 µs | 12.00 ms (120×) | 2.0 MB | 20.0 | – |",
        "| 8×3 | 1 | exact | 3.00 ms | 12.00 ms (4.00×) | 2.0 MB | 0.7 | – |",
    ]


def test_names_machine_and_versions(run: dict[str, Any]) -> None:
    text = report.report(run)
    for fact in (
        "- date: 2026-01-02",
        "- CPU: Some CPU, instruction set avx2",
        "- lossmeta: 1.2.3 (0123456789ab)",
        "- torch: 2.13.0",
        "- Python: 3.11.7",
    ):
        assert f"{fact}\n" in text


def test_says_which_devices_were_not_run(run: dict[str, Any]) -> None:
    assert "Every figure here is from the CPU" in report.report(run)
    run["benchmarks"].append(benchmark("lossmeta", 1e-6, device="cuda"))
    run["machine_info"]["lossmeta"]["cuda"]["device"] = "Some GPU"
    text = report.report(run)
    assert "Not run" not in text
    assert "Run on: cpu, cuda (GPU: Some GPU)." in text


def test_writes_the_file(run: dict[str, Any], tmp_path: Path) -> None:
    source, target = tmp_path / "run.json", tmp_path / "RESULTS.md"
    source.write_text(json.dumps(run))
    report.main([str(source), str(target)])
    assert target.read_text() == report.report(run)
    with pytest.raises(SystemExit, match=r"pytest benchmarks --benchmark-json"):
        report.main([])


def test_peak_memory_where_it_was_measured(run: dict[str, Any]) -> None:
    assert "Peak memory" not in report.report(run)
    run["benchmarks"] = [
        benchmark("eager", 1e-3, peak_bytes=3_000_000),
        benchmark("lossmeta", 1e-3, peak_bytes=1_500_000),
        benchmark("lossmeta", 1e-3, threads=2, peak_bytes=1_500_000),
        benchmark("eager", 1e-3, size="2×2"),
    ]
    text = report.report(run)
    assert text.count("Peak memory of the op") == 1
    memory = rows(text[text.index("Peak memory") :])
    assert memory["size", "lossmeta"] == ["eager"]
    assert memory["8×3", "1.5 MB"] == ["3.0 MB (2.00×)"]
    assert memory["2×2", "–"] == ["–"]


# ---- Against an earlier page.


def test_what_has_become_slower(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, page = tmp_path / "run.json", tmp_path / "RESULTS.md"
    page.write_text(report.report(run))

    def now(**medians: float) -> str:
        for one in run["benchmarks"]:
            info = one["extra_info"]
            if info["operator"] == "op" and info["size"] == "8×3":
                one["stats"]["median"] = medians.get(info["candidate"], one["stats"]["median"])
        source.write_text(json.dumps(run))
        report.main([str(source), "--against", str(page)])
        return capsys.readouterr().out

    assert now() == "0 of 2 ratios are worse by more than 10%\n"
    # A machine that is half as fast in all, and a tenth less.
    assert now(eager=8e-3, compile=6e-3, lossmeta=2.2e-3).startswith("0 of 2")
    with pytest.raises(SystemExit) as ended:
        now(eager=4e-3, compile=3e-3, lossmeta=1.2e-3)
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "2 of 2 ratios are worse by more than 10%",
        "op, 8×3, 1: eager took 4 times as long, now 3.33",
        "op, 8×3, 1: compile took 3 times as long, now 2.5",
    ]
    run["benchmarks"] = [b for b in run["benchmarks"] if b["extra_info"]["candidate"] != "eager"]
    assert (
        now(lossmeta=1e-3, compile=3e-3)
        == "0 of 1 ratios are worse by more than 10%; 1 were not measured now\n"
    )


def test_pages_that_say_nothing_of_each_other(run: dict[str, Any], tmp_path: Path) -> None:
    source, page = tmp_path / "run.json", tmp_path / "RESULTS.md"
    source.write_text(json.dumps(run))
    text = report.report(run)
    for other, message in (
        (
            text.replace("Some CPU", "Other CPU"),
            r"must be of the same kind of machine, Some CPU, .*, got one of Other",
        ),
        (text.replace("## op", "## another"), "must have figures that were measured now too, got none"),
        ("", "must be of the same kind of machine, Some CPU, .*, got one of unknown"),
    ):
        page.write_text(other)
        with pytest.raises(SystemExit, match=message):
            report.main([str(source), "--against", str(page)])
    with pytest.raises(SystemExit, match=r"missing\.md does not exist"):
        report.main([str(source), "--against", str(tmp_path / "missing.md")])
    with pytest.raises(SystemExit, match="--against PAGE"):
        report.main([str(source), "--against"])


# ---- A run on a GPU.

SCHEMA = {
    "machine.json": {
        "card": "NVIDIA H100 80GB HBM3",
        "driver": "580.1",
        "cuda": "13.0",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "python": "3.12.3",
        "nvcc": "13.0.1",
        "lossmeta": "1.2.3",
        "commit": "abcdef0123456789",
        "date": "2026-02-03T04:05:06",
        "dry": False,
    },
    "stages.jsonl": [
        {"stage": "build", "returncode": 0, "seconds": 60.4},
        {"stage": "timing", "returncode": 124, "seconds": 120.0},
    ],
    "tests.json": {
        "passed": 12,
        "failed": 1,
        "skipped": 2,
        "failures": ["tests/cuda/test_x.py::test_bad"],
        "slowest": [["tests/cuda/test_x.py::test_slow", 3.25]],
    },
    "sweep.jsonl": [
        {
            "operator": "perturb",
            "case": "16x2x1000",
            "dtype": "float32",
            "error": 2e-7,
            "allowed": 4e-7,
            "ok": True,
            "bit_equal": True,
            "side_stream": True,
            "replay": True,
            "note": "",
        },
        {
            "operator": "perturb",
            "case": "1x1x1",
            "dtype": "bfloat16",
            "error": float("nan"),
            "allowed": 4e-3,
            "ok": False,
            "bit_equal": False,
            "side_stream": True,
            "replay": None,
            "note": "not written",
        },
        {"operator": "perturb", "case": "huge", "dtype": "float32", "seed": 7, "ok": None, "note": "no room"},
    ],
    "sanitizer.json": {
        "memcheck": {"errors": 0, "summary": "ERROR SUMMARY: 0 errors"},
        "racecheck": {"errors": None, "summary": "timed out"},
    },
    "profile.json": [
        {
            "kernel": "forward_kernel",
            "duration_us": 21.5,
            "dram_percent": 80.25,
            "sm_percent": 30.0,
            "registers": 64,
            "occupancy_percent": None,
        }
    ],
}


def gpu_benchmark(candidate: str, median: float, graph: float | None = None, **info: Any) -> dict[str, Any]:
    info = {"device": "cuda", "dtype": "float32", "host_us": 30.0, "graph": graph, "no_graph": None, **info}
    record = benchmark(candidate, median, **info)
    name = "-".join(str(record["extra_info"][key]) for key in ("operator", "candidate", "size", "dtype"))
    return {"name": f"benchmarks/test_op.py::{name}", **record}


def timing(device: str = "cuda") -> list[dict[str, Any]]:
    facts = {"name": device, "card": "NVIDIA H100 80GB HBM3", "driver": "580.1", "torch": "2.11.0"}
    return [
        {
            "machine_info": {"device": facts, "lossmeta": {"lossmeta": "1.2.3"}},
            "commit_info": {"id": "abcdef0123456789"},
            "datetime": "2026-02-03T04:05:06",
        },
        gpu_benchmark("eager", 1e-3, operator="copy", bytes_moved=2_000_000_000, device=device),
        gpu_benchmark("eager", 4e-6, 2e-6, device=device),
        gpu_benchmark("lossmeta", 2e-6, 1e-6, device=device),
        gpu_benchmark("lossmeta", 3e-6, dtype="bfloat16", no_graph="it waits", device=device),
        {"name": "benchmarks/test_op.py::large", "skipped": "out of memory: CUDA out of memory"},
        {"name": "benchmarks/test_op.py::bad", "failed": "RuntimeError: bad"},
    ]


def as_lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "check"
    made.mkdir()
    for name, content in {**SCHEMA, "timing.jsonl": timing()}.items():
        (made / name).write_text(as_lines(content) if name.endswith("l") else json.dumps(content))
    return made


def written(source: Path) -> str:
    target = source.with_name("page.md")
    report.main([str(source), str(target)])
    return target.read_text()


def test_lines_of_a_gpu(tmp_path: Path) -> None:
    source = tmp_path / "timing.jsonl"
    source.write_text(as_lines(timing()))
    text = written(source)
    assert text.startswith("# Benchmark results on NVIDIA H100 80GB HBM3\n")
    for fact in ("driver: 580.1", "torch: 2.11.0", "lossmeta: 1.2.3 (abcdef012345)", "date: 2026-02-03"):
        assert f"- {fact}\n" in text
    assert "Copy bandwidth: 2000 GB/s." in text
    assert "### copy" not in text
    lines = [line for line in text.splitlines() if line.startswith("| 8×3")]
    # 2 MB in a graph's 1 µs are 2000 GB/s, in the events' 3 µs 667.
    assert lines == [
        "| 8×3 | float32 | 2.0 µs | 1.0 µs | 30 µs | 2.0 MB | 2000 | 100 % | 4.0 µs (2.00×); 2.0 µs (2.00×) |",
        "| 8×3 | bfloat16 | 3.0 µs | – | 30 µs | 2.0 MB | 667 | 33 % | – |",
    ]
    assert "Without a graph:\n\n- it waits: `op, lossmeta`" in text
    assert "- out of memory: CUDA out of memory: `test_op.py::large`" in text
    assert "- RuntimeError: bad: `test_op.py::bad`" in text


def test_json_of_a_gpu(tmp_path: Path) -> None:
    source = tmp_path / "run.json"
    session, *benchmarks = timing()
    source.write_text(json.dumps({**session, "benchmarks": benchmarks[:-2]}))
    assert "| 8×3 | float32 | 2.0 µs | 1.0 µs |" in written(source)


def test_a_file_that_was_gone_on_with_holds_what_last_became_of_each(tmp_path: Path) -> None:
    source = tmp_path / "timing.jsonl"
    late = {"name": "benchmarks/test_op.py::late", "skipped": "the 120 seconds of --seconds are over"}
    done = {**gpu_benchmark("lossmeta", 7e-6, size="late"), "name": late["name"]}
    source.write_text(as_lines([*timing(), late, timing()[0], done]))
    text = written(source)
    assert "seconds are over" not in text
    assert "| late | float32 | 7.0 µs |" in text


def test_lines_of_a_cpu_are_as_its_json(run: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "lines.jsonl"
    benchmarks = [{"name": str(i), **b} for i, b in enumerate(run["benchmarks"])]
    source.write_text(as_lines([{k: v for k, v in run.items() if k != "benchmarks"}, *benchmarks]))
    assert written(source) == report.report(run)


def test_folder_of_the_gpu_check(folder: Path) -> None:
    text = written(folder)
    assert "Missing" not in text
    for part in (
        "- nvcc: 13.0.1\n",
        "| build | well | 60 |\n| timing | out of time | 120 |",
        "12 passed, 1 failed, 2 skipped.",
        "- `tests/cuda/test_x.py::test_bad`: failed",
        "| `tests/cuda/test_x.py::test_slow` | 3.2 |",
        "| perturb | 3 | 1 | 1 | inf | 1 | 0 | 0 |",
        "- perturb 1x1x1 bfloat16: error nan, allowed 0.004; not written",
        "- perturb huge float32, seed 7: no room",
        "| memcheck | 0 | ERROR SUMMARY: 0 errors |\n| racecheck | did not run | timed out |",
        "| forward_kernel | 21.5 | 80.2 | 30.0 | 64 | – |",
        "| 8×3 | float32 | 2.0 µs |",
    ):
        assert part in text


@pytest.mark.parametrize("name", [*SCHEMA, "timing.jsonl"])
def test_a_missing_file_is_named_and_the_rest_is_there(folder: Path, name: str) -> None:
    (folder / name).unlink()
    text = written(folder)
    assert f"**Missing:** {name} (not written).\n" in text
    headings = {line for line in text.splitlines() if line.startswith("## ")}
    assert len(headings) == (6 if name == "machine.json" or name == "timing.jsonl" else 5)
    assert name in report.report_gpu.short(report.report_source.load(folder))


@pytest.mark.parametrize("name", [*SCHEMA, "timing.jsonl"])
def test_a_file_that_was_cut_is_named_and_the_rest_is_there(folder: Path, name: str) -> None:
    content = (folder / name).read_text()
    (folder / name).write_text(content[:-15])
    text = written(folder)
    assert ("1 line of " if name.endswith("l") else "") + name in text[text.index("**Missing:**") :]
    assert ("| build | well | 60 |" in text) and ("| 8×3 | float32 | 2.0 µs |" in text)
    (folder / name).write_text("")
    written(folder)


def test_the_page_is_named_after_the_card(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    report.main([str(folder)])
    assert (tmp_path / "RESULTS-H100-80GB-HBM3.md").exists()
    assert report.slug("NVIDIA RTX™ 6000 (Ada)") == "RTX-6000-Ada"
    (folder / "machine.json").unlink()
    (folder / "timing.jsonl").unlink()
    with pytest.raises(SystemExit, match="card's name is missing"):
        report.main([str(folder)])


@pytest.mark.parametrize("who", ["machine", "timing"])
def test_a_dry_run_says_so_and_has_no_page_of_its_own(
    folder: Path,
    who: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    if who == "machine":
        (folder / "machine.json").write_text(json.dumps({**SCHEMA["machine.json"], "dry": True}))  # type: ignore[dict-item]
    else:
        (folder / "timing.jsonl").write_text(as_lines(timing("dry")))
    with pytest.raises(SystemExit, match="no figure in it means anything"):
        report.main([str(folder)])
    assert not list(tmp_path.glob("RESULTS*"))
    assert written(folder).startswith("# DRY: no figure in it means anything\n")
    report.main([str(folder), "--short"])
    assert "DRY: no figure in it means anything\n" in capsys.readouterr().out


def test_short_is_short(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        gpu_benchmark("lossmeta", 1e-6, operator=f"operator {i}", size=f"{j}, forward + backward")
        for i in range(9)
        for j in range(7)
    ]
    with (folder / "timing.jsonl").open("a") as file:
        file.write(as_lines(records))
    report.main([str(folder), "--short"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    assert "tests: 12 passed, 1 failed, 2 skipped\n  tests/cuda/test_x.py::test_bad\n" in text
    assert "against float64: 3 cases, 1 failed, 1 skipped, worst inf of allowed\n" in text
    assert "sanitizer: memcheck 0, racecheck did not run\n" in text
    assert "stages: timing ended out of time\n" in text
    assert "copy: 2000 GB/s\n" in text
    row = next(line for line in text.splitlines() if line.startswith("op "))
    assert row.split() == [
        "op",
        "8×3",
        "f32",
        "2.0",
        "µs",
        "1.0",
        "µs",
        "30",
        "µs",
        "2000",
        "100",
        "%",
        "2.00×",
        "–",
    ]
    assert all(f"operator {i} " in text for i in range(9))
    assert not list(tmp_path.glob("*.md"))
