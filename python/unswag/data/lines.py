"""Files, and the lines in them: which files are accepted, how lines are read, and where bad ones go."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from unswag.data import records
from unswag.data.arguments import path_of
from unswag.data.disk import to_disk, writing
from unswag.data.records import Bad
from unswag.report.terminal import Meter

MAX_LINE_BYTES = 64 << 20
QUARANTINE = ".quarantine"
# Files that are passed by mistake, recognised by their first bytes.
_OTHER_FILES = {
    b"\xff\xfe": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"PAR1": "Parquet; convert it: datasets.load_dataset('parquet', data_files=…)['train'].to_json(…)",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it, or use gzip",
    b"\xfd7zX": "compressed with xz; unpack it, or use gzip",
    b"BZh": "compressed with bzip2; unpack it, or use gzip",
}


class DataError(ValueError):
    """A line that cannot be used: `path`, `line`, `column` (both counted from 1) and `reason`."""

    def __init__(self, path: Path, line: int, column: int, kind: str, reason: str):
        super().__init__(
            f'{path}:{line}:{column}: {reason}; correct the line, or pass on_error="skip" or "quarantine" to leave it out'
        )
        self.path, self.line, self.column, self.kind, self.reason = path, line, column, kind, reason

    def __reduce__(self) -> tuple[Any, ...]:  # for pickle: `args` is only the message
        return type(self), (self.path, self.line, self.column, self.kind, self.reason)


def check_file(path: Path) -> int:
    """The size in bytes of a file that can be read. ValueError for any other."""
    try:
        about = path.stat()
    except OSError as e:
        hint = "; for a pattern, pass sorted(glob.glob(…))" if any(c in str(path) for c in "*?[") else ""
        hint = "; ~ is not expanded: pass os.path.expanduser(…)" if str(path).startswith("~") else hint
        raise ValueError(f"prepare_data: {path} cannot be read: {e.strerror}{hint}") from None
    if path.name.endswith((QUARANTINE, f"{QUARANTINE}.jsonl")):
        raise ValueError(
            f'prepare_data: {path} was written by on_error="quarantine"; leave it out, or correct its lines and write '
            "their texts to a file with another name"
        )
    if stat.S_ISDIR(about.st_mode):
        raise ValueError(
            f"prepare_data: {path} is a directory; pass the files in it, such as sorted(Path({str(path)!r}).glob('*.jsonl'))"
        )
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"prepare_data: {path} is not a regular file; write the lines to a file first")
    if not about.st_size:
        raise ValueError(f"prepare_data: {path} is empty (0 bytes)")
    try:
        with open(path, "rb") as f:
            start = f.read(4)
    except OSError as e:
        raise ValueError(f"prepare_data: {path} cannot be read: {e.strerror}") from None
    for begin, what in _OTHER_FILES.items():
        if start.startswith(begin):
            raise ValueError(f"prepare_data: {path} is {what}")
    _check_first_line(path)
    return about.st_size


def check_quarantine(there: Path) -> None:
    """Raises ValueError if the file to which bad lines go exists and any of its lines was not written by an earlier run."""
    if not os.path.lexists(there):
        return

    def foreign(what: str) -> ValueError:
        return ValueError(f'prepare_data: {there} {what}, but on_error="quarantine" writes there; move it away, or pass "skip"')

    if not there.is_file():
        raise foreign("is not a regular file")
    try:
        with open(there, "rb") as f:
            lines = 0
            for lines, line in enumerate(f, 1):
                if not records.is_quarantined(line):
                    raise foreign(f"has a line that no earlier run wrote (line {lines})")
    except OSError as e:
        raise foreign(f"cannot be read ({e.strerror})") from None
    if not lines:
        raise foreign("is empty, so no earlier run wrote it")


def _check_first_line(path: Path) -> None:
    """Raises ValueError, once for the file, if it is one array or if its objects span several lines."""

    def is_json(line: bytes) -> bool:
        try:
            orjson.loads(line)
        except orjson.JSONDecodeError:
            return False
        return True

    first: list[bytes] = []  # lines that are not blank
    with (
        contextlib.suppress(EOFError, OSError, zlib.error),
        _opened(path) as (f, _),
    ):  # read_lines reports what cannot be read
        while len(first) < 2 and (line := f.readline(MAX_LINE_BYTES)):
            if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                first.append(line)
    if not first or not (first[0] == b"{" or first[0].startswith(b"[")) or any(map(is_json, first)):
        return  # at most the first line is bad
    if first[0] == b"{":
        raise ValueError(f"prepare_data: {path} has objects that span several lines; write one per line: jq -c . {path}")
    raise ValueError(f"prepare_data: {path} is an array; write one object per line: jq -c '.[]' {path}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(lines, the file itself): gzip is recognised by its first bytes, whatever the name."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        yield (io.BufferedReader(gzip.GzipFile(fileobj=raw)) if zipped else raw), raw


def read_lines(path: Path, progress: Meter) -> Iterator[tuple[int, bytes]]:
    """(number, bytes without the end of line) of each line; a line that is too long comes as its first MAX_LINE_BYTES + 1."""
    with _opened(path) as (f, raw):
        before = number = 0
        while True:
            try:
                line = f.readline(MAX_LINE_BYTES + 1)
                while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    rest = f.readline(MAX_LINE_BYTES)
                    if not rest or rest.endswith(b"\n"):
                        break
            except (EOFError, OSError, zlib.error) as e:
                raise ValueError(f"prepare_data: {path} cannot be read past line {number}: {e}") from None
            if not line:
                return
            number += 1
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            yield number, line.rstrip(b"\r\n")
            now = raw.tell()
            progress.advance(now - before)
            before = now


def read_record(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise Bad("line too long", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    return records.parse(line)


class Rejected:
    """The bad lines of one file: raised, skipped, or written to a file beside it, completely or not at all."""

    def __init__(self, path: Path, on_error: str):
        self.path, self.on_error, self.keep = path, on_error, False
        self.file: IO[bytes] | None = None
        self.written: list[str] = []

    def __enter__(self) -> Rejected:
        return self

    def add(self, number: int, line: bytes, bad: Bad) -> None:
        if self.on_error == "raise":
            raise DataError(self.path, number, bad.column, bad.kind, bad.reason) from None
        if self.on_error == "quarantine":
            entry = {"line": number, "column": bad.column, "reason": bad.reason, "text": line.decode(errors="backslashreplace")}
            with self.writing():
                if self.file is None:
                    handle, self.name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
                    self.file = os.fdopen(handle, "wb")
                self.file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self.path.parent, 'free some space there, or pass on_error="skip"')

    def __exit__(self, *exception: object) -> None:
        if self.file is None:
            if self.keep and self.on_error == "quarantine":  # no line is bad: remove the file of an earlier run
                quarantine_path(self.path).unlink(missing_ok=True)
            return
        try:
            if self.keep:
                with self.writing():
                    to_disk(self.file)
                    os.replace(self.name, quarantine_path(self.path))
                self.written.append(str(quarantine_path(self.path)))
        finally:
            with contextlib.suppress(OSError):  # an error was raised already, or the file is not kept
                self.file.close()
            Path(self.name).unlink(missing_ok=True)


def quarantine_path(path: str | os.PathLike[str]) -> Path:
    """Where `on_error="quarantine"` writes the bad lines of `path`: a name that "*.jsonl" does not match."""
    return Path(f"{path_of('quarantine_path', 'path', path)}{QUARANTINE}")
