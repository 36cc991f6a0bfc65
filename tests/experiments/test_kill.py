from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_what_is_killed_interrupted_or_short_of_disk_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
