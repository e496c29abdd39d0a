"""unswag prepare: what is missing or wrong is one line."""

from __future__ import annotations

from typer.testing import CliRunner

from unswag import cli


def test_errors_are_one_line(tmp_path):
    arguments = ["prepare", str(tmp_path / "none.jsonl"), "--tokenizer", str(tmp_path), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output and not (tmp_path / "out").exists()
