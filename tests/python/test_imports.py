"""Who imports whom in python/unswag: no circles, and no private names of another module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import unswag

PACKAGE = Path(unswag.__file__).parent
FILES = {
    ".".join(("unswag", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def at_import(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported: not those in functions, nor those for the type checker."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield node
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                waiting.extend(node.orelse)
            elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                waiting.append(node)


def taken(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str, str]]:
    """(module, name in it, name here) of what an import takes from UnSwag; the name is "" for the module itself."""
    assert not isinstance(node, ast.ImportFrom) or not node.level, "UnSwag's imports are absolute"
    for alias in node.names:
        if isinstance(node, ast.Import):
            module, name, here = alias.name, "", alias.asname or alias.name
        elif f"{node.module}.{alias.name}" in FILES or (node.module == "unswag" and alias.name == "_core"):
            module, name, here = f"{node.module}.{alias.name}", "", alias.asname or alias.name
        else:
            module, name, here = node.module or "", alias.name, alias.asname or alias.name
        if module.partition(".")[0] == "unswag":
            yield module, name, here


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of the graph, or nothing."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for following in sorted(graph.get(node, ())):
                if found := search(following, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def private(module: str, tree: ast.Module) -> set[tuple[str, str]]:
    """The private names of other modules that this one imports, or reads from a module that it imports, anywhere."""
    found, modules = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for home, name, here in taken(node):
                if home == "unswag._core":
                    continue
                if not name:
                    modules[here] = home
                elif name.startswith("_") and not name.startswith("__"):
                    found.add((module, f"{home}.{name}"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            home = modules.get(ast.unparse(node.value))
            if home is not None and f"{home}.{node.attr}" != "unswag._core":
                found.add((module, f"{home}.{node.attr}"))
    return found


def anywhere(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """`at_import`, and the imports in functions."""
    yield from at_import(tree)
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from (node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom)))


TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def test_no_module_imports_one_that_imports_it():
    graph = {module: {home for node in at_import(tree) for home, _, _ in taken(node)} for module, tree in TREES.items()}
    assert len(graph) > 40 and graph["unswag.torch.surgery"], "the walk finds no imports"
    assert circle(graph) == []


def test_none_of_the_imports_in_functions_hides_a_circle():
    graph = {module: {home for node in anywhere(tree) for home, _, _ in taken(node)} for module, tree in TREES.items()}
    assert graph["unswag"] == {"unswag.extras"} and "unswag.jax.ledger" in graph["unswag.front"]
    assert circle(graph) == []


def test_no_module_takes_private_names_from_another():
    found = set().union(*(private(module, tree) for module, tree in TREES.items()))
    assert found == set(), "give it a public name, or another home"


def test_the_walk_sees_circles_and_private_names():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"] and circle({"a": {"b"}, "b": set()}) == []
    text = """
from typing import TYPE_CHECKING
from unswag import _core, ledger
from unswag.policy import _LAYOUT
if TYPE_CHECKING:
    from unswag import cli
try:
    import unswag.data as d
except ImportError:
    pass
def f():
    from unswag.jax import how
    return how._partitions, ledger._pattern, _core._x, d._y, ledger.__name__
"""
    tree = ast.parse(text)
    homes = {home for node in at_import(tree) for home, _, _ in taken(node)}
    assert homes == {"unswag._core", "unswag.ledger", "unswag.policy", "unswag.data"}
    assert {name for _, name in private("m", tree)} == {
        "unswag.policy._LAYOUT", "unswag.jax.how._partitions", "unswag.ledger._pattern", "unswag.data._y",
    }  # fmt: skip
