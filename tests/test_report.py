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
    assert "**Not run: CUDA.**" in report.report(run)
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
