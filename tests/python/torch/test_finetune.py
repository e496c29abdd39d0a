"""examples/finetune.py from end to end on a small random model, and its notebook: made from it, and executed."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
from tests.python.torch import small_folder

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "finetune.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_folder.save(tmp_path_factory.mktemp("model"))


def checked(names: dict, out: Path, printed: str) -> None:
    assert (out / "adapter_model.safetensors").exists()
    words = {line.split("  ")[0].strip(): line for line in printed.splitlines()}
    assert {"question", "before", "after, reloaded"} <= set(words)
    trained, fresh = names["answer"](names["model"], "why?"), names["answer"](names["reloaded"], "why?")
    assert trained == fresh  # what was saved is what was trained


def test_the_script(model, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    pairs = [{"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "be " * 20}]}] * 24
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    out = tmp_path / "out"
    arguments = f"finetune.py --model {model} --data {data} --out {out} --max-length 256 --epochs 12 --question why?"
    monkeypatch.setattr(sys, "argv", arguments.split())
    names = runpy.run_path(str(SCRIPT))
    printed = capsys.readouterr().out
    checked(names, out, printed)
    assert "be be be" in names["answer"](names["reloaded"], "why?")  # it learnt something
    assert "Saved for backward" in printed


def test_the_notebook_is_made_from_the_script_and_runs(model, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "tools" / "notebook.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    written = SCRIPT.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert written == tool.text(SCRIPT.read_text(encoding="utf-8")), "run: python tools/notebook.py"
    from examples import docstrings, smollm2

    few = [item for item in docstrings.documented() if item.name.startswith("heapq.")]
    monkeypatch.setattr(smollm2, "directory", lambda: model)
    monkeypatch.setattr(docstrings, "documented", lambda: few)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for cell in json.loads(written)["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, f"{SCRIPT.name}:{cell['id']}", "exec"), names)
    checked(names, tmp_path / "finetuned", capsys.readouterr().out)
