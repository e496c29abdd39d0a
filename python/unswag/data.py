"""Instruction data: from .jsonl to packed token rows that a trainer takes.

    data = unswag.prepare_data("train.jsonl", tokenizer, max_length=2048)
    Trainer(model, args, train_dataset=data, data_collator=data.collator)

A line is one of (found out from the first line of each file)
    {"instruction": …, "input": …, "output": …}     input may be missing
    {"messages": [{"role": …, "content": …}, …]}    the last one from the assistant
    {"prompt": …, "completion": …}                  texts, or lists of messages
What the model is to write has labels; everything else is masked with -100.  Sequences are packed best fit decreasing into rows
of at most `max_length` tokens; position ids start at 0 with each sequence, so attention stays inside it.

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
import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

IGNORE = -100
VERSION = 1
MAX_LINE_BYTES = 64 << 20
BATCH_ROWS = 256
BATCH_BYTES = 8 << 20

_TRAINED = np.uint32(1 << 31)
_ARRAYS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<u4"),
    "sequences": np.dtype("<i8"),
    "order": np.dtype("<i8"),
    "packs": np.dtype("<i8"),
}
_FORMS = {"messages": ("messages",), "completion": ("prompt", "completion"), "instruction": ("instruction", "output")}

# The two prompts of Stanford Alpaca (Taori et al., 2023).
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class DataError(ValueError):
    """A line that cannot be used.  `path`, `line` and `column` (both from 1) and `reason` say where and why."""

    def __init__(self, path: Path, line: int, column: int, kind: str, reason: str):
        super().__init__(
            f'{path}:{line}:{column}: {reason}; correct the line, or pass on_error="skip" or "quarantine" to go on without it'
        )
        self.path, self.line, self.column, self.kind, self.reason = path, line, column, kind, reason


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


def prepare_data(
    path_or_paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
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
            of Stanford Alpaca, "auto" takes the chat template if there is one.  Texts of prompt / completion are taken as they
            are.
        columns: our field → the name that it has in the files, such as {"output": "answer"}.
        packing: False gives each sequence a row of its own.
        too_long: what happens to sequences of more than `max_length` tokens: "drop", or "truncate" at the end.
        on_error: "raise" stops at the first bad line; "skip" leaves it out and counts it; "quarantine" also writes it, with the
            reason, to `<file>.quarantine.jsonl` beside the file.
        verbose: prints the report, and the progress of anything that takes more than two seconds.

    Raises DataError (a ValueError) for a bad line, ValueError for anything else that cannot be used: a missing, empty or
    directory path, an array instead of lines, arguments, no usable line at all.
    """
    for name, value, allowed in (
        ("template", template, ("auto", "chat", "alpaca")),
        ("too_long", too_long, ("drop", "truncate")),
        ("on_error", on_error, ("raise", "skip", "quarantine")),
    ):
        if value not in allowed:
            raise ValueError(f"prepare_data: {name}={value!r}; choose {', '.join(map(repr, allowed))}")
    if max_length < 2:
        raise ValueError(f"prepare_data: max_length={max_length}; a row needs 2 tokens at least, one to predict another")
    unknown = set(columns or {}) - {"instruction", "input", "output", "messages", "prompt", "completion"}
    if unknown:
        raise ValueError(f"prepare_data: columns names {sorted(unknown)}, which is no field of ours")
    paths = [Path(path_or_paths)] if isinstance(path_or_paths, (str, os.PathLike)) else [Path(p) for p in path_or_paths]
    if not paths:
        raise ValueError("prepare_data: no files given")
    sizes = [_check_file(path) for path in paths]

    encoder = _Encoder(tokenizer, template)
    counts = Counts()
    folder = Path(tempfile.mkdtemp(prefix="unswag-data-"))
    try:
        with _Progress("preparing", sum(sizes), verbose) as progress, open(folder / "tokens.bin", "wb") as out:
            lengths = array("q")
            for path in paths:
                with _Rejected(path, on_error) as rejected:
                    for whole, merged in _sequences(path, encoder, columns or {}, counts, rejected, progress):
                        ids = _fit(whole, max_length, too_long, counts)
                        if ids is not None:
                            out.write(ids.tobytes())
                            lengths.append(len(ids))
                            counts.kept += 1
                            counts.merged += merged
                            counts.tokens += len(ids)
                            counts.trained += int((ids >= _TRAINED).sum())
                    rejected.keep = True
        if counts.read != counts.kept + counts.blank + sum(counts.dropped.values()):
            raise AssertionError(f"prepare_data lost count of its lines: {counts}")
        if not counts.kept:
            raise ValueError(
                f"prepare_data: no usable line in {', '.join(map(str, paths))} ({counts.read} read; dropped: "
                f"{dict(counts.dropped) or 'none'}); a larger max_length keeps longer sequences"
            )
        if os.path.getsize(folder / "tokens.bin") != 4 * counts.tokens:
            raise OSError(f"the token file in {folder} is shorter than what was written to it; is the disk full?")
        order, packs = _pack(np.asarray(lengths), max_length if packing else 0)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        for name, values in (("sequences", starts), ("order", order), ("packs", packs)):
            values.astype(_ARRAYS[name]).tofile(folder / f"{name}.bin")
        data = PackedDataset(folder, counts, max_length, encoder.pad, owned=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if verbose:
        Console(stderr=True).print(data.report())
    return data


# ---- lines ----------------------------------------------------------------------------------------------------------------


def _check_file(path: Path) -> int:
    """Size in bytes of a file that can be read, or ValueError."""
    try:
        about = path.stat()
    except OSError as e:
        raise ValueError(f"prepare_data: {path} cannot be read: {e.strerror}") from None
    if stat.S_ISDIR(about.st_mode):
        raise ValueError(
            f"prepare_data: {path} is a directory; pass the files in it, such as sorted(Path({str(path)!r}).glob('*.jsonl'))"
        )
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"prepare_data: {path} is not a regular file; write the lines to a file first")
    if not about.st_size:
        raise ValueError(f"prepare_data: {path} is empty (0 bytes)")
    with open(path, "rb") as f:
        start = f.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"prepare_data: {path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    return about.st_size


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


class _Bad(Exception):
    """A line that cannot be used, before it is known which one it is."""

    def __init__(self, kind: str, reason: str, column: int = 1):
        self.kind, self.reason, self.column = kind, reason, column


def _record(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise _Bad("line too long", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        text = line.decode()
    except UnicodeDecodeError as e:
        column = len(line[: e.start].decode()) + 1
        raise _Bad("invalid UTF-8", f"byte {line[e.start]:#04x} is not UTF-8 ({e.reason})", column) from None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as e:
        raise _Bad("invalid JSON", f"not JSON: {e.msg}", _column(text, e)) from None
    if isinstance(record, list):
        raise _Bad("not an object", "an array; each line must be an object of its own, such as jq -c '.[]' makes of an array")
    if not isinstance(record, dict):
        raise _Bad("not an object", f"{type(record).__name__}, where an object was expected")
    return record


def _column(text: str, error: json.JSONDecodeError) -> int:
    return min(max(error.pos, 0), len(text)) + 1


def _check_keys(line: bytes, record: dict[str, Any], messages: int) -> None:
    """JSON parsers keep the last of equal keys in silence.  Looked for only where a key occurs too often in the bytes."""
    often = {key: 1 for key in record} | ({"role": messages, "content": messages} if messages else {})
    if all(line.count(orjson.dumps(key)) <= n for key, n in often.items()):
        return

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = Counter(key for key, _ in pairs)
        key, n = keys.most_common(1)[0] if keys else ("", 0)
        if n > 1:
            at = line.decode().rfind(json.dumps(key, ensure_ascii=False))
            raise _Bad("duplicate key", f"the key {key!r} is there {n} times", max(at, 0) + 1)
        return dict(pairs)

    with contextlib.suppress(RecursionError):
        json.loads(line, object_pairs_hook=unique)


# ---- from a record to text -------------------------------------------------------------------------------------------


@dataclass
class _Text:
    """Pieces of text, every other one trained: prompt, answer, prompt, answer …"""

    pieces: list[str]
    bos: bool  # as plain texts start; a chat template writes its own


def _text(record: dict[str, Any], form: str, columns: Mapping[str, str], encoder: _Encoder) -> _Text:
    def get(name: str, *types: type) -> Any:
        column = columns.get(name, name)
        if column not in record:
            raise _Bad("missing field", f"the field {column!r} is missing; there are {sorted(record)}")
        value = record[column]
        if not isinstance(value, types):
            names = " or ".join("text" if t is str else "a list" for t in types)
            raise _Bad("wrong type", f"the field {column!r} is {_json_type(value)}, where {names} was expected")
        return value

    def answer(name: str, value: str) -> str:
        if not value.strip():
            raise _Bad("empty output", f"the field {columns.get(name, name)!r} is empty: there is nothing to learn")
        return value

    if form == "messages":
        return encoder.chat(_messages(get("messages", list)))
    if form == "completion":
        prompt, completion = get("prompt", str, list), get("completion", str, list)
        if isinstance(prompt, list) != isinstance(completion, list):
            raise _Bad("wrong type", "prompt and completion must both be texts, or both lists of messages")
        if isinstance(prompt, list):
            return encoder.chat(_messages(prompt + completion))
        return _Text([prompt, answer("completion", completion)], bos=True)
    instruction, output = get("instruction", str), answer("output", get("output", str))
    column = columns.get("input", "input")
    extra = record.get(column)
    if extra is not None and not isinstance(extra, str):
        raise _Bad("wrong type", f"the field {column!r} is {_json_type(extra)}, where text was expected")
    if not instruction.strip() and not (extra or "").strip():
        raise _Bad("empty instruction", "both instruction and input are empty")
    return encoder.instruction(instruction, extra or "", output)


def _messages(messages: list[Any]) -> list[dict[str, Any]]:
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _Bad("wrong type", f"message {i} is {_json_type(message)}, where an object was expected")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                what = _json_type(message[key]) if key in message else "missing"
                raise _Bad("wrong type", f"{key!r} of message {i} is {what}, where text was expected")
    if not messages or messages[-1]["role"] != "assistant":
        raise _Bad("no answer", "the last message is not from the assistant: there is nothing to learn")
    if not messages[-1]["content"].strip():
        raise _Bad("empty output", "the last message is empty: there is nothing to learn")
    return messages


def _json_type(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


class _Encoder:
    """Text → token ids, with the trained ones marked."""

    def __init__(self, tokenizer: Any, template: str):
        self.tokenizer = tokenizer
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

    def instruction(self, instruction: str, extra: str, output: str) -> _Text:
        if self.use_chat:
            asked = f"{instruction}\n\n{extra}" if extra else instruction
            return self.chat([{"role": "user", "content": asked}, {"role": "assistant", "content": output}])
        form = _ALPACA_INPUT if extra else _ALPACA
        return _Text([form.format(instruction=instruction, input=extra), output], bos=True)

    def chat(self, messages: list[dict[str, Any]]) -> _Text:
        if not self.has_template:
            raise ValueError(
                "prepare_data: messages need a chat template, and the tokenizer has none; set tokenizer.chat_template"
            )
        whole, pieces, done = self._render(messages), [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:i], add_generation_prompt=True)
            told = whole if i == len(messages) - 1 else self._render(messages[: i + 1])
            if len(asked) < done or not (told.startswith(asked) and whole.startswith(told)):
                raise _Bad(
                    "chat template",
                    f"the chat template writes message {i} otherwise when others follow, so what the model is to write cannot "
                    "be told from the prompt; give each answer a line of its own",
                )
            pieces += [told[done : len(asked)], told[len(asked) :]]
            done = len(told)
        return _Text(pieces, bos=False)

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        import jinja2

        if not messages:
            return ""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except jinja2.TemplateError as e:
            raise _Bad("chat template", f"the chat template refuses it: {e}") from None

    def encode(self, texts: Sequence[_Text]) -> list[tuple[np.ndarray, bool]]:
        """(ids with bit 31 on the trained ones, whether a token spans the end of a prompt) of each text."""
        if not texts:
            return []
        wholes = ["".join(text.pieces) for text in texts]
        prefixes = ["".join(text.pieces[: i + 1]) for text in texts for i in range(len(text.pieces) - 1)]
        ids = iter(self._ids(wholes + prefixes))
        whole_ids = [next(ids) for _ in wholes]
        return [
            self._marked(text, whole, [next(ids) for _ in text.pieces[1:]])
            for text, whole in zip(texts, whole_ids, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _marked(self, text: _Text, ids: list[int], prefixes: list[list[int]]) -> tuple[np.ndarray, bool]:
        merged = False
        borders = []
        for prefix in prefixes:
            same = next((i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), min(len(prefix), len(ids)))
            merged |= same != len(prefix)  # the tokenizer joined characters of both sides of the border
            borders.append(same)
        trained = np.zeros(len(ids) + 1, bool)
        for begin, end in zip(borders[::2], [*borders[1::2], len(ids)], strict=True):
            trained[begin:end] = True
        # A chat template ends the answer with EOS and perhaps a line break, which nobody generates.
        last = len(ids)
        if not text.bos and self.eos in ids[-2:]:
            last = len(ids) - ids[::-1].index(self.eos)
            ids = ids[:last]
        else:
            ids = [*ids, self.eos]
            last = len(ids)
            trained[last - 1] = True
        out = np.array([*(self.bos if text.bos else []), *ids], np.uint32)
        marks = np.concatenate([np.zeros(len(out) - last, bool), trained[:last]])
        marks[0] = False  # nothing comes before it: in a row it would be predicted from another sequence
        return out | marks * _TRAINED, merged


def _sequences(
    path: Path, encoder: _Encoder, columns: Mapping[str, str], counts: Counts, rejected: _Rejected, progress: _Progress
) -> Iterator[tuple[np.ndarray, bool]]:
    """(marked ids, whether a token spans the end of a prompt) of each usable line, in order."""
    form = None
    waiting: list[_Text] = []
    size = 0
    for number, line in _lines(path, progress):
        counts.read += 1
        if not line.strip(b" \t\r"):
            counts.blank += 1
            continue
        try:
            record = _record(line)
            found = _form(record, columns)
            form = form or found
            if form is None:
                raise _Bad(
                    "missing field",
                    f"neither messages, nor prompt and completion, nor instruction and output, but {sorted(record)}",
                )
            messages = record.get(columns.get("messages", "messages")) if form == "messages" else None
            _check_keys(line, record, len(messages) if isinstance(messages, list) else 0)
            waiting.append(_text(record, form, columns, encoder))
        except _Bad as bad:
            counts.dropped[bad.kind] += 1
            rejected.add(number, line, bad)
            continue
        size += len(line)
        if len(waiting) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield from encoder.encode(waiting)
            waiting, size = [], 0
    yield from encoder.encode(waiting)


def _form(record: dict[str, Any], columns: Mapping[str, str]) -> str | None:
    return next((form for form, fields in _FORMS.items() if all(columns.get(f, f) in record for f in fields)), None)


def _fit(ids: np.ndarray, max_length: int, too_long: str, counts: Counts) -> np.ndarray | None:
    if len(ids) > max_length:
        if too_long == "drop":
            counts.dropped["too long"] += 1
            return None
        ids = ids[:max_length]
        if not (ids >= _TRAINED).any():
            counts.dropped["prompt too long"] += 1
            return None
        counts.truncated += 1
    return ids


class _Rejected:
    """Bad lines of one file: raised, left out, or written beside it (complete or not at all)."""

    def __init__(self, path: Path, on_error: str):
        self.path, self.on_error, self.keep = path, on_error, False
        self.file: IO[bytes] | None = None

    def __enter__(self) -> _Rejected:
        return self

    def add(self, number: int, line: bytes, bad: _Bad) -> None:
        if self.on_error == "raise":
            raise DataError(self.path, number, bad.column, bad.kind, bad.reason) from None
        if self.on_error == "quarantine":
            if self.file is None:
                handle, self.name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
                self.file = os.fdopen(handle, "wb")
            entry = {"line": number, "column": bad.column, "reason": bad.reason, "text": line.decode(errors="backslashreplace")}
            self.file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def __exit__(self, *exception: object) -> None:
        if self.file is None:
            return
        with self.file as f:
            _to_disk(f)
        if self.keep:
            os.replace(self.name, quarantine_path(self.path))
        else:
            os.unlink(self.name)


def quarantine_path(path: str | os.PathLike[str]) -> Path:
    """Where `on_error="quarantine"` writes the bad lines of `path`."""
    return Path(f"{os.fspath(path)}.quarantine.jsonl")


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


class PackedDataset:
    """Rows of packed sequences, read from a memory map.

    data[i] is a dict of int64 arrays: input_ids, labels (-100 where there is nothing to learn, and at the first token of each
    sequence), position_ids (from 0 in each sequence) and seq_lengths.  `collator` makes batches of such rows.
    """

    def __init__(self, folder: Path, counts: Counts, max_length: int, pad: int, *, owned: bool = False):
        self.folder, self.counts, self.max_length, self.pad = folder, counts, max_length, pad
        self.collator = Collator(pad)
        self._arrays: dict[str, np.ndarray] = {}
        if owned:  # a spool: gone with this object
            weakref.finalize(self, _remove_in, os.getpid(), folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_arrays": {}}  # a worker opens the files itself

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = np.memmap(self.folder / f"{name}.bin", _ARRAYS[name], "r")
        return self._arrays[name]

    def __len__(self) -> int:
        return len(self._array("packs")) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = range(len(self))[index]
        packs, starts = self._array("packs"), self._array("sequences")
        sequences = self._array("order")[packs[index] : packs[index + 1]]
        tokens = np.concatenate([self._array("tokens")[starts[s] : starts[s + 1]] for s in sequences])
        lengths = starts[sequences + 1] - starts[sequences]
        ids = (tokens & ~_TRAINED).astype(np.int64)
        return {
            "input_ids": ids,
            "labels": np.where(tokens >= _TRAINED, ids, IGNORE),
            "position_ids": np.concatenate([np.arange(n) for n in lengths]),
            "seq_lengths": np.asarray(lengths),
        }

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, in the order of the files."""
        return np.diff(self._array("sequences"))

    def report(self) -> Report:
        return Report(self.counts, np.asarray(self.lengths), len(self), self.max_length)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the data set into a new folder, complete or not at all.  Raises FileExistsError if `folder` is there."""
        target = Path(folder)
        if target.exists():
            raise FileExistsError(f"{target} is there already; save into a new folder, or remove it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.part-"))
        try:
            files = {}
            for name in _ARRAYS:
                digest = hashlib.sha256()
                with open(self.folder / f"{name}.bin", "rb") as source, open(part / f"{name}.bin", "wb") as copy:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        copy.write(block)
                    _to_disk(copy)
                    files[f"{name}.bin"] = {"bytes": copy.tell(), "sha256": digest.hexdigest()}
            manifest = {
                "format": "unswag-data", "version": VERSION, "max_length": self.max_length, "pad": self.pad,
                "counts": vars(self.counts) | {"dropped": dict(self.counts.dropped)}, "files": files,
            }  # fmt: skip
            with open(part / "manifest.json", "wb") as f:
                f.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
                _to_disk(f)
            _folder_to_disk(part)
            os.rename(part, target)
            _folder_to_disk(target.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PackedDataset:
        """Opens what `save` wrote.  Raises ValueError if a file is missing, cut short or changed, or of another version."""
        folder = Path(folder)
        try:
            manifest = orjson.loads((folder / "manifest.json").read_bytes())
        except (OSError, ValueError) as e:
            raise ValueError(f"{folder} is not a saved data set: manifest.json cannot be read ({e}); save it again") from None
        if manifest.get("format") != "unswag-data" or manifest.get("version") != VERSION:
            raise ValueError(
                f"{folder}: format {manifest.get('format')!r} version {manifest.get('version')!r}, but this is unswag-data "
                f"version {VERSION}; prepare the data again"
            )
        for name in _ARRAYS:
            about, path = manifest["files"][f"{name}.bin"], folder / f"{name}.bin"
            size = path.stat().st_size if path.is_file() else None
            if size != about["bytes"]:
                raise ValueError(f"{path} has {size} bytes, where the manifest has {about['bytes']}; prepare the data again")
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != about["sha256"]:
                    raise ValueError(f"{path} has changed since it was saved (SHA-256); prepare the data again")
        counts = manifest["counts"]
        return cls(folder, Counts(**counts | {"dropped": Counter(counts["dropped"])}), manifest["max_length"], manifest["pad"])


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
    """Rows → a batch of torch tensors [rows, longest]: input_ids, labels, position_ids.

    There is no attention mask: position ids that start again at 0 tell where a sequence begins, and padding at the end of a
    row is a sequence of its own without labels.
    """

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: np.full((len(rows), length), fill, np.int64) for name, fill in (("input_ids", self.pad), ("labels", IGNORE))
        }
        batch["position_ids"] = np.empty((len(rows), length), np.int64)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            for name, out in batch.items():
                out[i, :n] = row[name]
            batch["position_ids"][i, n:] = np.arange(length - n)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


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
        lines = [(c.read, "lines read"), (c.kept, "kept")]
        lines += [(n, f"dropped: {reason}") for reason, n in sorted(c.dropped.items())]
        lines += [
            (c.blank, "blank"),
            (c.truncated, f"cut to {self.max_length} tokens"),
            (c.merged, "with a token that spans the end of the prompt"),
        ]
        for n, what in lines:
            if n or what in ("lines read", "kept"):
                table.add_row(f"{n:,}", what)
        table.add_row(f"{c.tokens:,}", f"tokens, {c.trained / c.tokens:.0%} of them with a label")
        full = c.tokens / (self.rows * self.max_length)
        table.add_row(f"{self.rows:,}", f"rows of at most {self.max_length} tokens, {full:.1%} full")
        yield table
        yield from self._histogram()

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
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.hist(self.lengths, bins=min(60, max(1, int(np.ptp(self.lengths)) + 1)), color="#3b6ea5")
        axes.axvline(self.max_length, color="#b03030", linestyle="--", label=f"max_length {self.max_length}")
        axes.set(
            xlabel="tokens per sequence", ylabel="sequences", title=f"{self.counts.kept:,} sequences in {self.rows:,} rows"
        )
        axes.legend()
        figure.savefig(path, format="png", dpi=150)


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
