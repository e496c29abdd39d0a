"""What is printed on the way: reports and progress, on stderr. A terminal that is gone or full stops nobody's work."""

from __future__ import annotations

import contextlib
import sys
import time

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Meter", "say"]


# What printing raises where nobody reads: rich turns a broken pipe into SystemExit, a closed file is a ValueError.
UNREAD = (OSError, ValueError, SystemExit)


def say(shown: RenderableType, wrap: bool = True) -> None:
    """Prints to stderr. `wrap`: lines longer than the terminal are wrapped even where stderr is none."""
    with contextlib.suppress(*UNREAD):
        console = Console(stderr=True)
        console.print(shown, soft_wrap=not wrap and not console.is_terminal)


class Meter:
    """Shows progress: a bar on a terminal, elsewhere a line every ten seconds; nothing for work of less than two seconds.

    total  of bytes; with `count`, of things
    """

    def __init__(self, what: str, total: int, shown: bool, count: bool = False):
        self.what, self.total, self.shown, self.count = what, total, shown, count
        self.done, self.begin = 0, time.monotonic()
        self.next_line = self.begin + 2
        self.bar: Progress | None = None

    def __enter__(self) -> Meter:
        return self

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if not self.shown or sys.stderr is None or now < self.begin + 2:
            return
        with contextlib.suppress(*UNREAD):
            self._show(now)

    def _show(self, now: float) -> None:
        if sys.stderr.isatty():
            if self.bar is None:
                done = MofNCompleteColumn() if self.count else DownloadColumn()
                columns = (TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn())
                self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
                self.bar.add_task(self.what, total=self.total)
                self.bar.start()
            self.bar.update(self.bar.task_ids[0], completed=self.done)
        elif now >= self.next_line:
            self.next_line = now + 10
            print(f"{self.what}: {self.done / max(1, self.total):.0%}", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            with contextlib.suppress(*UNREAD):
                self.bar.stop()
