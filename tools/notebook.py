"""Makes examples/finetune.ipynb from examples/finetune.py (a test compares them):

    python tools/notebook.py

A line `# %% [markdown]` begins a cell of text, `# %%` a cell of code. A notebook has no command line, so there the parser reads
an empty list, to which the reader can add arguments.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "finetune.py"
COMMAND_LINE = ("parser.parse_args()", "parser.parse_args([])")  # in the script, in the notebook


def cells(script: str) -> list[dict[str, Any]]:
    """The cells of a script, without outputs."""
    made = []
    for i, (kind, body) in enumerate(re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", script, re.MULTILINE | re.DOTALL)):
        cell: dict[str, Any] = {"cell_type": "markdown" if kind else "code", "id": f"cell-{i}", "metadata": {}}
        text = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if kind else body.replace(*COMMAND_LINE)
        cell["source"] = text.strip().splitlines(keepends=True)
        made.append(cell if kind else cell | {"execution_count": None, "outputs": []})
    return made


def text(script: str) -> str:
    """The notebook, in version 4.5 of the format."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    book = {"cells": cells(script), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCRIPT.with_suffix(".ipynb").write_text(text(SCRIPT.read_text(encoding="utf-8")), encoding="utf-8")
