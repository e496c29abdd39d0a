"""Real text that every Python carries: the docstrings of its standard library, read from the sources; no module is imported."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LONGEST_SIGNATURE = 300  # characters: the longest ones have more parameters than explanation
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}


class Documented(NamedTuple):
    """A function or class of the standard library: `json.dumps`, `json.dumps(obj, *, indent=None)`, its docstring."""

    name: str
    signature: str
    text: str


def documented(shortest: int = 40) -> Iterator[Documented]:
    """Every public function and class whose docstring has at least `shortest` characters, in the order of their files."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts):
            module = ".".join(p for p in parts if p != "__init__")
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # some platforms ship template files that are no Python
            yield from _walk(tree, module, shortest)


def question(item: Documented) -> str:
    """What a user would ask about `item`."""
    return f"What does `{item.signature}` of Python's standard library do?"


def write_pairs(path: Path, items: Iterable[Documented]) -> int:
    """Writes questions and docstrings as instruction data, one JSON object per line; returns how many.

    Items whose signature is longer than `LONGEST_SIGNATURE` are left out.
    """
    items = [item for item in items if len(item.signature) <= LONGEST_SIGNATURE]
    lines = [json.dumps({"instruction": question(item), "output": item.text}, ensure_ascii=False) + "\n" for item in items]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _walk(tree: ast.AST, inside: str, shortest: int) -> Iterator[Documented]:
    for node in getattr(tree, "body", ()):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            name = f"{inside}.{node.name}"
            text = ast.get_docstring(node)
            if text and len(text) >= shortest:
                yield Documented(name, name if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})", text)
            yield from _walk(node, name, shortest)
