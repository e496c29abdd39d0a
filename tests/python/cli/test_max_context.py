"""unswag max-context: exit codes."""

from __future__ import annotations

from typer.testing import CliRunner

from unswag import cli


def test_errors_are_one_line():
    result = CliRunner().invoke(cli.app, ["max-context", "/no/such/folder", "--memory", "1GiB"])
    assert result.exit_code == 2 and "Traceback" not in result.output
