"""Tables whose cells are data, for a terminal, for Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Labels are broken at words to this width, and where the columns of one group need the room, to the narrow one.
LABEL_WIDTH = 30
NARROW = 18
MARKDOWN_WIDTH = 130
# Between two columns.
GAP = 2


@dataclass(frozen=True)
class Cell:
    """What is shown, and the numbers behind it, of JSON's types."""

    text: str = ""
    value: Any = None


@dataclass(frozen=True)
class Column:
    """Its heading, and the group of columns that it stays together with; one group has no name."""

    heading: str
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Rows by label, and what is to be said below them.

    Where it is wider than there is room, the groups of columns stand below one another.
    """

    title: str
    columns: tuple[Column, ...]
    rows: dict[str, tuple[Cell, ...]]
    notes: tuple[str, ...] = ()

    def print(self, console: Console) -> None:
        """For people, as wide as the terminal, or as the console says."""
        from rich import box
        from rich.cells import cell_len
        from rich.table import Table as RichTable
        from rich.text import Text

        longest, *widths = self._widths(cell_len, whole_headings=False)
        for title, chosen in self._blocks(console.width, longest, [GAP + width for width in widths]):
            console.print(Text(title, style="italic"))
            table = RichTable(
                box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0)
            )
            room = console.width - sum(GAP + widths[i] for i in chosen)
            table.add_column("", width=min(longest, LABEL_WIDTH, max(NARROW, room)))
            for i in chosen:
                table.add_column(
                    Text(self.columns[i].heading), justify="right", vertical="bottom", width=widths[i]
                )
            for row, cells in self.rows.items():
                table.add_row(Text(row), *(Text(cells[i].text) for i in chosen))
            console.print(table, "")
        for note in self.notes:
            console.print(note, markup=False, highlight=False)

    def markdown(self) -> str:
        """For GitHub and its like."""
        lines: list[str] = []
        longest, *widths = self._widths(len, whole_headings=True)
        for title, chosen in self._blocks(MARKDOWN_WIDTH, longest, [GAP + 1 + width for width in widths]):
            lines += [f"### {title}" if not lines else f"{title}:", ""]
            lines += [
                _row("", *(self.columns[i].heading for i in chosen)),
                _row("---", *["--:"] * len(chosen)),
            ]
            lines += [_row(label, *(cells[i].text for i in chosen)) for label, cells in self.rows.items()]
            lines.append("")
        return "\n".join([*lines, *(line for note in self.notes for line in (note, ""))])

    def data(self) -> dict[str, Any]:
        """For programs: of JSON's types, every cell with its text and its numbers."""
        return {
            "title": self.title,
            "columns": [asdict(column) for column in self.columns],
            "rows": {label: [asdict(cell) for cell in cells] for label, cells in self.rows.items()},
            "notes": list(self.notes),
        }

    def _widths(self, length: Callable[[str], int], *, whole_headings: bool) -> list[int]:
        """Of the labels and of every column; headings may be broken at words where they need not be whole."""
        return [
            max(map(length, self.rows), default=0),
            *(
                max(
                    map(
                        length,
                        (
                            *([column.heading] if whole_headings else column.heading.split()),
                            *(cells[i].text for cells in self.rows.values()),
                        ),
                    )
                )
                for i, column in enumerate(self.columns)
            ),
        ]

    def _blocks(self, room: int, longest: int, widths: list[int]) -> Iterator[tuple[str, list[int]]]:
        """Which columns stand side by side, and under which title: at most one group with a name in each block."""

        def fit(columns: list[int], label_width: int = LABEL_WIDTH) -> bool:
            return min(longest, label_width) + sum(widths[i] for i in columns) <= room

        block: list[int] = []
        name, title = "", self.title
        for group in dict.fromkeys(column.group for column in self.columns):
            members = [i for i, column in enumerate(self.columns) if column.group == group]
            if block and (name or not fit(block + members)):
                yield title, block
                block, title = [], group
            elif group:
                title = f"{title}; {group}"
            name = group
            for i in members:
                if block and not fit([*block, i], NARROW):
                    yield title, block
                    block, title = [], group or self.title
                block.append(i)
        if block:
            yield title, block


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
