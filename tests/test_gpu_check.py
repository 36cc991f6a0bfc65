"""The check for a lent GPU, without one: that it reads its tools' output, and that it can find something."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu import parsers, profiling, sanitizer
from gpu.backend import SAMPLES, Card, Dry, Missing
from gpu.case import Case, Draw
from gpu.cases import all_cases
from gpu.checks import Checks
from gpu.judge import judge, same_bits
from gpu.sweep import settled
from gpu.tests import Recorder
from torch import Tensor

ROOT = Path(__file__).parents[1]
CHECK = ROOT / "benchmarks" / "gpu" / "check.sh"


def sample(name: str) -> str:
    return (SAMPLES / name).read_text(encoding="utf-8")


# ---- The tools' output.


@pytest.mark.parametrize(
    ("name", "errors", "summary"),
    [
        ("memcheck.txt", 0, "ERROR SUMMARY: 0 errors"),
        ("racecheck.txt", 0, "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
        (
            "memcheck_planted.txt",
            2,
            "ERROR SUMMARY: 2 errors; Invalid __global__ read of size 4 bytes; at void ",
        ),
        (
            "racecheck_hazard.txt",
            1,
            "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings); Error: Race",
        ),
        ("refused.txt", None, "Error: Device not supported."),
    ],
)
def test_sanitizer_output(name: str, errors: int | None, summary: str) -> None:
    result = parsers.sanitizer(sample(name))
    assert result["errors"] == errors
    assert result["summary"].startswith(summary)


def test_sanitizer_that_wrote_nothing() -> None:
    assert parsers.sanitizer("") == {"errors": None, "summary": "the tool wrote nothing"}


def test_profile_output() -> None:
    kernels = parsers.profile(sample("ncu.csv"))
    assert [kernel["kernel"] for kernel in kernels] == list(profiling.KERNELS)
    assert kernels[0] == {
        "kernel": "forward_rows",
        "duration_us": pytest.approx(1234.567),
        "dram_percent": 88.31,
        "sm_percent": 41.07,
        "registers": 64,
        "occupancy_percent": 74.9,
    }


@pytest.mark.parametrize(
    ("old", "new", "duration"),
    [('"ns","1,234,567"', '"ms","1.234567"', 1234.567), ('"ns","1,234,567"', '"","n/a"', None)],
)
def test_profile_units(old: str, new: str, duration: float | None) -> None:
    kernel = parsers.profile(sample("ncu.csv").replace(old, new))[0]
    assert kernel["duration_us"] == (duration and pytest.approx(duration))


def test_profile_that_is_refused() -> None:
    text = sample("ncu_refused.txt")
    assert parsers.profile(text) == []
    assert "ERR_NVGPUCTRPERM" in parsers.complaint(text)


def test_profiled_kernels_are_in_the_source() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "csrc" / "cuda").iterdir())
    for name in profiling.KERNELS:
        assert re.search(rf"\b{name}\(", source), name


# ---- The stages of the tools, with tools that are not the real ones.


class Faked(Card):
    """A card whose tools are shell scripts: they write a sample to their log and run nothing."""

    device = "cpu"

    def __init__(self, folder: Path, output: str, said: str = sanitizer.ALL_MADE, status: int = 0) -> None:
        super().__init__()
        self.script = folder / "tool"
        self.script.write_text(
            "#!/bin/sh\n"
            'while [ "$1" != --log-file ]; do shift; done\n'
            f"cp {SAMPLES / output} $2\necho {said}\nexit {status}\n"
        )
        self.script.chmod(0o755)

    def tool(self, name: str) -> list[str]:
        return [str(self.script)]


class Bare(Card):
    """A card without tools."""

    tool_folders = ()

    def tool(self, name: str) -> list[str]:
        raise Missing(f"{name} was not found")


FOREVER = float("inf")


def test_sanitizer_finds_and_misses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sanitizer.json"
    results = sanitizer.look(Faked(tmp_path, "memcheck_planted.txt"), FOREVER, file)
    assert {result["errors"] for result in results.values()} == {2}
    assert "a planted fault was found" in results["memcheck"]["summary"]
    assert sanitizer.status(results) == 1
    assert json.loads(file.read_text()) == results
    assert "Invalid __global__ read" in capsys.readouterr().out
    # Nothing found, not even what was planted.
    results = sanitizer.look(Faked(tmp_path, "memcheck.txt"), FOREVER, file)
    assert {result["errors"] for result in results.values()} == {0}
    assert sanitizer.NOT_FOUND in results["memcheck"]["summary"]
    assert sanitizer.status(results) == 1


def test_sanitizer_calls_that_fail(tmp_path: Path) -> None:
    results = sanitizer.look(Faked(tmp_path, "memcheck.txt", "TypeError: no", 1), FOREVER, tmp_path / "file")
    assert results["racecheck"]["errors"] is None
    assert results["racecheck"]["summary"].startswith("the calls ended early: TypeError: no")
    assert sanitizer.status(results) == 1


def test_sanitizer_that_is_missing_or_refuses(tmp_path: Path) -> None:
    file = tmp_path / "sanitizer.json"
    results = sanitizer.look(Bare(), FOREVER, file)
    assert results["synccheck"] == {"errors": None, "summary": "compute-sanitizer was not found"}
    assert sanitizer.status(results) == 0
    assert json.loads(file.read_text()) == results


def test_profile_of_a_card(tmp_path: Path) -> None:
    kernels = profiling.profile(Faked(tmp_path, "ncu.csv"), FOREVER)
    assert kernels == parsers.profile(sample("ncu.csv"))
    refused = profiling.profile(Faked(tmp_path, "ncu_refused.txt", status=1), FOREVER)
    assert [k["kernel"][:27] for k in refused] == ["ncu ended with status 1; =="]
    assert profiling.profile(Bare(), FOREVER)[0]["kernel"] == "ncu was not found"


def test_tools_beside_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-2025" / "some-tool"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(Card, "tool_folders", (f"{tmp_path}/compute-*",))
    assert Card().tool("some-tool") == [str(program)]
    with pytest.raises(Missing, match="other-tool was not found"):
        Card().tool("other-tool")


# ---- The sweep.


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def example(**changes: Any) -> Case:
    case = Case("example", "8", lambda draw: {"x": draw.normal(8).requires_grad_()}, doubled, doubled, ("y",))
    return replace(case, **changes)


def verdict(case: Case) -> dict[str, Any]:
    return Checks(Dry()).record(case, torch.float32, 0)


def test_sweep_passes_what_is_right() -> None:
    record = verdict(example())
    assert record["ok"] is True
    assert record["bit_equal"] and record["side_stream"] and record["replay"]
    assert list(record) == [
        "operator", "case", "dtype", "seed", "error", "allowed", "ok", "bit_equal", "side_stream", "replay",
        "seconds", "note",
    ]  # fmt: skip


class Changing:
    """Another result every time."""

    count = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return 2 * x * (1 + 2e-7 * (self.count % 3))


def raising(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("ours", "what"),
    [
        (lambda x: 2 * x + 1e-4, "y: error"),
        (
            lambda x: 2 * x * x.detach().where(x.detach() != x.detach()[3], torch.nan) / x.detach(),
            "y: error nan",
        ),
        (lambda x: 2 * x + (x - x.detach()) * 1e-3, "gradient of x: error"),
        (lambda x: (2 * x)[:7], "RuntimeError: Mismatch in shape"),
        (raising, "RuntimeError: no kernel"),
        (Changing(), ""),
    ],
    ids=["value", "nan", "gradient", "shape", "raises", "bits"],
)
def test_sweep_finds(ours: Any, what: str) -> None:
    record = verdict(example(ours=ours))
    assert record["ok"] is False
    assert what in record["note"]
    assert (record["bit_equal"] is False) == isinstance(ours, Changing)
    json.dumps(record)


def test_sweep_skips_where_memory_is_short() -> None:
    record = Checks(Dry()).record(example(gibibytes=2.0**40), torch.float32, 0)
    assert record["ok"] is None
    assert record["note"].startswith("skipped: it takes ")


def test_a_slight_excess_must_come_again() -> None:
    class Records(Checks):
        """Of errors that are given."""

        def __init__(self, *errors: float) -> None:
            self.errors = list(errors)

        def record(self, case: Case, dtype: torch.dtype, seed: int) -> dict[str, Any]:
            error = self.errors.pop(0)
            bits = dict.fromkeys(("bit_equal", "side_stream", "replay"), True)
            return {
                "error": error,
                "allowed": 1.0,
                "ok": error <= 1,
                "seed": seed,
                "note": f"{error}",
                **bits,
            }

    def last(*errors: float, seed: int | None = None) -> bool:
        ok: bool = settled(Records(*errors), example(), torch.float32, seed)["ok"]
        return ok

    assert last(0.5)
    assert last(1.5, 0.5)
    assert last(1.5, 1.5, 0.5)
    assert not last(1.5, 1.5, 1.5)
    assert not last(9.0)
    assert not last(float("nan"))
    assert not last(1.5, seed=3)


def test_judge_allows_the_rounding_to_subnormal_numbers() -> None:
    spacing = 2.0**-24  # of float16 at zero
    expected = torch.tensor([0.49 * spacing], dtype=torch.float64)
    rounded, one_more = expected.half(), torch.tensor([spacing]).half()
    (right,) = judge(["y"], [rounded], [[expected]], [expected], torch.float32, {})
    (wrong,) = judge(["y"], [one_more], [[expected]], [expected], torch.float32, {})
    assert right.ok
    assert not wrong.ok


def test_judge_is_strict_with_counts_and_bits() -> None:
    counts = torch.tensor([3, 4])
    (right,) = judge(["n"], [counts], [[counts]], [counts], torch.float32, {})
    (wrong,) = judge(["n"], [counts + 1], [[counts]], [counts], torch.float32, {})
    assert right.ok and not wrong.ok
    nan = torch.tensor([torch.nan])
    assert same_bits([nan], [nan])
    assert not same_bits([torch.tensor([0.0])], [torch.tensor([-0.0])])


def test_every_case_can_be_made() -> None:
    """Of every operator in every dtype, with names of their own; poisoned, aligned or not as they say."""
    seen = set()
    for case in all_cases():
        for dtype in case.dtypes:
            inputs = case.make(Draw(1, dtype, "cpu", Dry().size))
            assert (case.operator, case.name, dtype) not in seen
            seen.add((case.operator, case.name, dtype))
            if "misaligned" in case.name:
                assert all(t.data_ptr() % 16 and t.is_contiguous() for t in inputs.values())
    assert {operator for operator, _, _ in seen} == {
        "adjusted_cross_entropy", "class_confusion", "distance_mixture", "focal_weighting", "gaussian_curvature",
        "loss_network", "parametric_cross_entropy", "perturb", "pwl_penalty", "pwl_statistics",
    }  # fmt: skip


def test_poison_takes_every_free_block(monkeypatch: pytest.MonkeyPatch) -> None:
    mebibyte = 2**20
    free, used = {"state": "inactive"}, {"state": "active_allocated"}
    segments = [
        {"segment_type": "small", "stream": 0, "blocks": [{"size": 2 * mebibyte, **free}]},
        {"segment_type": "small", "stream": 0, "blocks": [{"size": 512, **free}, {"size": 1024, **used}]},
        {"segment_type": "large", "stream": 0, "blocks": [{"size": 20 * mebibyte, **free}]},
        {"segment_type": "large", "stream": 0, "blocks": [{"size": 4096, **free}]},  # a remainder
        {
            "segment_type": "large",
            "stream": 7,
            "blocks": [{"size": 6 * mebibyte, **free}],
        },  # another stream's
        {
            "segment_type": "large",
            "stream": 0,
            "segment_pool_id": (0, 1),  # a graph's
            "blocks": [{"size": 8 * mebibyte, **free}],
        },
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(Card, "device", "cpu")
    assert Card().poison(255, ()) == 22 * mebibyte + 512


# ---- The tests' stage.


def test_recorder_keeps_what_is_known(tmp_path: Path) -> None:
    file = tmp_path / "tests.json"
    (tmp_path / "test_example.py").write_text(
        "import json, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_of_broken(broken): pass\n"
        f"def test_running(): assert 'test_running' in json.load(open({str(file)!r}))['running']\n"
    )
    pytest.main(["-q", "-p", "no:cacheprovider", str(tmp_path)], plugins=[recorder := Recorder(file)])
    result = json.loads(file.read_text())
    assert result == recorder.result
    assert (result["passed"], result["failed"], result["skipped"]) == (2, 2, 1)
    assert [name.split("::")[1] for name in result["failures"]] == ["test_bad", "test_of_broken"]
    assert len(result["slowest"]) == 5
    assert result["running"] is None


# ---- The script.


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(CHECK), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def fake_python(folder: Path, status_of: dict[str, int]) -> str:
    """A program that ends as it is told for each module."""
    program = folder / "python"
    cases = "".join(f'*"{module}"*) exit {status};;' for module, status in status_of.items())
    program.write_text(f'#!/bin/sh\necho "ran $*"\ncase "$*" in {cases} esac\n')
    program.chmod(0o755)
    return str(program)


def stages(folder: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
    assert all(set(line) == {"stage", "returncode", "seconds"} for line in lines)
    return [(line["stage"], line["returncode"]) for line in lines]


def test_unknown_stage_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path, "--out", "results", "machine", "sweeep")
    assert result.returncode == 2
    assert "unknown stage or option 'sweeep'" in result.stderr
    assert "machine build tests sweep sanitizer timing profile" in result.stderr
    assert not (tmp_path / "results").exists()


def test_the_machine_is_told_before_anything_is_built(tmp_path: Path) -> None:
    program = "import runpy, sys; sys.modules['lossmeta'] = None; runpy.run_module('gpu.machine', run_name='__main__')"
    command = [sys.executable, "-c", program, str(tmp_path / "machine.json"), "--dry"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert json.loads((tmp_path / "machine.json").read_text())["lossmeta"]


def test_a_failed_stage_does_not_stop_the_others(tmp_path: Path) -> None:
    python = fake_python(tmp_path, {"gpu.tests": 3, "report.py": 1})
    result = run(tmp_path, "--out", "results", PYTHON=python)
    assert result.returncode == 1
    expected = [
        (name, 0) for name in ("machine", "build", "tests", "sweep", "sanitizer", "timing", "profile")
    ]
    expected[2] = ("tests", 3)
    assert stages(tmp_path / "results") == expected
    log = (tmp_path / "results" / "log.txt").read_text()
    assert log == result.stdout
    assert "FAILED: tests" in log
    assert f"-m gpu.sweep {tmp_path}/results/sweep.jsonl --until" in log
    # One of them again: its line is replaced.
    assert run(tmp_path, "--out", "results", "tests", PYTHON=fake_python(tmp_path, {})).returncode == 0
    assert sorted(stages(tmp_path / "results")) == sorted([*expected[:2], *expected[3:], ("tests", 0)])


def test_a_failed_build_stops(tmp_path: Path) -> None:
    result = run(tmp_path, PYTHON=fake_python(tmp_path, {"gpu.build": 1}), OUT=str(tmp_path / "results"))
    assert result.returncode == 1
    assert stages(tmp_path / "results") == [("machine", 0), ("build", 1)]
    assert "stopping" in result.stdout


def test_no_stage_goes_on_when_the_time_is_over(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *report.py*) exit 0;; *) exec sleep 60;; esac\n')
    python.chmod(0o755)
    result = run(tmp_path, "--out", "results", "--seconds", "4", "build", "sweep", PYTHON=str(python))
    assert result.returncode == 1
    assert stages(tmp_path / "results") == [("build", 124)]
    result = run(tmp_path, "--out", "results", "--seconds", "2", "sweep", PYTHON=fake_python(tmp_path, {}))
    assert stages(tmp_path / "results") == [("build", 124), ("sweep", 124)]
    assert "no time left" in result.stdout


def test_what_a_lost_device_leaves_is_done_in_a_new_process(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "ran $*"\ncase "$*" in *--go-on*|*report.py*) exit 0;; *) exit 10;; esac\n'
    )
    python.chmod(0o755)
    result = run(tmp_path, "--out", "results", "sweep", PYTHON=str(python))
    assert stages(tmp_path / "results") == [("sweep", 0)]
    assert result.stdout.count("ran -m gpu.sweep") == 2
