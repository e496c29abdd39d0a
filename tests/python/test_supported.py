"""docs/supported.md is what tools/supported.py prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("torch", reason="the patterns are those of the torch front end")


def test_the_table_of_support_is_the_one_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("supported", ROOT / "tools" / "supported.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    written = (ROOT / "docs" / "supported.md").read_text()
    assert written == tool.text(), "run: python tools/supported.py > docs/supported.md"
    assert "| `gated_mlp` |" in written and "`swiglu`" not in written
