"""Rows of packed sequences, and the collator that makes batches of them."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import operator
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from unswag.data import records
from unswag.data.arguments import path_of, shown
from unswag.data.disk import ARRAYS, TRAINED, VERSION, Files, folder_to_disk, to_disk, writing
from unswag.data.report import Counts, Report
from unswag.extras import missing

if TYPE_CHECKING:
    import datasets

IGNORE = -100


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit decreasing: the longest sequence first, each into the fullest row that has room (Johnson, 1973).

    Returns (order, packs): row i holds the sequences order[packs[i] : packs[i + 1]]. The sequences of a row are in the order of
    the files, and so are the rows, by their first sequences. Capacity 0: one sequence per row.
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


class PackedDataset:
    """Rows of packed sequences, read from a memory map.

    data[i] is a dict of int64 arrays: input_ids, labels (-100 for tokens that are not trained, and for the first token of each
    sequence), position_ids (from 0 in each sequence) and seq_lengths. data[a:b] is a list of rows. `collator` makes batches of
    rows, and its documentation says what the model must do with them; `to_hf` makes a Hugging Face data set.

    The files of `prepare_data` are in the temporary folder, and are removed with the last copy of the data set or when the
    interpreter ends; those of `load` stay where they are. Copies share the files. A pickle contains the data (4 bytes per
    token) and is loaded into temporary files without a name; the worker processes of a DataLoader read the original files
    instead. A pickle of a loaded data set contains only the name of its folder.
    """

    def __init__(self, folder: Path, counts: Counts, max_length: int, pad: int, *, owned: bool = False):
        self.counts, self.max_length, self.pad = counts, max_length, pad
        self.collator = Collator(pad)
        self._files = Files.at(folder, saved=not owned, owned=owned)

    @property
    def folder(self) -> Path | None:
        """Where the files are; None if the data came out of a pickle."""
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
        if starting is not None and files.folder is not None:  # the child reads the same files; keep them while it runs
            weakref.finalize(starting, id, files).atexit = False
            return state | {"_files": (files.folder, files.saved)}
        if files.saved:
            return state | {"_files": (files.folder, True)}
        return state | {"_files": {name: array.tobytes() for name, array in files.arrays.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = state["_files"]
        if isinstance(files, dict):
            state["_files"] = Files.of(files)
        else:
            state["_files"] = Files.at(files[0], saved=files[1])
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
                f"data[{index!r}]: use an int or a slice. For a field use data[i]['input_ids'], for selected rows "
                "torch.utils.data.Subset(data, rows), for columns data.to_hf()"
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
        ids = (tokens & ~TRAINED).astype(np.int64)
        return {
            "input_ids": ids,
            "labels": np.where(tokens >= TRAINED, ids, IGNORE),
            "position_ids": np.concatenate([np.arange(n) for n in lengths]),
            "seq_lengths": np.asarray(lengths),
        }

    def to_hf(self, *, packed: bool = False) -> datasets.Dataset:
        """A `datasets.Dataset` with the columns input_ids, labels, position_ids and seq_lengths, written to the cache of
        `datasets`.

        packed=False: one sequence per row, in the order of the files. Works with every trainer and collator: TRL pads the rows,
        or packs them itself (`packing=True`).
        packed=True: the packed rows. They need a collator that uses seq_lengths or position_ids: `data.collator`, or TRL's
        with `padding_free=True`. The default collator of TRL does not, so the sequences of a row would see each other.

        TRL cuts rows at its own `SFTConfig(max_length=1024)`; give it the max_length of the data, or None.
        """
        if not isinstance(packed, bool):
            raise TypeError(f"to_hf: packed={packed!r}; pass True or False")
        try:
            import datasets
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError("to_hf needs the module 'datasets': pip install datasets", name=e.name) from e
        digest = hashlib.sha256(b"unswag-data rows" if packed else b"unswag-data sequences")
        for name in ARRAYS:
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
        """Writes the data set into a new folder, completely or not at all. Raises FileExistsError if `folder` exists."""
        target = path_of("save", "folder", folder)
        there = f"{target} already exists; save into a new folder, or remove it first"
        if target.exists():
            raise FileExistsError(there)
        with writing(target.parent, "free some space there, or save into another folder"):
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
                folder_to_disk(target.parent)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise

    def _write(self, part: Path) -> None:
        """Writes all files, the manifest last, and flushes them to disk."""
        files = {}
        for name in ARRAYS:
            digest, raw = hashlib.sha256(), self._array(name).view(np.uint8).data
            with open(part / f"{name}.bin", "wb") as out:
                for at in range(0, len(raw), 1 << 20):
                    digest.update(raw[at : at + (1 << 20)])
                    out.write(raw[at : at + (1 << 20)])
                to_disk(out)
                files[f"{name}.bin"] = {"bytes": out.tell(), "sha256": digest.hexdigest()}
        manifest = {
            "format": "unswag-data", "version": VERSION, "max_length": self.max_length, "pad": self.pad,
            "counts": self.counts.plain(), "files": files,
        }  # fmt: skip
        with open(part / "manifest.json", "wb") as f:
            f.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
            to_disk(f)
        folder_to_disk(part)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PackedDataset:
        """Opens a folder that `save` wrote. Raises ValueError if a file is missing, truncated, changed or of another version,
        or if the files contradict each other."""
        folder = path_of("load", "folder", folder)

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
        for name, dtype in ARRAYS.items():
            about, path = manifest["files"][f"{name}.bin"], folder / f"{name}.bin"
            if not path.is_file():
                raise refused(f"{name}.bin is missing")
            size = path.stat().st_size
            if size != about["bytes"]:
                raise ValueError(f"{path} has {size} bytes, but the manifest says {about['bytes']}; prepare the data again")
            if not size or size % dtype.itemsize:
                raise refused(f"{name}.bin has {size} bytes, not a multiple of {dtype.itemsize} above 0")
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != about["sha256"]:
                    raise ValueError(f"{path} has changed since it was saved (SHA-256); prepare the data again")
        data = cls(folder, counts, max_length, pad)
        for what, right in data._rules():
            if not right:
                raise refused(what)
        return data

    def _rules(self) -> Iterator[tuple[str, bool]]:
        """The invariants of the arrays, as (error, whether it holds). A rule may rely on those before it."""
        tokens, sequences, order, packs = map(self._array, ARRAYS)
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
        trained = sum(int(np.count_nonzero(tokens[at : at + (1 << 20)] >= TRAINED)) for at in blocks)
        yield "its counts do not match its arrays", (c.kept, c.tokens, c.trained) == (n, len(tokens), trained)
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
    for name in ARRAYS:
        about = files.get(f"{name}.bin") if isinstance(files, dict) else None
        if not isinstance(about, dict) or not number(about.get("bytes")) or not isinstance(about.get("sha256"), str):
            raise refused(f"its manifest lacks the size or the SHA-256 of {name}.bin")
    for name in ("max_length", "pad"):
        if not number(manifest.get(name)):
            raise refused(f"its manifest has {name}={manifest.get(name)!r}, where a number was expected")
    known = vars(Counts())
    if not isinstance(counts, dict) or not counts.keys() <= known.keys():
        raise refused("its manifest has no counts, or unknown ones")
    for name, value in counts.items():
        if not kinds.get(name, number)(value):
            raise refused(f"its manifest has an invalid count, {name}={shown(value)}")
    counters: dict[str, Counter[str]] = {name: Counter(counts.get(name, {})) for name in ("dropped", "noted")}
    return Counts(**{**counts, **counters}), manifest["max_length"], manifest["pad"]


@dataclass(frozen=True)
class Collator:
    """Rows → a batch of torch tensors [rows, longest]: input_ids, labels, position_ids, all int64.

    There is no attention mask: a position id of 0 marks the beginning of a sequence, and padding at the end of a row is a
    sequence of its own without labels. Position ids are taken from the rows, or computed from seq_lengths if they have
    none.

    A stock model of transformers separates the sequences only without a cache and without an attention mask. In your own loop,
    call model(**batch, use_cache=False), in training and evaluation alike, or set model.config.use_cache = False (the Trainer
    and the trainers of TRL do so). With the default, use_cache=True, the sequences of a row see each other and the loss is
    wrong. The flash_attention implementations separate them only in batches of one row. docs/data.md lists the models that
    have no position ids, or no attention to separate.
    """

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        try:
            import torch
        except ModuleNotFoundError as e:
            missing("the collator", e, "torch")

        if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Mapping) for row in rows):
            raise TypeError(f"collator: rows is {shown(rows)}; pass a list of rows, such as [data[0], data[1]] or data[:2]")
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
            f"collator: row {i} has {sorted(row)}, but needs input_ids, labels, and position_ids or seq_lengths, without which "
            "its sequences would see each other; keep these columns (remove_unused_columns=False)"
        )
    places = row["position_ids"] if "position_ids" in row else np.concatenate([np.arange(n) for n in row["seq_lengths"]])
    if not len(places) == len(row["input_ids"]) == len(row["labels"]):
        raise ValueError(
            f"collator: row {i} has {len(row['input_ids'])} tokens, {len(row['labels'])} labels and {len(places)} positions; "
            "was it cut? TRL cuts rows at SFTConfig(max_length=1024): pass max_length=None"
        )
    return np.asarray(places)
