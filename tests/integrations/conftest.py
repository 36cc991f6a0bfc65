from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example() -> Callable[[str], str]:
    """Runs an example with the package of this process; returns what it printed."""

    def run(name: str) -> str:
        result = subprocess.run(
            [sys.executable, str(EXAMPLES / name)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
