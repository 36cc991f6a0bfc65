from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lossmeta
from lossmeta import _build
from lossmeta.cli import app
from lossmeta.cli.experiments import EPOCH
from lossmeta.recipes import recipes
from lossmeta.recipes._noisy_digits import SETTINGS


def lossmeta_command(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_version() -> None:
    assert lossmeta_command("--version") == f"lossmeta {lossmeta.__version__}\n"


def test_help_lists_the_commands() -> None:
    text = lossmeta_command("--help")
    for name in ("compare", "info", "list", "new", "quickstart", "report", "run"):
        assert name in text


def test_list_names_every_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = lossmeta_command("list").splitlines()
    assert max(map(len, lines)) <= 60
    assert [line.split()[0] for line in lines if line[0] != " "] == list(recipes())
    text = " ".join(" ".join(lines).split())
    assert all(f"{name} {recipe.about}" in text for name, recipe in recipes().items())


class Recorder:
    """A recipe that keeps how it was started."""

    name = "recorder"
    about = "Trains nothing"

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []
        self.status = 3

    def run(self, **options: object) -> int:
        self.calls.append(options)
        return self.status


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder, names = Recorder(), ("recorder", "quickstart", "quickstart-tuneloss")
    monkeypatch.setattr("lossmeta.recipes.recipes", lambda: dict.fromkeys(names, recorder))
    return recorder


def test_run_passes_its_options_on(tmp_path: Path, recorder: Recorder) -> None:
    command = ["run", "recorder", "--size", "paper", "--seeds", "2", "--device", "cuda", "--steps", "7"]
    assert CliRunner().invoke(app, command).exit_code == 3
    assert CliRunner().invoke(app, ["run", "recorder", "--output", str(tmp_path)]).exit_code == 3
    assert recorder.calls == [
        {"size": "paper", "seeds": 2, "device": "cuda", "steps": 7} | {"output": Path("runs/recorder-paper")},
        {"size": "small", "seeds": 5, "device": "cpu", "steps": None, "output": tmp_path},
    ]


def test_quickstart_passes_its_options_on(tmp_path: Path, recorder: Recorder) -> None:
    command = ["quickstart", "--seeds", "2", "--epochs", "3", "--device", "cuda", "--output", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 3
    assert CliRunner().invoke(app, ["quickstart"]).exit_code == 3
    assert recorder.calls == [
        {"size": "small", "seeds": 2, "device": "cuda", "steps": 3 * EPOCH, "output": tmp_path},
        {"size": "small", "seeds": 3, "device": "cpu", "steps": None, "output": Path("runs/quickstart")},
    ]
    assert SETTINGS["sizes"]["train"] // SETTINGS["batch"] == EPOCH


def test_quickstart_has_a_second_table(tmp_path: Path, recorder: Recorder) -> None:
    recorder.status = 0
    command = ["quickstart", "--seeds", "2", "--device", "cuda", "--output", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 0
    first, second = recorder.calls
    assert first["output"] == tmp_path
    assert second == {"size": "small", "seeds": 2, "device": "cuda", "output": tmp_path / "tuneloss"}


def test_run_names_the_recipes_that_there_are() -> None:
    result = CliRunner().invoke(app, ["run", "adalfl"])
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert "adalfl-regression" in text
    assert "got adalfl" in text


PUBLIC = {name for name in lossmeta.ops.__all__ if name.islower() and name != "debug"}


def test_info_is_json_and_names_every_public_operator() -> None:
    facts = lossmeta.info()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["lossmeta"] == lossmeta.__version__
    assert facts["torch"] == torch.__version__
    assert set(facts["operators"]) == PUBLIC
    assert len(PUBLIC) == 10
    assert all(backends["cpu"] == "compiled" for backends in facts["operators"].values())


def test_info_says_why_an_operator_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "why_no_cuda", "Because.")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: key == "CPU")
    facts = lossmeta.info()
    assert facts["cuda"]["why_not"] == "Because."
    assert not facts["cuda"]["compiled"]
    assert facts["operators"]["parametric_cross_entropy"] == {
        "cpu": "compiled",
        "cuda": "reference: Because.",
    }
    table = lossmeta_command("info")
    assert "CUDA: Because." in table
    row = next(line for line in table.splitlines() if line.startswith("parametric_cross_entropy"))
    assert row.split()[1:] == ["compiled", "reference"]
    assert table.count("Because.") == 1


def test_info_says_which_operator_a_cuda_build_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "why_no_cuda", None)
    lacking = "lossmeta::parametric_cross_entropy"

    def has_kernel(name: str, key: str) -> bool:
        return (name, key) != (lacking, "CUDA")

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", has_kernel)
    rows = [line for line in lossmeta_command("info").splitlines() if "reference" in line]
    assert rows[0].split() == ["parametric_cross_entropy", "compiled", "reference"]
    assert rows[1:] == [f"reference: {_build.why_no_kernel('cuda')}"]


@pytest.mark.parametrize(
    ("form", "operator"),
    [
        ("class_confusion_", "class_confusion"),
        ("perturb_out", "perturb"),
        ("loss_network_backward", "loss_network"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_operator_is_compiled_where_all_its_forms_are(
    monkeypatch: pytest.MonkeyPatch, form: str, operator: str, device: str
) -> None:
    monkeypatch.setattr(_build, "why_no_cuda", None)

    def has_kernel(name: str, key: str) -> bool:
        return (name, key) != (f"lossmeta::{form}", device.upper())

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", has_kernel)
    operators = lossmeta.info()["operators"]
    assert operators[operator].pop(device) == f"reference: {_build.why_no_kernel(device)}"
    assert {backend for backends in operators.values() for backend in backends.values()} == {"compiled"}
    library = {"cpu": "compiled core", "cuda": "CUDA library"}[device]
    assert f"reference: The {library} is loaded, but this operator has no kernel in it." in lossmeta_command(
        "info"
    )


def test_info_of_a_build_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "why_no_cuda", None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = lossmeta_command("info")
    assert "CUDA: compiled operators loaded; no GPU is visible" in table
    assert "reference" not in table


@pytest.mark.parametrize("isa", ["generic", None])
def test_info_names_the_instruction_set_in_use(isa: str | None) -> None:
    """In a process of its own: the kernels are chosen once, when lossmeta is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "LOSSMETA_CPU_ISA"}
    if isa:
        environment["LOSSMETA_CPU_ISA"] = isa
    result = subprocess.run(
        [sys.executable, "-m", "lossmeta.cli", "info"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    best = lossmeta.info()["cpu"]["best_isa"]
    assert f"CPU:  instruction set {isa or best} (best here: {best})" in result.stdout


def test_quickstart_trains_and_its_report_is_the_same(tmp_path: Path) -> None:
    folder, page = tmp_path / "run", tmp_path / "docs" / "page.md"
    shown = lossmeta_command("quickstart", "--seeds", "1", "--epochs", "1", "--output", str(folder))
    assert "cross-entropy" in shown
    assert ", 1 seed" in shown
    again = lossmeta_command("report", str(folder))
    assert again.strip()
    assert shown.startswith(again)
    assert lossmeta_command("report", str(folder), "--markdown", str(page)) == ""
    assert page.read_text() == (folder / "tables.md").read_text()


def test_report_names_what_it_cannot_read(tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["report", *arguments])
        assert result.exit_code == 2
        return " ".join(result.output.replace("│", " ").split())

    assert "holds no run: it has neither run.json nor results.json" in refused(str(tmp_path))
    (tmp_path / "run.json").write_text('{"schema": 99}')
    assert "schema 99; lossmeta" in refused(str(tmp_path))


def test_report_says_where_it_cannot_write(tmp_path: Path) -> None:
    results = {"settings": {"recipe": "old"}, "versions": {}, "results": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    result = CliRunner().invoke(
        app, ["report", str(tmp_path), "--markdown", str(tmp_path / "results.json" / "page.md")]
    )
    assert result.exit_code == 1
    assert "lossmeta report: [Errno 17] File exists" in result.output


def test_an_interrupt_while_it_starts_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lossmeta.recipes.recipes", interrupted)
    assert CliRunner().invoke(app, ["list"]).exit_code == 130


def test_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "lossmeta", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"lossmeta {lossmeta.__version__}\n"


def test_import_of_experiments_is_light() -> None:
    """What only draws, computes p or shows tables is loaded when it is needed."""
    heavy = ("matplotlib", "scipy", "sklearn", "rich", "lossmeta.recipes")
    code = f"import sys, lossmeta.experiments; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--epochs", "-1"], ["--device", "nonsense"]])
def test_quickstart_refuses_bad_options(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quickstart", "--output", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not list(tmp_path.iterdir())


def test_import_is_light() -> None:
    """Heavy packages that only some recipes and controllers need stay out of ``import lossmeta``."""
    heavy = ("cvxpy", "osqp", "matplotlib", "scipy", "sklearn", "typer", "rich")
    code = f"import sys, lossmeta; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
