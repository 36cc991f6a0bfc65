"""No figures: they take most of a test's time."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lossmeta.plot.installed", lambda: False)
