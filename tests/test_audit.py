"""`make audit` where the database of weaknesses can be asked, and where it cannot."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit.py"
UNREACHABLE = "Traceback (most recent call last):\n  File x\nrequests.exceptions.ConnectionError: no such host"
UNKNOWN = "ERROR:pip_audit._cli:torch: Dependency not found on PyPI and could not be audited: torch (2.9)"


@pytest.mark.skipif(sys.platform == "win32", reason="a script stands for pip-audit")
@pytest.mark.parametrize(
    ("out", "error", "code", "told"),
    [
        ("No known vulnerabilities found\n", "", 0, "No known vulnerabilities found\n"),
        ("torch 2.6 PYSEC-1 2.6.1\n", "Found 1 known vulnerability\n", 1, "torch 2.6 PYSEC-1 2.6.1\nFound 1"),
        ("", UNREACHABLE, 2, "PyPI's database of weaknesses"),
        ("", UNKNOWN, 2, "PyPI's database of weaknesses"),
    ],
)
def test_weaknesses_are_told_or_that_nothing_is_known(tmp_path, out, error, code, told):
    program = tmp_path / "pip-audit"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nassert '--strict' in sys.argv\nprint({out!r}, end='')\n"
        f"print({error!r}, file=sys.stderr)\nsys.exit({min(code, 1)})\n"
    )
    program.chmod(0o755)
    done = subprocess.run([sys.executable, SCRIPT, program], capture_output=True, text=True)
    assert done.returncode == code
    assert (done.stdout + done.stderr).startswith(told)
    assert code != 2 or len(done.stderr.splitlines()) == 1
