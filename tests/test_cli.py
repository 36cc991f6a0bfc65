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
from lossmeta.recipes import recipes
from lossmeta.recipes._comparison import Recipe


def lossmeta_command(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_version() -> None:
    assert lossmeta_command("--version") == f"lossmeta {lossmeta.__version__}\n"


def test_help_lists_the_commands() -> None:
    text = lossmeta_command("--help")
    for name in ("info", "list", "quickstart", "run"):
        assert name in text


def test_list_names_every_recipe() -> None:
    lines = lossmeta_command("list").splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())
    assert all("Table " in line for line in lines)


def test_run_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []

    def record(self: Recipe, **options: object) -> int:
        calls.append({"name": self.name, **options})
        return 3

    monkeypatch.setattr(Recipe, "run", record)
    command = ["run", "adalfl-mnist", "--size", "paper", "--seeds", "2", "--device", "cuda", "--steps", "7"]
    assert CliRunner().invoke(app, command).exit_code == 3
    assert CliRunner().invoke(app, ["run", "adalfl-objective", "--output", str(tmp_path)]).exit_code == 3
    assert calls == [
        {"name": "adalfl-mnist", "size": "paper", "seeds": 2, "device": "cuda", "steps": 7}
        | {"output": Path("runs/adalfl-mnist-paper")},
        {"name": "adalfl-objective", "size": "small", "seeds": 5, "device": "cpu", "steps": None}
        | {"output": tmp_path},
    ]


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
    assert len(PUBLIC) == 8
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


def test_quickstart_trains_and_shows_its_table(tmp_path: Path) -> None:
    text = lossmeta_command("quickstart", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path))
    for words in (
        "cross-entropy",
        "parametric, fixed Φ = I",
        "parametric, Φ from confusions",
        "average precision",
        "one seed",
    ):
        assert words in text
    assert "±" not in text.split("one seed")[1].split("parametric: Param")[0]
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["settings"]["seeds"] == 1
    assert "Φ from confusions" in report["about"]


def test_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "lossmeta", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"lossmeta {lossmeta.__version__}\n"


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--epochs", "-1"], ["--device", "nonsense"]])
def test_quickstart_refuses_bad_options(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quickstart", "--output", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not list(tmp_path.iterdir())


def test_import_is_light() -> None:
    """Heavy packages that only some recipes and controllers need stay out of ``import lossmeta``."""
    heavy = ("cvxpy", "osqp", "matplotlib", "sklearn", "typer", "rich")
    code = f"import sys, lossmeta; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
