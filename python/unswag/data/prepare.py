"""`prepare_data`: reads lines, turns them into sequences and packs these into rows."""

from __future__ import annotations

import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unswag.data import records
from unswag.data.arguments import check_arguments, paths_of
from unswag.data.dataset import PackedDataset, pack
from unswag.data.disk import ARRAYS, ROOM, TRAINED, writing
from unswag.data.lines import Rejected, check_file, check_quarantine, quarantine_path, read_lines, read_record
from unswag.data.records import Bad, NotLearnt
from unswag.data.report import WHERE, Counts
from unswag.data.text import Encoder, Text
from unswag.report.terminal import Meter, say

BATCH_ROWS = 256
BATCH_BYTES = 8 << 20


def prepare_data(
    path_or_paths: str | bytes | os.PathLike[Any] | Iterable[str | bytes | os.PathLike[Any]],
    tokenizer: Any,
    max_length: int,
    *,
    template: str = "auto",
    columns: Mapping[str, str] | None = None,
    packing: bool = True,
    too_long: str = "drop",
    on_error: str = "raise",
    verbose: bool = True,
) -> PackedDataset:
    """Reads .jsonl (or gzipped .jsonl) files, tokenizes them, masks the prompts and packs the sequences into rows.

    Args:
        path_or_paths: one file or several, read in this order; UTF-8, with or without a byte order mark, LF or CRLF.
        tokenizer: a Hugging Face tokenizer with an EOS token, which ends every sequence and keeps its label (even if it is
            the padding token as well).
        max_length: tokens per row.
        template: "chat" renders instructions and messages with the tokenizer's chat template; "alpaca" writes instructions in
            the form of Stanford Alpaca; "auto" uses the chat template if there is one. Prompt / completion and text are used
            unchanged.
        columns: maps a field to its name in the files, such as {"output": "answer"}.
        packing: False gives each sequence a row of its own.
        too_long: "drop" leaves out sequences of more than `max_length` tokens, "truncate" cuts them at the end.
        on_error: "raise" stops at the first bad line; "skip" leaves it out and counts it; "quarantine" also writes it, with the
            reason, to `<file>.quarantine` beside the file, and removes that file if no line is bad. A file of that name that no
            earlier run wrote is an error.
        verbose: prints the report, and the progress of anything that takes more than two seconds.

    A line is also bad if its chat template raises, or leaves out a message or a tool call. Lines without anything to train on
    ("weight": 0) and lines that are too long are counted and left out whatever `on_error` says.

    The time is quadratic in the number of answers of a conversation: the chat template renders the text up to each trained
    answer twice.

    Raises DataError (a ValueError) for a bad line; ValueError for a path that is missing, empty, blank or a directory, for an
    array instead of lines, for an invalid argument, and if no line is usable; TypeError for an argument of the wrong type;
    OSError, which names the folder, if a file cannot be written.
    """
    paths = paths_of(path_or_paths)
    max_length = check_arguments(tokenizer, max_length, template, columns, packing, too_long, on_error, verbose)
    sizes = [check_file(path) for path in paths]
    if on_error == "quarantine":
        for path in paths:
            check_quarantine(quarantine_path(path))

    encoder = Encoder(tokenizer, template, max_length, too_long)
    counts = Counts()
    folder = Path(tempfile.mkdtemp(prefix="unswag-data-"))
    try:
        with (
            Meter("preparing", sum(sizes), verbose) as progress,
            writing(folder, ROOM),
            open(folder / "tokens.bin", "wb") as out,
        ):
            lengths = array("q")
            for path in paths:
                before = counts.read - counts.blank
                with Rejected(path, on_error) as rejected:
                    for text, whole, merged in sequences(path, encoder, columns or {}, counts, rejected, progress):
                        ids = _fit(whole, max_length, too_long, counts, text.place)
                        if ids is not None:
                            out.write(ids.tobytes())
                            lengths.append(len(ids))
                            counts.kept += 1
                            counts.merged += merged
                            counts.tokens += len(ids)
                            counts.trained += int((ids >= TRAINED).sum())
                            for what in dict.fromkeys(text.notes):
                                counts.note(what, text.place)
                    if counts.read - counts.blank == before:
                        raise ValueError(
                            f"prepare_data: no usable line in {path}: all its lines are blank ({counts.blank} read)"
                        )
                    rejected.keep = True
                counts.quarantine += rejected.written
        if counts.read != counts.kept + counts.blank + sum(counts.dropped.values()):
            raise AssertionError(f"prepare_data lost count of its lines: {counts}")
        if not counts.kept:
            raise ValueError(_no_usable_line(paths, counts, max_length))
        if os.path.getsize(folder / "tokens.bin") != 4 * counts.tokens:
            raise OSError(f"the token file in {folder} is shorter than what was written to it; is the disk full?")
        order, packs = pack(np.asarray(lengths), min(max_length, counts.tokens) if packing else 0)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        with writing(folder, ROOM):
            for name, values in (("sequences", starts), ("order", order), ("packs", packs)):
                (folder / f"{name}.bin").write_bytes(values.astype(ARRAYS[name]).tobytes())
        data = PackedDataset(folder, counts, max_length, encoder.pad, owned=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if verbose:
        say(data.report(), wrap=False)
    return data


def _no_usable_line(paths: list[Path], counts: Counts, max_length: int) -> str:
    long = any("too long" in reason for reason in counts.dropped)
    first = [place for places in counts.where.values() for place in places][:WHERE]
    return (
        f"prepare_data: no usable line in {', '.join(map(str, paths))} ({counts.read} read; dropped: {dict(counts.dropped)}); "
        + (f"a larger max_length than {max_length} keeps longer sequences; " if long else "")
        + f"the first: {'; '.join(first)}"
    )


def sequences(
    path: Path, encoder: Encoder, columns: Mapping[str, str], counts: Counts, rejected: Rejected, progress: Meter
) -> Iterator[tuple[Text, np.ndarray, bool]]:
    """(text, marked ids, whether a token spans the end of a prompt) of each usable line, in order."""
    waiting: list[Text] = []
    size = 0
    for number, line in read_lines(path, progress):
        counts.read += 1
        if not line.strip(b" \t\r"):
            counts.blank += 1
            continue
        place = f"{path}:{number}"
        try:
            text = encoder.text(*records.read(read_record(line), columns))
        except NotLearnt:
            counts.drop("not to be learnt", place)
            continue
        except Bad as bad:
            counts.drop(bad.kind, f"{place}:{bad.column}: {bad.reason[:300]}")
            rejected.add(number, line, bad)
            continue
        text.place = place
        waiting.append(text)
        size += len(line)
        if len(waiting) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield from _encoded(encoder, waiting)
            waiting, size = [], 0
    yield from _encoded(encoder, waiting)


def _encoded(encoder: Encoder, texts: list[Text]) -> Iterator[tuple[Text, np.ndarray, bool]]:
    for text, (ids, merged) in zip(texts, encoder.encode(texts), strict=True):
        yield text, ids, merged


def _fit(ids: np.ndarray, max_length: int, too_long: str, counts: Counts, place: str) -> np.ndarray | None:
    if len(ids) > max_length:
        if too_long == "drop":
            counts.drop("too long", f"{place}: {len(ids)} tokens")
            return None
        ids = ids[:max_length]
        if not (ids >= TRAINED).any():
            counts.drop("prompt too long", place)
            return None
        counts.truncated += 1
    return ids
