"""The arrays of a data set as files: their names and types, mapping them, and writing them safely."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

VERSION = 1
TRAINED = np.uint32(1 << 31)
ARRAYS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<u4"),
    "sequences": np.dtype("<i8"),
    "order": np.dtype("<i8"),
    "packs": np.dtype("<i8"),
}
ROOM = "free some space there, or set TMPDIR to a folder with more space"


class Files:
    """The memory-mapped arrays of a data set. Copies of the data set share this object; temporary files are removed with it.

    folder  None for data from a pickle: its files have no name, so that none can be left behind
    """

    def __init__(self, folder: Path | None, arrays: dict[str, np.ndarray], *, saved: bool):
        self.folder, self.arrays, self.saved = folder, arrays, saved

    @classmethod
    def at(cls, folder: Path, *, saved: bool = False, owned: bool = False) -> Files:
        folder = folder.absolute()
        arrays: dict[str, np.ndarray] = {}
        for name, dtype in ARRAYS.items():
            try:
                arrays[name] = np.memmap(folder / f"{name}.bin", dtype, "r")
            except FileNotFoundError as e:
                raise FileNotFoundError(
                    f"{e.filename} no longer exists; prepare the data again, and keep it with save(folder)"
                ) from None
        files = cls(folder, arrays, saved=saved)
        if owned:
            weakref.finalize(files, _remove_in, os.getpid(), folder)
        return files

    @classmethod
    def of(cls, raw: Mapping[str, bytes]) -> Files:
        arrays: dict[str, np.ndarray] = {}
        for name, dtype in ARRAYS.items():
            with tempfile.TemporaryFile(prefix="unswag-data-") as f:
                f.write(raw[name])
                f.flush()
                arrays[name] = np.memmap(f, dtype, "r")
        return cls(None, arrays, saved=False)


def _remove_in(process: int, folder: Path) -> None:
    if os.getpid() == process:  # not when a forked worker ends
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(folder: Path, remedy: str) -> Iterator[None]:
    """Adds the folder and a remedy to an OSError that is raised while writing there."""
    try:
        yield
    except OSError as e:
        elsewhere = e.filename is not None and not Path(os.fsdecode(e.filename)).is_relative_to(folder)
        if e.errno is None or elsewhere or isinstance(e.__cause__, OSError):  # the last: it has them already
            raise
        raise OSError(e.errno, f"{os.strerror(e.errno)}, while writing in {folder}; {remedy}") from e


def to_disk(f: IO[bytes]) -> None:
    f.flush()
    os.fsync(f.fileno())


def folder_to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
