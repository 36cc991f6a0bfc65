"""The README tells the truth: its examples run, and its tables list what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import lossmeta

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def first_column(heading: str) -> set[str]:
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)(?:=\w+)?` \|", section, re.MULTILINE))


def test_examples_run() -> None:
    examples = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 4
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)


def test_tables_list_what_there_is() -> None:
    classes = {name for name in lossmeta.losses.__all__ if not name.islower()}
    assert first_column("Losses and metrics") - {"lossmeta"} == classes
    operators = {name for name in lossmeta.ops.__all__ if name.islower() and name != "debug"}
    assert first_column("Operators") == operators


def test_options_are_those_that_the_code_reads() -> None:
    options = first_column("Options")
    code = [
        *(ROOT / "build_backend").glob("*.py"),
        *(ROOT / "lossmeta").rglob("*.py"),
        ROOT / "csrc" / "core.cpp",
    ]
    read = set(re.findall(r"LOSSMETA_[A-Z_]+", "".join(path.read_text(encoding="utf-8") for path in code)))
    assert {option for option in options if option.startswith("LOSSMETA_")} == read & options
    assert {"FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"} <= options


@pytest.mark.parametrize(
    "path", re.findall(r"`([\w/]+\.(?:md|py))`", README) + re.findall(r"!\[.+\]\((.+)\)", README)
)
def test_named_files_exist(path: str) -> None:
    assert (ROOT / path).exists()
