"""Checks the arguments of `prepare_data`, and paths, before any work is done."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unswag.data import records


def paths_of(given: Any) -> list[Path]:
    one = isinstance(given, (str, bytes, os.PathLike))
    if isinstance(given, (set, frozenset)):
        raise TypeError("prepare_data: path_or_paths is a set, which has no order; pass sorted(…)")
    if not one and (isinstance(given, Mapping) or not isinstance(given, Iterable) or hasattr(given, "read")):
        raise TypeError(f"prepare_data: path_or_paths={shown(given)}; pass the path of a .jsonl file, or a list of paths")
    paths = [path_of("prepare_data", "path_or_paths", path) for path in ([given] if one else given)]
    if not paths:
        raise ValueError(f"prepare_data: no files given: path_or_paths={shown(given)}; if it came from a glob, nothing matched")
    return paths


def path_of(where: str, name: str, given: Any) -> Path:
    if not isinstance(given, (str, bytes, os.PathLike)):
        what = "a record, not a path; write records to a .jsonl file" if isinstance(given, Mapping) else "not a path"
        raise TypeError(f"{where}: {name}: {shown(given)} is {what}")
    path = os.fsdecode(given)
    if not path or "\0" in path:
        raise ValueError(f"{where}: {name}: {path!r} is not a path; pass the name of a file or folder")
    return Path(path)


def shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '…'}"


def check_arguments(
    tokenizer: Any,
    max_length: Any,
    template: Any,
    columns: Any,
    packing: Any,
    too_long: Any,
    on_error: Any,
    verbose: Any,
) -> int:
    """Checks all arguments and returns `max_length` as an int. Errors name the argument."""
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
        raise ValueError(f"prepare_data: max_length={length}; a row needs at least 2 tokens, one to predict the other")
    if length >= 1 << 31:
        raise ValueError(
            f"prepare_data: max_length={length}; a row has fewer than 2**31 tokens. A tokenizer without a limit says 1e30; "
            "pass the model's limit, such as model.config.max_position_embeddings"
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
            f'prepare_data: columns={columns!r}; pass a dict from field to your column, such as {{"output": "answer"}}'
        )
    known = {*(name for names in records.FORMS.values() for name in names), *records.OPTIONAL}
    unknown = [name for name in columns or {} if name not in known]
    if unknown:
        raise ValueError(f"prepare_data: columns has unknown fields {unknown}; the fields are {sorted(known)}")
    for name, column in (columns or {}).items():
        if not isinstance(column, str):
            raise TypeError(f"prepare_data: columns[{name!r}]={column!r}; pass the name of a column as a str")
    return length
