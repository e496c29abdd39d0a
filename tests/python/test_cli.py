"""The command `unswag`: its commands, its version, its page in the documentation."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

import unswag
from unswag import cli

ROOT = Path(__file__).parents[2]
PLAIN = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}


def test_each_file_is_a_command_and_has_a_test():
    files = {module.name for module in pkgutil.iter_modules(cli.__path__)}
    assert set(get_command(cli.app).commands) == {name.replace("_", "-") for name in files} >= {"doctor", "plan"}
    for name in files:
        assert (Path(__file__).parent / "cli" / f"test_{name}.py").exists(), name


def test_the_page_of_the_documentation_is_current(tmp_path):
    command = [sys.executable, "-m", "typer", "unswag.cli", "utils", "docs", "--name", "unswag", "--output"]
    environment = os.environ | PLAIN | {"PYTHONPATH": str(ROOT / "python")}
    subprocess.run([*command, str(tmp_path / "cli.md")], env=environment, capture_output=True, check=True)
    made, written = (tmp_path / "cli.md").read_text(), (ROOT / "docs" / "cli.md").read_text()
    assert made == written, "run: typer unswag.cli utils docs --name unswag --output docs/cli.md"
    assert all(f"## `unswag {name}`" in written for name in get_command(cli.app).commands)


def test_the_version():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and result.stdout == f"unswag {unswag.__version__}\n"


def test_help_and_wrong_arguments():
    run = CliRunner()
    shown = run.invoke(cli.app, ["--help"], env=PLAIN).stdout
    assert "doctor" in shown and "--version" in shown
    assert run.invoke(cli.app, ["doctr"]).exit_code == 2


def test_the_command_is_declared_and_runs_as_a_module():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = declared["unswag"].partition(":")
    assert getattr(__import__(module, fromlist=[function]), function) is cli.main
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "COLUMNS": "100"}
    run = subprocess.run(
        [sys.executable, "-m", "unswag", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert "Usage: unswag" in run.stdout and "doctor" in run.stdout
