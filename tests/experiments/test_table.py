from __future__ import annotations

import io
import json

from rich.console import Console

from lossmeta.experiments.table import LABEL_WIDTH, MARKDOWN_WIDTH, Cell, Column, Table

LONG = "a long label, of many words, that no column has the room for"


def table(groups: dict[str, int], cell: str = "0.1234 ± 0.0012") -> Table:
    """Groups of so many columns each."""
    columns = [Column(f"{group} no {i}".strip(), group) for group, n in groups.items() for i in range(n)]
    rows = {label: tuple(Cell(cell, {"mean": 0.1234}) for _ in columns) for label in ("first", LONG)}
    return Table("Task", tuple(columns), rows, ("A note [not bold].",))


def shown(t: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    t.print(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_everything_is_shown_at_every_width() -> None:
    for width in range(50, 200, 7):
        text = shown(table({"": 2, "error": 3, "precision": 3}), width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert text.count("0.1234 ± 0.0012") == 2 * 8, "no number is broken"
        words = text.replace("\n", " ").split()
        assert all(word in words for word in LONG.split())
        assert "A note [not bold]." in text


def test_groups_stay_together_where_they_fit() -> None:
    def titles(width: int) -> list[str]:
        text = shown(table({"": 1, "error": 2, "precision": 2}), width)
        lines = text.splitlines()
        return [line.rstrip() for line in lines if line.startswith(("Task", "error", "precision"))]

    assert titles(200) == ["Task; error", "precision"], "two groups with a name never share a heading"
    assert titles(70) == ["Task", "error", "precision"]
    assert titles(40) == ["Task", "error", "error", "precision", "precision"]


def test_markdown() -> None:
    text = table({"": 1, "error": 2}, cell="a | b").markdown()
    assert text == (
        "### Task; error\n\n"
        "|  | no 0 | error no 0 | error no 1 |\n"
        "| --- | --: | --: | --: |\n"
        "| first | a \\| b | a \\| b | a \\| b |\n"
        f"| {LONG} | a \\| b | a \\| b | a \\| b |\n\n"
        "A note [not bold].\n"
    )
    wide = table({"": 2, "error": 4, "precision": 4}).markdown().splitlines()
    assert [line for line in wide if line.endswith(":") or line.startswith("#")] == [
        "### Task",
        "error:",
        "precision:",
    ]
    assert LABEL_WIDTH < MARKDOWN_WIDTH


def test_data_is_of_json() -> None:
    data = table({"": 1, "error": 1}).data()
    assert json.loads(json.dumps(data)) == data
    assert data["columns"] == [{"heading": "no 0", "group": ""}, {"heading": "error no 0", "group": "error"}]
    assert data["rows"]["first"][0] == {"text": "0.1234 ± 0.0012", "value": {"mean": 0.1234}}


def test_markup_in_labels_is_text() -> None:
    text = shown(Table("[red]T[/]", (Column("[b]h"),), {"[i]l[/i]": (Cell("[u]c"),)}), 80)
    for words in ("[red]T[/]", "[b]h", "[i]l[/i]", "[u]c"):
        assert words in text


def test_no_rows() -> None:
    empty = Table("Task", (Column("h"),), {})
    assert "h" in shown(empty, 80)
    assert empty.markdown().startswith("### Task")
