"""Rows of a recipe, each at one of its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lossmeta.experiments import Method, Tuned


def methods(rows: Sequence[Any]) -> list[Method]:
    """Of a tuned row, the candidate in the middle."""
    return [row.candidates[len(row.candidates) // 2] if isinstance(row, Tuned) else row for row in rows]
