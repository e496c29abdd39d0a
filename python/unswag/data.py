"""Instruction data: from .jsonl to packed token rows that a trainer takes.

    data = unswag.prepare_data("train.jsonl", tokenizer, max_length=2048)
    Trainer(model, args, train_dataset=data, data_collator=data.collator)

A line is one of (found out line by line, so that a file may mix them)
    {"instruction": …, "input": …, "output": …}     Alpaca; input may be missing, `system` and `history` may be there
    {"messages": [{"role": …, "content": …}, …]}    the last one from the assistant; `tools` and `system` may stand beside it
    {"conversations": [{"from": …, "value": …}, …]} ShareGPT, likewise
    {"prompt": …, "completion": …}                  texts, or lists of messages
    {"text": …}                                     all of it is learnt
What the model is to write has labels; everything else is masked with -100, and so is an answer whose message says
"weight": 0, "train": false or "loss": false.  Sequences are packed best fit decreasing into rows of at most `max_length`
tokens; position ids start at 0 with each sequence, so attention stays inside it (`Collator` says what that takes).
What of a line is neither used nor refused stands in the report, by name.  docs/data.md has all of this at length.

Memory is bounded by one batch of lines plus a few bytes per sequence: tokens go to a temporary file and are read through a
memory map.  The same input gives the same bytes.

On disk (a spool in the temporary folder, or what `save` writes), all little-endian:
    tokens.bin     uint32 per token: the id in bits 0 to 30, bit 31 set if the token has a label
    sequences.bin  int64, n + 1 values: where sequence i starts in tokens.bin
    order.bin      int64, n values: the sequences in the order in which they are packed
    packs.bin      int64, rows + 1 values: where row i starts in order.bin
    manifest.json  written last: version, size and SHA-256 of each file, counts, max_length, pad id
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import hashlib
import io
import json
import multiprocessing
import operator
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import unswag

try:
    import orjson
except ModuleNotFoundError as error:
    unswag._missing("unswag.data", error, "torch")

from unswag import records
from unswag.records import Bad, Chat, Instruction, NotLearnt, Plain

if TYPE_CHECKING:
    import datasets

IGNORE = -100
VERSION = 1
MAX_LINE_BYTES = 64 << 20
BATCH_ROWS = 256
BATCH_BYTES = 8 << 20

_TRAINED = np.uint32(1 << 31)
_QUARANTINE = ".quarantine"
_ARRAYS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<u4"),
    "sequences": np.dtype("<i8"),
    "order": np.dtype("<i8"),
    "packs": np.dtype("<i8"),
}
_ROOM = "make room there, or set TMPDIR to a folder that has it"
_WHERE = 3  # lines that the report names for each reason
_NAMES = 20  # columns that it names
_SPACES = "Ġ \t\n\r\f\v"  # as tokens write them
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MANY = 64  # messages, from which on a rendering for each of them is dear

# The two prompts of Stanford Alpaca (Taori et al., 2023); a system prompt stands in the place of their first paragraph.
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

# Files that are taken for .jsonl by mistake, by their first bytes.
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
    """A line that cannot be used.  `path`, `line` and `column` (both from 1) and `reason` say where and why."""

    def __init__(self, path: Path, line: int, column: int, kind: str, reason: str):
        super().__init__(
            f'{path}:{line}:{column}: {reason}; correct the line, or pass on_error="skip" or "quarantine" to go on without it'
        )
        self.path, self.line, self.column, self.kind, self.reason = path, line, column, kind, reason

    def __reduce__(self) -> tuple[Any, ...]:  # to another process, as it is
        return type(self), (self.path, self.line, self.column, self.kind, self.reason)


@dataclass
class Counts:
    """What became of the lines.  Always read == kept + blank + sum(dropped.values())."""

    read: int = 0
    kept: int = 0
    blank: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    truncated: int = 0  # kept, cut to max_length
    merged: int = 0  # kept; a token spans the end of the prompt, and has a label
    tokens: int = 0
    trained: int = 0  # tokens that have a label
    noted: Counter[str] = field(default_factory=Counter)  # kept lines, by what of them was not used as it stands
    where: dict[str, list[str]] = field(default_factory=dict)  # the first lines of each reason and note, path:line first
    quarantine: list[str] = field(default_factory=list)  # files that were written

    def plain(self) -> dict[str, Any]:
        return vars(self) | {"dropped": dict(self.dropped), "noted": dict(self.noted)}

    def drop(self, kind: str, place: str) -> None:
        self.dropped[kind] += 1
        self._at(kind, place)

    def note(self, what: str, place: str) -> None:
        if what not in self.noted and len(self.noted) >= _NAMES:
            what = "more that is not read"
        self.noted[what] += 1
        self._at(what, place)

    def _at(self, what: str, place: str) -> None:
        places = self.where.setdefault(what, [])
        if len(places) < _WHERE:
            places.append(place)


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
    """Reads .jsonl (or gzipped .jsonl), tokenizes, masks the prompts and packs.

    Args:
        path_or_paths: file or files, read in this order; UTF-8, with or without a byte order mark, LF or CRLF.
        tokenizer: of Hugging Face.  It must have an EOS token, which ends every sequence and keeps its label (even if it is
            the padding token as well).
        max_length: tokens per row.
        template: "chat" renders instructions and messages with the tokenizer's chat template, "alpaca" instructions in the form
            of Stanford Alpaca, "auto" takes the chat template if there is one.  Texts of prompt / completion and of text are
            taken as they are.
        columns: our field → the name that it has in the files, such as {"output": "answer"}.
        packing: False gives each sequence a row of its own.
        too_long: what happens to sequences of more than `max_length` tokens: "drop", or "truncate" at the end.
        on_error: "raise" stops at the first bad line; "skip" leaves it out and counts it; "quarantine" also writes it, with the
            reason, to `<file>.quarantine` beside the file, and takes that file away when no line is bad.  A file of that name
            that no earlier run wrote is an error.
        verbose: prints the report, and the progress of anything that takes more than two seconds.

    Bad is also a line whose chat template raises, or leaves out a message or a tool call.  Lines of which nothing is to be
    learnt ("weight": 0) and those that are too long are counted and left out whatever `on_error` says.

    Time is quadratic in the answers of a conversation: the text of a chat template is rendered twice up to each that is learnt.

    Raises DataError (a ValueError) for a bad line; ValueError for anything else that cannot be used: a missing, empty, blank or
    directory path, an array instead of lines, arguments, no usable line at all; TypeError for an argument of another type;
    OSError, which names the folder, where nothing can be written.
    """
    paths = _paths(path_or_paths)
    max_length = _check_arguments(tokenizer, max_length, template, columns, packing, too_long, on_error, verbose)
    sizes = [_check_file(path) for path in paths]
    if on_error == "quarantine":
        for path in paths:
            _check_quarantine(quarantine_path(path))

    encoder = _Encoder(tokenizer, template, max_length, too_long)
    counts = Counts()
    folder = Path(tempfile.mkdtemp(prefix="unswag-data-"))
    try:
        with (
            _Progress("preparing", sum(sizes), verbose) as progress,
            _writing(folder, _ROOM),
            open(folder / "tokens.bin", "wb") as out,
        ):
            lengths = array("q")
            for path in paths:
                before = counts.read - counts.blank
                with _Rejected(path, on_error) as rejected:
                    for text, whole, merged in _sequences(path, encoder, columns or {}, counts, rejected, progress):
                        ids = _fit(whole, max_length, too_long, counts, text.place)
                        if ids is not None:
                            out.write(ids.tobytes())
                            lengths.append(len(ids))
                            counts.kept += 1
                            counts.merged += merged
                            counts.tokens += len(ids)
                            counts.trained += int((ids >= _TRAINED).sum())
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
        order, packs = _pack(np.asarray(lengths), min(max_length, counts.tokens) if packing else 0)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        with _writing(folder, _ROOM):
            for name, values in (("sequences", starts), ("order", order), ("packs", packs)):
                (folder / f"{name}.bin").write_bytes(values.astype(_ARRAYS[name]).tobytes())
        data = PackedDataset(folder, counts, max_length, encoder.pad, owned=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if verbose:
        console = Console(stderr=True)
        console.print(data.report(), soft_wrap=not console.is_terminal)
    return data


def _no_usable_line(paths: list[Path], counts: Counts, max_length: int) -> str:
    long = any("too long" in reason for reason in counts.dropped)
    first = [place for places in counts.where.values() for place in places][:_WHERE]
    return (
        f"prepare_data: no usable line in {', '.join(map(str, paths))} ({counts.read} read; dropped: {dict(counts.dropped)}); "
        + (f"a larger max_length than {max_length} keeps longer sequences; " if long else "")
        + f"the first: {'; '.join(first)}"
    )


# ---- arguments -------------------------------------------------------------------------------------------------------


def _paths(given: Any) -> list[Path]:
    one = isinstance(given, (str, bytes, os.PathLike))
    if isinstance(given, (set, frozenset)):
        raise TypeError("prepare_data: path_or_paths is a set, which has no order; pass sorted(…)")
    if not one and (isinstance(given, Mapping) or not isinstance(given, Iterable) or hasattr(given, "read")):
        raise TypeError(f"prepare_data: path_or_paths={_shown(given)}; pass the path of a .jsonl file, or a list of paths")
    paths = [_path("prepare_data", "path_or_paths", path) for path in ([given] if one else given)]
    if not paths:
        raise ValueError(f"prepare_data: no files given: path_or_paths={_shown(given)}; if it is from a glob, nothing matched")
    return paths


def _path(where: str, name: str, given: Any) -> Path:
    if not isinstance(given, (str, bytes, os.PathLike)):
        what = "a record, not a path; write records to a .jsonl file, one a line" if isinstance(given, Mapping) else "no path"
        raise TypeError(f"{where}: {name}: {_shown(given)} is {what}")
    path = os.fsdecode(given)
    if not path or "\0" in path:
        raise ValueError(f"{where}: {name}: {path!r} is no path; pass the name of a file or folder")
    return Path(path)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '…'}"


def _check_arguments(
    tokenizer: Any,
    max_length: Any,
    template: Any,
    columns: Any,
    packing: Any,
    too_long: Any,
    on_error: Any,
    verbose: Any,
) -> int:
    """`max_length` as an int, everything else as it is, or an error that names it."""
    if isinstance(tokenizer, (str, os.PathLike)):
        raise TypeError(
            f"prepare_data: tokenizer={tokenizer!r} is a name; pass AutoTokenizer.from_pretrained({str(tokenizer)!r})"
        )
    if not callable(tokenizer) or not all(hasattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "pad")):
        remedy = "AutoTokenizer.from_pretrained(…) of Hugging Face"
        if hasattr(tokenizer, "tokenizer"):
            remedy = "its .tokenizer"
        elif type(tokenizer).__module__.partition(".")[0] == "tokenizers":
            remedy = "transformers.PreTrainedTokenizerFast(tokenizer_object=…, eos_token=…)"
        raise TypeError(f"prepare_data: tokenizer is a {type(tokenizer).__name__}; pass {remedy}")
    try:
        if isinstance(max_length, (bool, np.bool_)):
            raise TypeError
        length = operator.index(max_length)
    except TypeError:
        raise TypeError(
            f"prepare_data: max_length={max_length!r} is a {type(max_length).__name__}; pass an int, such as 2048"
        ) from None
    if length < 2:
        raise ValueError(f"prepare_data: max_length={length}; a row needs 2 tokens at least, one to predict another")
    if length >= 1 << 31:
        raise ValueError(
            f"prepare_data: max_length={length}; a row has fewer than 2**31 tokens.  Tokenizers without a limit say 1e30: pass "
            "the model's own, such as model.config.max_position_embeddings"
        )
    for name, value, allowed in (
        ("template", template, ("auto", "chat", "alpaca")),
        ("too_long", too_long, ("drop", "truncate")),
        ("on_error", on_error, ("raise", "skip", "quarantine")),
    ):
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"prepare_data: {name}={value!r}; choose {', '.join(map(repr, allowed))}")
    for name, value in (("packing", packing), ("verbose", verbose)):
        if not isinstance(value, (int, np.bool_)) or value not in (0, 1):
            raise TypeError(f"prepare_data: {name}={value!r}; pass True or False")
    if columns is not None and not isinstance(columns, Mapping):
        raise TypeError(
            f'prepare_data: columns={columns!r}; pass a dict of our field → your column, such as {{"output": "answer"}}'
        )
    known = {*(name for names in records.FORMS.values() for name in names), *records.OPTIONAL}
    unknown = [name for name in columns or {} if name not in known]
    if unknown:
        raise ValueError(f"prepare_data: columns names {unknown}, which is no field of ours; those are {sorted(known)}")
    for name, column in (columns or {}).items():
        if not isinstance(column, str):
            raise TypeError(f"prepare_data: columns[{name!r}]={column!r}; pass the name of a column, text")
    return length


# ---- lines ----------------------------------------------------------------------------------------------------------------


def _check_file(path: Path) -> int:
    """Size in bytes of a file that can be read, or ValueError."""
    try:
        about = path.stat()
    except OSError as e:
        hint = "; a pattern? Pass sorted(glob.glob(…))" if any(c in str(path) for c in "*?[") else ""
        hint = "; ~ is a name like others here: pass os.path.expanduser(…)" if str(path).startswith("~") else hint
        raise ValueError(f"prepare_data: {path} cannot be read: {e.strerror}{hint}") from None
    if path.name.endswith((_QUARANTINE, f"{_QUARANTINE}.jsonl")):
        raise ValueError(
            f'prepare_data: {path} is what on_error="quarantine" wrote; leave it out, or correct the lines in it and write '
            "their texts to a file of another name"
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


def _check_quarantine(there: Path) -> None:
    """What stands where the bad lines go must be what an earlier run wrote, line by line, or ValueError."""
    if not os.path.lexists(there):
        return

    def foreign(what: str) -> ValueError:
        return ValueError(f'prepare_data: {there} {what}, and on_error="quarantine" writes there; move it away, or pass "skip"')

    if not there.is_file():
        raise foreign("is no regular file")
    try:
        with open(there, "rb") as f:
            lines = 0
            for lines, line in enumerate(f, 1):
                if not records.is_quarantined(line):
                    raise foreign(f"has a line that no earlier run wrote (line {lines})")
    except OSError as e:
        raise foreign(f"cannot be read ({e.strerror})") from None
    if not lines:
        raise foreign("is empty, which no earlier run left")


def _check_first_line(path: Path) -> None:
    """One array, or objects over several lines, are no lines: said at once, not once for each line."""

    def is_json(line: bytes) -> bool:
        try:
            orjson.loads(line)
        except orjson.JSONDecodeError:
            return False
        return True

    first: list[bytes] = []  # lines that are not blank
    with contextlib.suppress(EOFError, OSError, zlib.error), _opened(path) as (f, _):  # what cannot be read is said by _lines
        while len(first) < 2 and (line := f.readline(MAX_LINE_BYTES)):
            if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                first.append(line)
    if not first or not (first[0] == b"{" or first[0].startswith(b"[")) or any(map(is_json, first)):
        return  # a bad first line at most
    if first[0] == b"{":
        raise ValueError(f"prepare_data: {path} has objects over several lines; make one line of each: jq -c . {path}")
    raise ValueError(f"prepare_data: {path} is an array; each line must be an object of its own: jq -c '.[]' {path}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(lines, the file itself): gzip is recognised by its first bytes, whatever the name."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        yield (io.BufferedReader(gzip.GzipFile(fileobj=raw)) if zipped else raw), raw


def _lines(path: Path, progress: _Progress) -> Iterator[tuple[int, bytes]]:
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


def _record(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise Bad("line too long", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    return records.parse(line)


# ---- from a record to text -------------------------------------------------------------------------------------------


@dataclass
class _Text:
    """Pieces of text, every other one trained: prompt, answer, prompt, answer … and perhaps a prompt at the end."""

    pieces: list[str]
    bos: bool  # as plain texts start; a chat template writes its own
    notes: list[str]  # what of the line was not used as it stands
    place: str = ""  # path:line


class _Encoder:
    """Text → token ids, with the trained ones marked."""

    def __init__(self, tokenizer: Any, template: str, max_length: int, too_long: str):
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long
        self.offsets = bool(getattr(tokenizer, "is_fast", False))  # it says which characters a token stands for
        eos, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
        if eos is None:
            raise ValueError(
                "prepare_data: the tokenizer has no EOS token; set tokenizer.eos_token, or the model never learns to stop"
            )
        self.eos: int = eos
        self.pad: int = eos if pad is None else pad  # padding has no labels, so any token will do
        # Whether the tokenizer itself would start a plain text with BOS.
        self.bos = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if template == "chat" and not has_template:
            raise ValueError(
                'prepare_data: template="chat", but the tokenizer has no chat template; set tokenizer.chat_template'
            )
        self.use_chat = template == "chat" or (template == "auto" and has_template)
        self.has_template = has_template

    def text(self, said: Chat | Instruction | Plain, notes: list[str]) -> _Text:
        if isinstance(said, Plain):
            return _Text([said.prompt, said.answer], True, notes)
        if isinstance(said, Instruction) and not self.use_chat:
            return self._alpaca(said, notes)
        return self._chat(said.chat() if isinstance(said, Instruction) else said, notes)

    def _alpaca(self, said: Instruction, notes: list[str]) -> _Text:
        if said.history:
            raise Bad(
                "wrong type",
                'the Alpaca form has one turn, and here is a history; it takes a chat template and template="chat"',
            )
        if said.tools:
            notes = [*notes, "tools are not written by the Alpaca form"]
        first = said.system or (_ALPACA_INPUT if said.input else _ALPACA)
        extra = f"\n\n### Input:\n{said.input}" if said.input else ""
        prompt = f"{first}\n\n### Instruction:\n{said.instruction}{extra}\n\n### Response:\n"
        return _Text([prompt, said.output], True, notes)

    def _chat(self, chat: Chat, notes: list[str]) -> _Text:
        if not self.has_template:
            raise Bad("chat template", "messages need a chat template, and the tokenizer has none; set tokenizer.chat_template")
        try:
            return self._turns(chat, notes)
        except Bad:
            if chat.parts:  # for a template that goes through the parts of a content
                with contextlib.suppress(Bad):
                    return self._turns(chat.in_parts(), notes)
            raise

    def _turns(self, chat: Chat, notes: list[str]) -> _Text:
        """The rendered conversation, cut at the borders of what is learnt.

        Quadratic in the messages: two renderings of all that stands before an answer, for each answer that is learnt and that
        is not behind what max_length keeps.  All else takes a fixed number of renderings (`_unwritten` says when it does not).
        """
        whole = self._render(chat.messages, chat.tools)
        kept = len(whole)  # characters that are looked at
        if len(chat.messages) > _MANY and self.too_long == "drop":
            ids = self._ids([whole])[0]
            if (self._end(ids, True) or len(ids) + 1) > self.max_length:
                return _Text([whole], False, notes)  # not worth the renderings
        elif len(chat.messages) > _MANY and self.offsets:
            ((_, _, ends),) = map(self._spans, *self._tokens([whole]))
            kept = int(ends[: self.max_length + 1].max(initial=0))
        try:
            learnt = self._answers(chat, whole, kept)
        except Bad:
            marked = self._generated(chat, whole)
            if marked is None:
                raise
            learnt = marked
        pieces, done = list[str](), 0
        for begin, end in learnt:
            pieces += [whole[done:begin], whole[begin:end]]
            done = end
        return _Text([*pieces, whole[done:]] if done < len(whole) else pieces, False, notes + self._unwritten(chat, whole))

    def _answers(self, chat: Chat, whole: str, kept: int) -> list[tuple[int, int]]:
        """Where the answers that are learnt begin and end in the text, by rendering the conversation up to there."""
        messages, tools, done = chat.messages, chat.tools, 0
        found = []
        for i, message in enumerate(messages):
            if not chat.learnt[i]:
                continue
            if done > kept:
                break
            told = whole if i == len(messages) - 1 else self._render(messages[: i + 1], tools)
            asked = self._render(messages[:i], tools, add_generation_prompt=True) if i else self._opening(message, told, tools)
            if len(asked) < done or not (told.startswith(asked) and whole.startswith(told)):
                raise Bad(
                    "chat template",
                    f"the chat template writes message {i} otherwise when others follow, or begins it otherwise than its "
                    "generation prompt, so what the model is to write cannot be told from the prompt; give each answer a "
                    "line of its own, or take a template with {% generation %} blocks "
                    "(trl.chat_template_utils.get_training_chat_template)",
                )
            done = len(told)
            found.append((len(asked), done))
        return found

    def _opening(self, message: dict[str, Any], told: str, tools: list[Any] | None) -> str:
        """What the template writes before the first message says anything: all that another content does not change."""
        other = "\ue000" if isinstance(message["content"], str) else [{"type": "text", "text": "\ue000"}]
        return told[: _common(told, self._render([{**message, "content": other}], tools))]

    def _generated(self, chat: Chat, whole: str) -> list[tuple[int, int]] | None:
        """The same from the {% generation %} blocks of the template; None if it has none."""
        try:
            from transformers.utils.chat_template_utils import render_jinja_template
        except ModuleNotFoundError:
            return None
        if not hasattr(self.tokenizer, "get_chat_template"):
            return None
        template = self.tokenizer.get_chat_template(tools=chat.tools)
        if not _GENERATION.search(template):
            return None
        texts: Sequence[str]
        blocks: Sequence[Sequence[tuple[int, int]]]
        texts, blocks = render_jinja_template(  # type: ignore[assignment,str-unpack]
            conversations=[chat.messages],
            tools=chat.tools or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        said = [[place.text for place in _places(chat.messages[i], i) if place.text in whole] for i in answers]
        parts = [whole[begin:end] for begin, end in blocks[0]]
        paired = len(parts) == len(answers)
        if not paired and all(chat.learnt[i] for i in answers):  # then it is all the same which block is whose
            parts = ["".join(parts)] * len(answers)
        fits = texts == [whole] and len(parts) == len(answers) <= len(blocks[0])
        if not fits or not all(text in part for part, texts in zip(parts, said, strict=True) for text in texts):
            raise Bad(
                "chat template",
                "the chat template's {% generation %} blocks are not one for each answer, and its generation prompt does not "
                "tell either where they begin; give each answer a line of its own",
            )
        learnt = [chat.learnt[i] for i in answers] if paired else [True] * len(blocks[0])
        return [block for block, wanted in zip(blocks[0], learnt, strict=True) if wanted]

    def _unwritten(self, chat: Chat, whole: str) -> list[str]:
        """Notes of what the template does not write.  Raises Bad for a message or a part of a tool call that it leaves out.

        Contents that follow each other in the text are there, unless they are so short that the template itself may write them.
        Else everything gets a mark of its own (what is equal the same), and the marks that one rendering shows were written.
        What has no mark there costs a rendering: with another value, is the text the same?
        """
        messages, tools = chat.messages, chat.tools
        notes = list[str]()

        def changes(others: list[dict[str, Any]], tools: list[Any] | None = tools) -> bool:
            try:
                return self._render(others, tools) != whole
            except Bad:
                return True

        def without(keys: Collection[str]) -> list[dict[str, Any]]:
            return [{k: v for k, v in message.items() if k not in keys} for message in messages]

        def put(i: int, message: dict[str, Any] | None) -> list[dict[str, Any]]:
            return [*messages[:i], *([message] if message else []), *messages[i + 1 :]]

        def left_out(what: str) -> Bad:
            return Bad("chat template", f"the chat template leaves out {what}")

        places = [place for i, message in enumerate(messages) for place in _places(message, i)]
        given = tools or []
        names = [_name(tool, k) for k, tool in enumerate(given)]
        contents, at = [place for place in places if place.content], 0
        for place in contents:
            found = whole.find(place.text, at) if at >= 0 else -1
            at = found + len(place.text) if found >= 0 else -1
        marks = _Marks(whole, [*places, *filter(None, names)])
        asked = at < 0 or tools or len(contents) < len(places) or any(len(place.text) < 16 for place in contents)
        if asked:
            with contextlib.suppress(Bad):  # then each is asked for alone
                marks.find(self._render(marks.on(messages, places), marks.on(given, filter(None, names))))
        for place in places if asked else []:
            i, message = place.at, messages[place.at]
            if not marks.written(place):
                if not changes(put(i, _with(message, {place.path: place.another()}))):
                    bare = {k: v for k, v in message.items() if k != "tool_calls"}
                    whole_call = not place.content and not changes(put(i, bare))
                    raise left_out(f"the tool calls of message {i}" if whole_call else place.what)
                if place.content and marks.times[place.key] and not changes(put(i, None)):  # written for another that is equal
                    raise left_out(place.what)
            if place.content and (place.text not in whole or 0 < marks.times[place.key] < marks.wanted[place.key]):
                notes.append(f"what the {message['role']} says is written otherwise by the chat template")
        if asked and not marks.in_order(places):
            notes.append("messages are written in another order by the chat template")
        others = {key: None for message in messages for key in message if key not in ("role", "content", "tool_calls")}
        if others and changes(without(others)):  # then which of them?  Of the first few: the line is to take linear time
            if len(others) > _NAMES:
                notes.append(
                    f"of the keys of a message only the first {_NAMES} were looked for in what the chat template writes"
                )
            others = {key: None for key in list(others)[:_NAMES] if not changes(without([key]))}
        notes += [f"{key!r} of a message is not written by the chat template" for key in others]
        lost = list[str]()
        for k, (tool, name) in enumerate(zip(given, names, strict=True)):
            other = [_with(tool, {name.path: name.another()})] if name else []
            if not (name and marks.written(name)) and not changes(messages, [*given[:k], *other, *given[k + 1 :]]):
                lost.append(f"{name.what if name else f'tool {k}'} is not written by the chat template")
        return notes + (lost if len(lost) < len(names) else ["tools are not written by the chat template"] * bool(lost))

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> str:
        if tools:
            options["tools"] = tools
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as e:  # templates are programs: they raise whatever Python raises
            refused = type(e).__module__.startswith("jinja2")
            why = f"refuses it: {e}" if refused else f"fails: {type(e).__name__}: {e}"
            raise Bad("chat template", f"the chat template {why}") from None
        if not isinstance(text, str):
            raise ValueError(
                f"prepare_data: apply_chat_template(…, tokenize=False) of {type(self.tokenizer).__name__} gives "
                f"{type(text).__name__}, where text was expected"
            )
        return text

    def encode(self, texts: Sequence[_Text]) -> list[tuple[np.ndarray, bool]]:
        """(ids with bit 31 on the trained ones, whether a token spans the end of a prompt) of each text."""
        if not texts:
            return []
        wholes = ["".join(text.pieces) for text in texts]
        if self.offsets:
            spans = map(self._spans, *self._tokens(wholes))
            return [
                self._marked(text, ids, *_covered(text.pieces, *span)) for text, (ids, *span) in zip(texts, spans, strict=True)
            ]
        prefixes = ["".join(text.pieces[: i + 1]) for text in texts for i in range(len(text.pieces) - 1)]
        ids = iter(self._ids(wholes + prefixes))
        whole_ids = [next(ids) for _ in wholes]
        return [
            self._marked(text, whole, *_after(whole, [next(ids) for _ in text.pieces[1:]]))
            for text, whole in zip(texts, whole_ids, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _tokens(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """(ids, offsets) of each text."""
        found = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        return found["input_ids"], found["offset_mapping"]

    @functools.cached_property
    def _spaces(self) -> np.ndarray:
        """[ids, 2]: how many spaces each token begins and ends with, which `trim_offsets` takes off its offsets."""
        vocabulary = self.tokenizer.get_vocab()
        spaces = np.zeros((max(vocabulary.values()) + 1, 2), np.int64)
        for token, i in vocabulary.items():
            spaces[i] = [len(token) - len(bare) for bare in (token.lstrip(_SPACES), token.rstrip(_SPACES))]
        return spaces

    def _spans(self, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """(ids, where each token begins and ends in the text), from offsets that may have been trimmed or be empty."""
        begin, end = np.asarray(offsets, np.int64).reshape(-1, 2).T
        reached = np.maximum.accumulate(np.concatenate([[0], end]))[:-1]
        if (begin > reached).any():  # a gap: spaces that were trimmed off a token, or characters that no token stands for
            before, after = self._spaces[ids].T
            follows = np.concatenate([begin[1:] - before[1:], end[-1:] + after[-1:]])
            begin = np.maximum(np.minimum(begin, reached), begin - before)
            end = np.maximum(end, np.minimum(follows, end + after))
        return ids, begin, np.maximum(end, begin + 1)  # empty: a byte of the character there

    def _end(self, ids: list[int], chat: bool) -> int | None:
        """How many ids there are up to the EOS that ends them; None if none does.

        A chat template ends the answer with EOS and perhaps a line break, which nobody generates.
        """
        if self.eos not in ids:
            return None
        end = len(ids) - ids[::-1].index(self.eos)
        rest = ids[end:]
        return end if not rest or (chat and not self.tokenizer.decode(rest).strip()) else None

    def _marked(self, text: _Text, ids: list[int], trained: np.ndarray, merged: bool) -> tuple[np.ndarray, bool]:
        end = self._end(ids, not text.bos)
        if end is None:
            ids = [*ids, self.eos]
            end = len(ids)
            trained = np.append(trained, len(text.pieces) % 2 == 0)  # not after an answer that is not learnt
        out = np.array([*(self.bos if text.bos else []), *ids[:end]], np.uint32)
        marks = np.concatenate([np.zeros(len(out) - end, bool), trained[:end]])
        marks[0] = False  # nothing comes before it: in a row it would be predicted from another sequence
        return out | marks * _TRAINED, merged


def _covered(pieces: list[str], begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, bool]:
    """(tokens that stand for a character of an answer, whether one of them stands for one of a prompt as well)."""
    learnt = np.repeat(np.arange(len(pieces)) % 2, [len(piece) for piece in pieces])
    before = np.concatenate([[0], np.cumsum(learnt)])  # characters of answers before each character
    end = np.minimum(end, len(learnt))
    characters = before[end] - before[begin]
    return characters > 0, bool(((characters > 0) & (characters < end - begin)).any())


def _after(ids: list[int], prefixes: list[list[int]]) -> tuple[np.ndarray, bool]:
    """The same for a tokenizer without offsets, from the ids of the text up to each border."""
    borders = [_common(prefix, ids) for prefix in prefixes]
    # Where it is not all of the prefix, the tokenizer joined characters of both sides of the border.
    merged = any(same != len(prefix) for same, prefix in zip(borders, prefixes, strict=True))
    trained = np.zeros(len(ids), bool)
    for begin, end in zip(borders[::2], [*borders[1::2], len(ids)], strict=False):
        trained[begin:end] = True
    return trained, merged


@dataclass(frozen=True)
class _Place:
    """Something that a message or a tool says, and that the template is to write."""

    at: int  # of the message, or of the tool
    path: tuple[Any, ...]  # where in it
    value: Any
    what: str

    @property
    def content(self) -> bool:
        return self.path[0] == "content"

    @property
    def text(self) -> str:
        return self.value.strip() if isinstance(self.value, str) else repr(self.value)

    @property
    def key(self) -> tuple[str, str]:
        """The same for what is equal."""
        return self.path[0], self.text

    def another(self) -> Any:
        return _another(self.value) if isinstance(self.value, str) else "x"


def _places(message: dict[str, Any], i: int) -> Iterator[_Place]:
    """Contents, and names and arguments of tool calls, that say something."""
    content, who = message["content"], f"message {i}, which is from the {message['role']}"
    texts = (
        [(("content",), content)]
        if isinstance(content, str)
        else [(("content", k, "text"), part["text"]) for k, part in enumerate(content)]
    )
    found = [_Place(i, path, text, who) for path, text in texts]
    for k, call in enumerate(message.get("tool_calls", ())):
        path: tuple[Any, ...] = ("tool_calls", k)
        function = call
        if isinstance(call.get("function"), dict):
            path, function = (*path, "function"), call["function"]
        of = f"of tool call {k} of message {i}"
        given = function.get("arguments")
        found.append(_Place(i, (*path, "name"), function.get("name"), f"the name {of}"))
        if isinstance(given, dict):
            found += [_Place(i, (*path, "arguments", key), value, f"the argument {key!r} {of}") for key, value in given.items()]
        else:
            found.append(_Place(i, (*path, "arguments"), given, f"the arguments {of}"))
    return (
        place for place in found if not (records.says_nothing(place.value) or (isinstance(place.value, str) and not place.text))
    )


def _name(tool: dict[str, Any], k: int) -> _Place | None:
    """The name of a tool, or else its first text."""
    path, function = ((), tool) if not isinstance(tool.get("function"), dict) else (("function",), tool["function"])
    for key in ("name", *function):
        if isinstance(text := function.get(key), str) and text.strip():
            return _Place(k, (*path, key), text, f"the tool {text!r}" if key == "name" else f"tool {k}")
    return None


def _with(value: Any, others: Mapping[tuple[Any, ...], Any]) -> Any:
    """A copy of `value` with other values at these paths."""
    if () in others:
        return others[()]
    below: dict[Any, dict[tuple[Any, ...], Any]] = {}
    for (first, *rest), other in others.items():
        below.setdefault(first, {})[tuple(rest)] = other
    out = copy.copy(value)
    for key, inside in below.items():
        out[key] = _with(value[key], inside)
    return out


class _Marks:
    """A mark for each place, the same for those that are equal, and how often a rendering shows it."""

    def __init__(self, whole: str, places: Sequence[_Place]):
        self.letter = next(c for c in map(chr, range(0xE000, 0x110000)) if c not in whole)  # of the private ones
        self.wanted = Counter(place.key for place in places)
        self.numbers = {key: n for n, key in enumerate(self.wanted)}
        self.keys = list(self.wanted)
        self.found: list[tuple[str, str]] = []
        self.times: Counter[tuple[str, str]] = Counter()

    def on(self, values: Sequence[Any], places: Iterable[_Place]) -> list[Any]:
        """`values` with the marks at these places."""
        others: dict[int, dict[tuple[Any, ...], Any]] = {}
        for place in places:
            others.setdefault(place.at, {})[place.path] = self._marked(place)
        return [_with(value, others[i]) if i in others else value for i, value in enumerate(values)]

    def _marked(self, place: _Place) -> Any:
        """The value with its mark, which is at the end of a text: templates look at how it begins, and take off spaces."""
        mark, value = f"{self.letter}{self.numbers[place.key]}{self.letter}", place.value
        if isinstance(value, str):
            said = value.rstrip()
            return said + mark + value[len(said) :]
        return {mark: mark} if isinstance(value, dict) else [mark] if isinstance(value, list) else mark

    def find(self, text: str) -> None:
        self.found = [self.keys[int(n)] for n in re.findall(f"{self.letter}([0-9]+){self.letter}", text)]
        self.times = Counter(self.found)

    def written(self, place: _Place) -> bool:
        return self.times[place.key] >= self.wanted[place.key]

    def in_order(self, places: Iterable[_Place]) -> bool:
        """Whether the messages follow each other as they do in the line; each by the first thing that it says."""
        firsts: dict[int, _Place] = {}
        for place in places:
            firsts.setdefault(place.at, place)
        found = iter(self.found)
        return all(place.key in found for place in firsts.values() if self.written(place))


def _another(text: str) -> str:
    """As long as `text`, with the same spaces, and other letters."""
    return re.sub(r"\S", lambda letter: "y" if letter[0] == "x" else "x", text)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements are the same from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _sequences(
    path: Path, encoder: _Encoder, columns: Mapping[str, str], counts: Counts, rejected: _Rejected, progress: _Progress
) -> Iterator[tuple[_Text, np.ndarray, bool]]:
    """(text, marked ids, whether a token spans the end of a prompt) of each usable line, in order."""
    waiting: list[_Text] = []
    size = 0
    for number, line in _lines(path, progress):
        counts.read += 1
        if not line.strip(b" \t\r"):
            counts.blank += 1
            continue
        place = f"{path}:{number}"
        try:
            text = encoder.text(*records.read(_record(line), columns))
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


def _encoded(encoder: _Encoder, texts: list[_Text]) -> Iterator[tuple[_Text, np.ndarray, bool]]:
    for text, (ids, merged) in zip(texts, encoder.encode(texts), strict=True):
        yield text, ids, merged


def _fit(ids: np.ndarray, max_length: int, too_long: str, counts: Counts, place: str) -> np.ndarray | None:
    if len(ids) > max_length:
        if too_long == "drop":
            counts.drop("too long", f"{place}: {len(ids)} tokens")
            return None
        ids = ids[:max_length]
        if not (ids >= _TRAINED).any():
            counts.drop("prompt too long", place)
            return None
        counts.truncated += 1
    return ids


class _Rejected:
    """Bad lines of one file: raised, left out, or written beside it (complete or not at all)."""

    def __init__(self, path: Path, on_error: str):
        self.path, self.on_error, self.keep = path, on_error, False
        self.file: IO[bytes] | None = None
        self.written: list[str] = []

    def __enter__(self) -> _Rejected:
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
        return _writing(self.path.parent, 'make room there, or pass on_error="skip"')

    def __exit__(self, *exception: object) -> None:
        if self.file is None:
            if self.keep and self.on_error == "quarantine":  # what an earlier run wrote there is bad no more
                quarantine_path(self.path).unlink(missing_ok=True)
            return
        try:
            if self.keep:
                with self.writing():
                    _to_disk(self.file)
                    os.replace(self.name, quarantine_path(self.path))
                self.written.append(str(quarantine_path(self.path)))
        finally:
            with contextlib.suppress(OSError):  # what is lost by now was said, or is not kept
                self.file.close()
            Path(self.name).unlink(missing_ok=True)


def quarantine_path(path: str | os.PathLike[str]) -> Path:
    """Where `on_error="quarantine"` writes the bad lines of `path`: a name that "*.jsonl" does not match."""
    return Path(f"{_path('quarantine_path', 'path', path)}{_QUARANTINE}")


# ---- packing ---------------------------------------------------------------------------------------------------------


def _pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing: the longest sequence first, each into the fullest row that has room (Johnson, 1973).

    Returns (order, packs): row i holds the sequences order[packs[i] : packs[i + 1]].  Within a row, and by the first of each
    row, sequences are in the order of the files.  Capacity 0: one sequence per row.
    """
    if not capacity:
        return np.arange(len(lengths)), np.arange(len(lengths) + 1)
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens → rows
    free = 0  # bit i set: with_room[i] is not empty
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sequence])
        fits = free >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                free &= ~(1 << room)
            rows[row].append(sequence)
        else:
            room, row = capacity, len(rows)
            rows.append([sequence])
        left = room - length
        with_room.setdefault(left, []).append(row)
        free |= 1 << left
    rows = sorted(sorted(row) for row in rows)
    order = np.array([sequence for row in rows for sequence in row], np.int64)
    return order, np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)


# ---- the data set ----------------------------------------------------------------------------------------------------


class _Files:
    """The arrays of a data set, mapped.  All copies of a data set share this; a spool is removed with the last of them.

    folder  None for what came in a pickle: its files have no name, so that nothing can be left of them
    """

    def __init__(self, folder: Path | None, arrays: dict[str, np.ndarray], *, saved: bool):
        self.folder, self.arrays, self.saved = folder, arrays, saved

    @classmethod
    def at(cls, folder: Path, *, saved: bool = False, owned: bool = False) -> _Files:
        folder = folder.absolute()
        arrays: dict[str, np.ndarray] = {}
        for name, dtype in _ARRAYS.items():
            try:
                arrays[name] = np.memmap(folder / f"{name}.bin", dtype, "r")
            except FileNotFoundError as e:
                raise FileNotFoundError(
                    f"{e.filename} is gone, and with it the data set; prepare the data again, and keep it with save(folder)"
                ) from None
        files = cls(folder, arrays, saved=saved)
        if owned:
            weakref.finalize(files, _remove_in, os.getpid(), folder)
        return files

    @classmethod
    def of(cls, raw: Mapping[str, bytes]) -> _Files:
        arrays: dict[str, np.ndarray] = {}
        for name, dtype in _ARRAYS.items():
            with tempfile.TemporaryFile(prefix="unswag-data-") as f:
                f.write(raw[name])
                f.flush()
                arrays[name] = np.memmap(f, dtype, "r")
        return cls(None, arrays, saved=False)


class PackedDataset:
    """Rows of packed sequences, read from a memory map.

    data[i] is a dict of int64 arrays: input_ids, labels (-100 where there is nothing to learn, and at the first token of each
    sequence), position_ids (from 0 in each sequence) and seq_lengths.  data[a:b] is a list of rows.  `collator` makes batches
    of rows, and says what a model must do with them; `to_hf` makes a data set of Hugging Face.

    What `prepare_data` returns lies in the temporary folder until the last copy of it is let go, or the interpreter ends; what
    `load` returns stays where it is.  Copies share the files.  A pickle carries them (4 bytes per token; where it is opened
    they have no name), except to the worker processes of a DataLoader, which read the same files; a pickle of a loaded data
    set carries only the name of its folder.
    """

    def __init__(self, folder: Path, counts: Counts, max_length: int, pad: int, *, owned: bool = False):
        self.counts, self.max_length, self.pad = counts, max_length, pad
        self.collator = Collator(pad)
        self._files = _Files.at(folder, saved=not owned, owned=owned)

    @property
    def folder(self) -> Path | None:
        """Where the files are; None for what came in a pickle."""
        return self._files.folder

    def __copy__(self) -> PackedDataset:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedDataset:
        other = self.__copy__()
        memo[id(self)] = other
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "_files"})
        return other

    def __getstate__(self) -> dict[str, Any]:
        state, files = {name: value for name, value in vars(self).items() if name != "_files"}, self._files
        starting = multiprocessing.context.get_spawning_popen()
        if starting is not None and files.folder is not None:  # the process reads the same files, which are kept as long
            weakref.finalize(starting, id, files).atexit = False
            return state | {"_files": (files.folder, files.saved)}
        if files.saved:
            return state | {"_files": (files.folder, True)}
        return state | {"_files": {name: array.tobytes() for name, array in files.arrays.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = state["_files"]
        if isinstance(files, dict):
            state["_files"] = _Files.of(files)
        else:
            state["_files"] = _Files.at(files[0], saved=files[1])
        vars(self).update(state)

    def _array(self, name: str) -> np.ndarray:
        return self._files.arrays[name]

    def __len__(self) -> int:
        return len(self._array("packs")) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._row(i) for i in range(len(self))[index]]
        try:
            i = operator.index(index)
        except TypeError:
            raise TypeError(
                f"data[{index!r}]: an index is an int or a slice.  A field is data[i]['input_ids'], a choice of rows "
                "torch.utils.data.Subset(data, rows), a table of columns data.to_hf()"
            ) from None
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"data[{i}]: the data set has {n} rows")
        return self._row(i % n)

    def _row(self, i: int) -> dict[str, np.ndarray]:
        packs = self._array("packs")
        return self._joined(self._array("order")[packs[i] : packs[i + 1]])

    def _joined(self, sequences: np.ndarray) -> dict[str, np.ndarray]:
        starts = self._array("sequences")
        tokens = np.concatenate([self._array("tokens")[starts[s] : starts[s + 1]] for s in sequences])
        lengths = starts[sequences + 1] - starts[sequences]
        ids = (tokens & ~_TRAINED).astype(np.int64)
        return {
            "input_ids": ids,
            "labels": np.where(tokens >= _TRAINED, ids, IGNORE),
            "position_ids": np.concatenate([np.arange(n) for n in lengths]),
            "seq_lengths": np.asarray(lengths),
        }

    def to_hf(self, *, packed: bool = False) -> datasets.Dataset:
        """A `datasets.Dataset` with the columns input_ids, labels, position_ids and seq_lengths, in the cache of `datasets`.

        packed False: one sequence per row, in the order of the files.  Right with every trainer and collator: TRL pads the
        rows, or packs them itself (`packing=True`).
        packed True: the rows as they are here.  They need a collator that heeds seq_lengths or position_ids: `data.collator`,
        or that of TRL with `padding_free=True`.  TRL's default collator does not: the sequences of a row see each other.

        TRL cuts rows at its own `SFTConfig(max_length=1024)`; give it the max_length of the data, or None.
        """
        if not isinstance(packed, bool):
            raise TypeError(f"to_hf: packed={packed!r}; pass True or False")
        try:
            import datasets
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError("to_hf needs the module 'datasets': pip install datasets", name=e.name) from e
        digest = hashlib.sha256(b"unswag-data rows" if packed else b"unswag-data sequences")
        for name in _ARRAYS:
            digest.update(self._array(name).data)
        return datasets.Dataset.from_generator(
            _hf_rows,
            gen_kwargs={"data": self, "packed": packed},
            features=datasets.Features(
                dict.fromkeys(("input_ids", "labels", "position_ids", "seq_lengths"), datasets.List(datasets.Value("int64")))
            ),
            fingerprint=digest.hexdigest()[:16],
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, in the order of the files."""
        return np.diff(self._array("sequences"))

    def report(self) -> Report:
        return Report(self.counts, np.asarray(self.lengths), len(self), self.max_length)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the data set into a new folder, complete or not at all.  Raises FileExistsError if `folder` is there."""
        target = _path("save", "folder", folder)
        there = f"{target} is there already; save into a new folder, or remove it first"
        if target.exists():
            raise FileExistsError(there)
        with _writing(target.parent, "make room there, or save into another folder"):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.part-"))
            try:
                self._write(part)
                try:
                    os.rename(part, target)
                except OSError:
                    if target.exists():  # another process was faster
                        raise FileExistsError(there) from None
                    raise
                _folder_to_disk(target.parent)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise

    def _write(self, part: Path) -> None:
        """All files, the manifest last, on the disk by the end."""
        files = {}
        for name in _ARRAYS:
            digest, raw = hashlib.sha256(), self._array(name).view(np.uint8).data
            with open(part / f"{name}.bin", "wb") as out:
                for at in range(0, len(raw), 1 << 20):
                    digest.update(raw[at : at + (1 << 20)])
                    out.write(raw[at : at + (1 << 20)])
                _to_disk(out)
                files[f"{name}.bin"] = {"bytes": out.tell(), "sha256": digest.hexdigest()}
        manifest = {
            "format": "unswag-data", "version": VERSION, "max_length": self.max_length, "pad": self.pad,
            "counts": self.counts.plain(), "files": files,
        }  # fmt: skip
        with open(part / "manifest.json", "wb") as f:
            f.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
            _to_disk(f)
        _folder_to_disk(part)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PackedDataset:
        """Opens what `save` wrote.  Raises ValueError if a file is missing, cut short or changed, of another version, or if
        what they say does not fit together."""
        folder = _path("load", "folder", folder)

        def refused(what: str) -> ValueError:
            return ValueError(f"{folder} is not a saved data set: {what}; prepare the data again, and save it")

        try:
            manifest = orjson.loads((folder / "manifest.json").read_bytes())
        except (OSError, ValueError) as e:
            raise refused(f"manifest.json cannot be read ({e})") from None
        if not isinstance(manifest, dict):
            raise refused(f"manifest.json is {records.json_type(manifest)}, where an object was expected")
        if manifest.get("format") != "unswag-data" or manifest.get("version") != VERSION:
            raise ValueError(
                f"{folder}: format {manifest.get('format')!r} version {manifest.get('version')!r}, but this is unswag-data "
                f"version {VERSION}; prepare the data again"
            )
        counts, max_length, pad = _checked(manifest, refused)
        for name, dtype in _ARRAYS.items():
            about, path = manifest["files"][f"{name}.bin"], folder / f"{name}.bin"
            if not path.is_file():
                raise refused(f"{name}.bin is missing")
            size = path.stat().st_size
            if size != about["bytes"]:
                raise ValueError(f"{path} has {size} bytes, where the manifest has {about['bytes']}; prepare the data again")
            if not size or size % dtype.itemsize:
                raise refused(f"{name}.bin has {size} bytes, of {dtype.itemsize} for each value")
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != about["sha256"]:
                    raise ValueError(f"{path} has changed since it was saved (SHA-256); prepare the data again")
        data = cls(folder, counts, max_length, pad)
        for what, right in data._rules():
            if not right:
                raise refused(what)
        return data

    def _rules(self) -> Iterator[tuple[str, bool]]:
        """What must hold of the arrays; a rule may rely on those before it."""
        tokens, sequences, order, packs = map(self._array, _ARRAYS)
        n = len(sequences) - 1
        yield (
            "sequences.bin does not divide tokens.bin",
            bool(n > 0 and sequences[0] == 0 and sequences[-1] == len(tokens) and (sequences[1:] > sequences[:-1]).all()),
        )
        yield (
            "order.bin does not hold each sequence once",
            bool(len(order) == n and order.min() >= 0 and order.max() < n and (np.bincount(order, minlength=n) == 1).all()),
        )
        yield (
            "packs.bin does not divide order.bin",
            bool(len(packs) > 1 and packs[0] == 0 and packs[-1] == n and (packs[1:] > packs[:-1]).all()),
        )
        used = np.add.reduceat((sequences[1:] - sequences[:-1])[order], packs[:-1])
        yield f"a row has more than max_length={self.max_length} tokens", bool(used.max() <= self.max_length)
        c, blocks = self.counts, range(0, len(tokens), 1 << 20)
        trained = sum(int(np.count_nonzero(tokens[at : at + (1 << 20)] >= _TRAINED)) for at in blocks)
        yield "its counts are not those of its arrays", (c.kept, c.tokens, c.trained) == (n, len(tokens), trained)
        yield "its counts do not add up", c.read == c.kept + c.blank + sum(c.dropped.values())


def _hf_rows(data: PackedDataset, packed: bool) -> Iterator[dict[str, np.ndarray]]:
    return iter(data) if packed else (data._joined(np.array([i])) for i in range(len(data.lengths)))


def _checked(manifest: dict[str, Any], refused: Callable[[str], ValueError]) -> tuple[Counts, int, int]:
    """(counts, max_length, pad) of a manifest whose entries have the types that `save` writes."""

    def number(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    kinds: dict[str, Callable[[Any], bool]] = {
        "dropped": lambda v: isinstance(v, dict) and all(map(number, v.values())),
        "noted": lambda v: isinstance(v, dict) and all(map(number, v.values())),
        "where": lambda v: isinstance(v, dict) and all(map(texts, v.values())),
        "quarantine": lambda v: texts(v),
    }

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)

    files, counts = manifest.get("files"), manifest.get("counts")
    for name in _ARRAYS:
        about = files.get(f"{name}.bin") if isinstance(files, dict) else None
        if not isinstance(about, dict) or not number(about.get("bytes")) or not isinstance(about.get("sha256"), str):
            raise refused(f"its manifest does not say of {name}.bin how many bytes it has, and with which SHA-256")
    for name in ("max_length", "pad"):
        if not number(manifest.get(name)):
            raise refused(f"its manifest says {name} {manifest.get(name)!r}, where a number was expected")
    known = vars(Counts())
    if not isinstance(counts, dict) or not counts.keys() <= known.keys():
        raise refused("its manifest has no counts, or counts that are not known")
    for name, value in counts.items():
        if not kinds.get(name, number)(value):
            raise refused(f"its manifest says {name} {_shown(value)}")
    counters: dict[str, Counter[str]] = {name: Counter(counts.get(name, {})) for name in ("dropped", "noted")}
    return Counts(**{**counts, **counters}), manifest["max_length"], manifest["pad"]


@contextlib.contextmanager
def _writing(folder: Path, remedy: str) -> Iterator[None]:
    """An OSError of what writes in `folder` says where, and what to do about it."""
    try:
        yield
    except OSError as e:
        elsewhere = e.filename is not None and not Path(os.fsdecode(e.filename)).is_relative_to(folder)
        if e.errno is None or elsewhere or isinstance(e.__cause__, OSError):  # or it was said already
            raise
        raise OSError(e.errno, f"{os.strerror(e.errno)}, while writing in {folder}; {remedy}") from e


def _remove_in(process: int, folder: Path) -> None:
    if os.getpid() == process:  # not when a forked worker ends
        shutil.rmtree(folder, ignore_errors=True)


def _to_disk(f: IO[bytes]) -> None:
    f.flush()
    os.fsync(f.fileno())


def _folder_to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Collator:
    """Rows → a batch of torch tensors [rows, longest]: input_ids, labels, position_ids, all int64.

    There is no attention mask: position ids that start again at 0 tell where a sequence begins, and padding at the end of a
    row is a sequence of its own without labels.  Position ids are taken from the rows, else made from their seq_lengths.

    A stock model of transformers separates the sequences only without a cache and without an attention mask: in a loop of your
    own call model(**batch, use_cache=False), in training and evaluation alike, or set model.config.use_cache = False (the
    Trainer does, TRL's trainers too).  With the default, use_cache=True, the sequences of a row see each other and the loss is
    that of another model.  The flash_attention implementations separate them in batches of one row only.  docs/data.md lists
    the models that have no position ids, or no attention to separate.
    """

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        try:
            import torch
        except ModuleNotFoundError as e:
            unswag._missing("the collator", e, "torch")

        if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Mapping) for row in rows):
            raise TypeError(f"collator: rows is {_shown(rows)}; pass a list of rows, such as [data[0], data[1]] or data[:2]")
        positions = [_positions(i, row) for i, row in enumerate(rows)]
        length = max(map(len, positions))
        batch = {
            name: np.full((len(rows), length), fill, np.int64) for name, fill in (("input_ids", self.pad), ("labels", IGNORE))
        }
        batch["position_ids"] = np.empty((len(rows), length), np.int64)
        for i, (row, places) in enumerate(zip(rows, positions, strict=True)):
            n = len(places)
            for name in ("input_ids", "labels"):
                batch[name][i, :n] = row[name]
            batch["position_ids"][i, :n] = places
            batch["position_ids"][i, n:] = np.arange(length - n)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def _positions(i: int, row: Mapping[str, Any]) -> np.ndarray:
    """Position ids of a row, or an error if a column is missing or cut to another length."""
    missing = [name for name in ("input_ids", "labels") if name not in row]
    if missing or not ("position_ids" in row or "seq_lengths" in row):
        raise ValueError(
            f"collator: row {i} has {sorted(row)}, and needs input_ids, labels and position_ids or seq_lengths, without which "
            "its sequences would see each other; keep these columns (remove_unused_columns=False)"
        )
    places = row["position_ids"] if "position_ids" in row else np.concatenate([np.arange(n) for n in row["seq_lengths"]])
    if not len(places) == len(row["input_ids"]) == len(row["labels"]):
        raise ValueError(
            f"collator: row {i} has {len(row['input_ids'])} tokens, {len(row['labels'])} labels and {len(places)} positions; "
            "was it cut?  TRL cuts rows at SFTConfig(max_length=1024): pass max_length=None"
        )
    return np.asarray(places)


# ---- what is shown ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Counts and lengths; printed as a table with a histogram, `plot` as a picture."""

    counts: Counts
    lengths: np.ndarray
    rows: int
    max_length: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        c = self.counts
        table = Table(title="UnSwag data", show_header=False)
        table.add_column(justify="right")
        table.add_column()
        table.add_row(f"{c.read:,}", "lines read")
        table.add_row(f"{c.kept:,}", "kept")
        for heading, counter in (("dropped", c.dropped), ("noted", c.noted)):
            for what, n in sorted(counter.items()):
                table.add_row(f"{n:,}", Text(f"{heading}: {what}", overflow="fold"))
        for n, what in (
            (c.blank, "blank"),
            (c.truncated, f"cut to {self.max_length} tokens"),
            (c.merged, "with a token that spans the end of the prompt"),
        ):
            if n:
                table.add_row(f"{n:,}", what)
        table.add_row(f"{c.tokens:,}", f"tokens, {c.trained / c.tokens:.0%} of them with a label")
        full = c.tokens / (self.rows * self.max_length)
        table.add_row(f"{self.rows:,}", f"rows of at most {self.max_length} tokens, {full:.1%} full")
        yield table
        for heading, counter in (("dropped", c.dropped), ("noted", c.noted)):
            for what in sorted(counter):
                yield Text(f"{heading}: {what}")
                for place in c.where.get(what, []):
                    yield Text(f"  {place}")
                if counter[what] > len(c.where.get(what, [])) > 0:
                    yield Text(f"  and {counter[what] - len(c.where[what]):,} more")
        for path in c.quarantine:
            yield Text(f"bad lines were written to {path}")
        yield from self._histogram()

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=120).print(self, soft_wrap=True)
        return out.getvalue()

    def _histogram(self) -> Iterator[str]:
        numbers, edges = self._bins()
        yield (
            "tokens per sequence (" + ", ".join(f"{p}%: {np.percentile(self.lengths, p):.0f}" for p in (50, 90, 99, 100)) + ")"
        )
        for n, low, high in zip(numbers, edges[:-1], edges[1:], strict=True):
            bar = "█" * round(50 * n / numbers.max()) or ("▏" if n else "")
            yield f"{low:>7} – {high - 1:<7} {bar} {n:,}"

    def _bins(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = int(self.lengths.min()), int(self.lengths.max()) + 1
        edges = np.unique(np.linspace(low, high, min(13, high - low + 1)).astype(int))
        numbers, _ = np.histogram(self.lengths, edges)
        return numbers, edges

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Saves the histogram of the lengths as PNG."""
        target = _path("plot", "path", path)
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as e:
            unswag._missing("plot", e, "torch")

        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.hist(self.lengths, bins=min(60, max(1, int(np.ptp(self.lengths)) + 1)), color="#3b6ea5")
        axes.axvline(self.max_length, color="#b03030", linestyle="--", label=f"max_length {self.max_length}")
        axes.set(
            xlabel="tokens per sequence", ylabel="sequences", title=f"{self.counts.kept:,} sequences in {self.rows:,} rows"
        )
        axes.legend()
        figure.savefig(target, format="png", dpi=150)


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere; nothing for what is done within two seconds."""

    def __init__(self, what: str, total: int, shown: bool):
        self.what, self.total, self.shown = what, total, shown
        self.done, self.begin = 0, time.monotonic()
        self.next_line = self.begin + 2
        self.bar: Progress | None = None

    def __enter__(self) -> _Progress:
        return self

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if not self.shown or now < self.begin + 2:
            return
        if sys.stderr.isatty():
            if self.bar is None:
                columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
                self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
                self.bar.add_task(self.what, total=self.total)
                self.bar.start()
            self.bar.update(self.bar.task_ids[0], completed=self.done)
        elif now >= self.next_line:
            self.next_line = now + 10
            print(f"{self.what}: {self.done / max(1, self.total):.0%}", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()
