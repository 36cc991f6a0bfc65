from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lossmeta.experiments import progress
from lossmeta.experiments.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_shows_life_though_the_method_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "EARLY", 0.01)
    said = ""
    with Progress("toy", 3) as shown:
        shown.ends()
        shown.begins("Task: plain, seed 1")
        while "plain" not in said:
            time.sleep(0.01)
            said += capsys.readouterr().err
    assert "lossmeta toy: 1 of 3 trials after 0:00:00; Task: plain, seed 1\n" in said


def test_line() -> None:
    shown = Progress("toy", 30)
    shown.begins("Task: plain, seed 1")
    shown.share(0.256)
    assert shown.line(3725.9) == "lossmeta toy: 0 of 30 trials after 1:02:05; Task: plain, seed 1, 26 % of it"
    shown.ends()
    shown.adds(-9)
    assert shown.line(0).startswith("lossmeta toy: 1 of 21 trials after 0:00:00;")
    shown.share(7)
    assert "100 % of it" in shown.line(0)


def test_a_short_run_logs_nothing(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert toy(tmp_path) == 0
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    toy.before = lambda trial, label: time.sleep(0.15)
    assert toy(tmp_path, seeds=1) == 0
    said = terminal.getvalue()
    assert "first: plain, seed 0" in said
    assert "lossmeta toy:" not in said


def test_a_closed_standard_error_stops_nothing(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EARLY", 0.001)
    closed = io.StringIO()
    closed.isatty = lambda: False  # type: ignore[method-assign]
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    toy.before = lambda trial, label: time.sleep(0.01)
    assert toy(tmp_path) == 0
