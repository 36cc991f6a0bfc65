from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmeta.losses import ParametricCrossEntropy
from lossmeta.recipes import _results, quickstart


def without_times(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in report["results"]]


def start(output: Path, **options: Any) -> int:
    return quickstart.run(**{"seeds": 2, "epochs": 2, "device": "cpu", "output": output, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "deep" / "quickstart"
    threads = torch.get_num_threads()
    assert start(output) == 0
    assert torch.get_num_threads() == threads
    return output


def test_results_hold_versions_settings_and_every_run(folder: Path) -> None:
    report = json.loads((folder / "results.json").read_text())
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["scikit-learn"]
    assert report["settings"]["seeds"] == 2
    assert report["settings"]["epochs"] == 2
    assert [(row["method"], row["seed"]) for row in report["results"]] == [
        (method, seed) for seed in range(2) for method in quickstart.METHODS
    ]
    for method, summary in report["summary"].items():
        errors = [row["test"]["error"] for row in report["results"] if row["method"] == method]
        assert summary["error_mean"] == pytest.approx(sum(errors) / 2)
        assert summary["error_sd"] == pytest.approx(abs(errors[0] - errors[1]) / 2**0.5)
    assert {p.name for p in folder.iterdir()} <= {"results.json", "quickstart.png"}


def test_same_seeds_give_the_same_results(folder: Path, tmp_path: Path) -> None:
    assert start(tmp_path) == 0
    reports = [json.loads((f / "results.json").read_text()) for f in (folder, tmp_path)]
    assert without_times(reports[0]) == without_times(reports[1])
    first, second = (reports[0]["results"][i]["test"] for i in (0, len(quickstart.METHODS)))
    assert first != second, "seeds must differ"


def test_figure_is_drawn_where_matplotlib_is(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_split_is_disjoint_and_fixed_by_the_seed() -> None:
    images, labels = quickstart.load_digits()
    tagged = torch.arange(len(labels), dtype=torch.float32)[:, None]
    parts = quickstart.split(tagged, labels, 1)
    rows = torch.cat([inputs[:, 0] for inputs, _ in parts.values()])
    assert len(rows) == len(rows.unique()) == len(images) == 1797
    again, other = quickstart.split(tagged, labels, 1), quickstart.split(tagged, labels, 2)
    assert torch.equal(parts["test"][0], again["test"][0])
    assert not torch.equal(parts["test"][0], other["test"][0])
    assert torch.equal(parts["test"][1], labels[parts["test"][0][:, 0].long()])


def test_methods_share_weights_and_batches() -> None:
    data = quickstart.split(*quickstart.load_digits(), 0)
    weights = [quickstart.network(0).state_dict() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
    assert not torch.equal(weights[0]["0.weight"], quickstart.network(1).state_dict()["0.weight"])
    runs = [quickstart.Run(quickstart.network(0), data, 0, 1, lambda: None) for _ in range(2)]
    epochs = [
        [labels for _, labels in run.batches(epoch)]
        for run, epoch in ((runs[0], 0), (runs[1], 0), (runs[0], 1))
    ]
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[2]))


def test_global_random_state_is_untouched() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    quickstart.network(0)
    assert torch.equal(torch.rand(1), expected)


def test_confusions_are_penalised() -> None:
    loss = ParametricCrossEntropy(quickstart.CLASSES)
    # Class 1 takes class 3 for itself with probability 0.4; class 9 does not occur.
    probabilities = torch.full((9, 10), 1e-6)
    probabilities.fill_diagonal_(1)
    probabilities[1, 1], probabilities[1, 3] = 0.6, 0.4
    quickstart.penalise_confusions(loss, probabilities.log(), torch.arange(9))
    phi = loss.phi
    assert torch.equal(phi.diagonal(), torch.ones(10))
    assert torch.equal(phi, phi.T)
    assert phi[1, 3].item() == pytest.approx(-0.2, abs=1e-4)
    others = phi - torch.eye(10)
    others[1, 3] = others[3, 1] = 0
    assert others.abs().max() < 1e-4


@pytest.mark.parametrize(("after", "kept"), [(0, False), (2, True)])
def test_interruption_keeps_finished_runs_and_earlier_results(
    after: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "results.json").write_text("earlier")
    methods = list(quickstart.METHODS.items())

    def interrupt(run: quickstart.Run) -> None:
        raise KeyboardInterrupt

    methods[after] = (methods[after][0], interrupt)
    monkeypatch.setattr(quickstart, "METHODS", dict(methods))
    assert start(tmp_path) == 130
    message = capsys.readouterr().err
    assert f"stopped after {after} of 8 runs" in message
    partial = tmp_path / "results.partial.json"
    assert partial.exists() == (str(partial) in message) == kept
    if kept:
        assert len(json.loads(partial.read_text())["results"]) == after
    assert (tmp_path / "results.json").read_text() == "earlier"


def test_full_disk_is_said_and_keeps_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "results.json").write_text("earlier")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert start(tmp_path, epochs=1, seeds=1) == 1
    assert "lossmeta quickstart: the results could not be written: [Errno 28]" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "earlier"


def test_missing_scikit_learn_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert start(tmp_path) == 1
    assert capsys.readouterr().err == (
        "lossmeta quickstart: scikit-learn is needed for its digits; "
        "install it with `python -m pip install scikit-learn`\n"
    )


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_unusable_device_is_said(device: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert start(tmp_path, device=device) == 2
    assert f"lossmeta quickstart: --device {device} cannot be used: " in capsys.readouterr().err


def test_replaced_file_is_whole_or_old(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    _results.write_json(path, {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1}

    def torn(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _results.replace_file(path, torn)
    with pytest.raises(ValueError, match="Out of range float"):
        _results.write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(path.parent.iterdir()) == [path]
