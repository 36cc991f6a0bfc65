"""How far a run is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

# Seconds between two lines of a log: in the first minute, and later.
EARLY, LATE = 10.0, 60.0


class Progress:
    """Counts trials; to be entered. It writes to standard error, so that the tables stay alone in a file.

    Args:
        name: of the run, before every line of a log.
        total: trials.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self._share = 0.0
        self._what = ""
        self._bar: Any = None
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._log, daemon=True)

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._shown = self._bar.add_task("", total=self.total)
        else:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._lines.join()

    def begins(self, what: str) -> None:
        """A trial begins."""
        self._what = what
        self.share(0.0)

    def share(self, share: float) -> None:
        """How much of the present trial is done, in [0, 1]."""
        self._share = min(max(share, 0.0), 1.0)
        if self._bar is not None:
            self._bar.update(self._shown, completed=self.done + self._share, description=self._what)

    def ends(self) -> None:
        """A trial is done."""
        self.done += 1
        self.share(0.0)

    def adds(self, trials: int) -> None:
        """So many trials more, or fewer, will be done."""
        self.total += trials
        if self._bar is not None:
            self._bar.update(self._shown, total=self.total)

    def line(self, seconds: float) -> str:
        """The state in one line."""
        minutes, seconds = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        share = f", {100 * self._share:.0f} % of it" if self._share else ""
        time_spent = f"{hours}:{minutes:02}:{seconds:02}"
        return f"lossmeta {self.name}: {self.done} of {self.total} trials after {time_spent}; {self._what}{share}"

    def _log(self) -> None:
        """In a thread of its own: a method need not tell anything for a log to go on."""
        start = time.monotonic()
        while not self._ended.wait(EARLY if time.monotonic() - start < 60 else LATE):
            with suppress(OSError, ValueError):  # standard error may be closed by now
                print(self.line(time.monotonic() - start), file=sys.stderr, flush=True)
