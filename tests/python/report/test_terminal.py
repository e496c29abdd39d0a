"""What is printed stops nobody's work."""

from __future__ import annotations

import io
import sys

import pytest

from unswag.report import terminal
from unswag.report.terminal import Meter, say


class Broken(io.StringIO):
    """A stream whose reader is gone, or whose device is full."""

    def __init__(self, error: type[OSError]) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error("nobody reads this")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


class GoneTerminal(Broken):
    """A terminal that was closed while a bar was on it."""

    def isatty(self) -> bool:
        return True


STREAMS = {
    "pipe": Broken(BrokenPipeError),
    "full": Broken(OSError),
    "closed": closed(),
    "none": None,
    "terminal": GoneTerminal(OSError),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_that_takes_nothing_stops_nobody(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", STREAMS[stream])
    monkeypatch.setattr(terminal.time, "monotonic", iter(range(0, 1000, 60)).__next__)
    say("a report")
    with Meter("work", 3, shown=True, count=True) as meter:
        for _ in range(3):
            meter.advance(1)
    assert meter.done == 3


def test_progress_is_a_line_every_ten_seconds_where_stderr_is_no_terminal(monkeypatch, capsys):
    now = iter((0, 1, 3, 5, 14))  # seconds
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))
    with Meter("work", 4, shown=True, count=True) as meter:
        for _ in range(4):
            meter.advance(1)
    assert capsys.readouterr().err == "work: 50%\nwork: 100%\n"


def test_nothing_is_shown_unless_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(terminal.time, "monotonic", iter(range(0, 1000, 60)).__next__)
    with Meter("work", 2, shown=False) as meter:
        meter.advance(2)
    printed = capsys.readouterr()
    assert printed.err == printed.out == ""
    say("a report")
    assert capsys.readouterr().err == "a report\n"
