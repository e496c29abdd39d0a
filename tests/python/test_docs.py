"""README, docs and examples: links lead somewhere, code is Python, names and files that are mentioned exist."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve() if path else page
        assert where.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(where), f"{target}: no such heading; there are {sorted(anchors(where))}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_snippets_are_python(page):
    for indent, language, body in FENCE.findall(page.read_text()):
        if language == "python":
            ast.parse(textwrap.dedent(body) if indent else body)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_name_modules_and_targets_that_exist(page):
    text = page.read_text()
    for module in set(re.findall(r"python -m ((?:bench|examples)[\w.]*)", text)):
        path = ROOT.joinpath(*module.rstrip(".").split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in set(re.findall(r"`make ([a-z-]+)", text)):
        assert target in targets, f"make {target}"
    for result in set(re.findall(r"bench/results/[\w.-]+\.(?:json|png)", text)):
        if not result.startswith("bench/results/gpu-"):  # written on a machine with a GPU
            assert (ROOT / result).exists(), result


def test_every_page_is_on_the_map():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert [page for page in sorted(pages) if f"({page})" not in index] == []


def test_the_readme_is_short_and_ci_runs_what_it_says():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for command in re.findall(r"^make .*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE):
        assert f"`{command}`" in text
