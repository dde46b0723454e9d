"""Ask PyPI for known weaknesses of the locked versions: `make audit`; another pip-audit: `python .ci/audit.py PATH`.

It exits with 1 where there are some, and with 2 and one sentence where that could not be asked: of any package, since a
mirror of PyPI without the database answers that it knows of none.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Print what pip-audit found."""
    program = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / ".audit" / "bin" / "pip-audit")
    asked = ["--strict", "-r", "requirements.lock", "--require-hashes", "--disable-pip", "--progress-spinner", "off"]
    done = subprocess.run([program, *asked], cwd=ROOT, check=False, capture_output=True, encoding="utf-8")
    if done.returncode and ("Traceback" in done.stderr or "could not be audited" in done.stderr):
        why = done.stderr.strip().splitlines()[-1][:160]
        told = "PyPI's database of weaknesses (https://pypi.org/pypi/NAME/VERSION/json) could not be asked"
        print(f"{told}, so that nothing is known: run `make audit` where it can be reached ({why})", file=sys.stderr)
        sys.exit(2)
    print(done.stdout + done.stderr, end="")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
