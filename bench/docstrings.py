"""Real text that every Python carries: the docstrings of its standard library, read from its source; nothing is imported."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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


def _walk(tree: ast.AST, inside: str, shortest: int) -> Iterator[Documented]:
    for node in getattr(tree, "body", ()):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            name = f"{inside}.{node.name}"
            text = ast.get_docstring(node)
            if text and len(text) >= shortest:
                yield Documented(name, name if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})", text)
            yield from _walk(node, name, shortest)
