"""Commands as a user types them."""

import sys

import pytest
from typer.testing import CliRunner

from spectune.cli import app, main

runner = CliRunner()


def run(*arguments, code=0, stdin=None):
    result = runner.invoke(app, list(arguments), input=stdin)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def fails(monkeypatch, capsys, *arguments):
    """Return what stderr says when the command line ends with code 2."""
    monkeypatch.setattr(sys, "argv", ["spectune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err + output.out
    return " ".join(output.err.split())
