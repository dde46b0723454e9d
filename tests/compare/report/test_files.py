"""The report's files: the page whole and without a network, the tables, the pictures."""

import csv
import json

from compare.comparison import FILES


def test_the_other_files(written):
    found, out = written
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(found))
    rows = list(csv.DictReader((out / "report.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == [row["method"] for row in found["methods"]]
    assert float(rows[0]["metric_mean"]) == found["methods"][0]["metric"]["mean"]
    assert rows[-1]["metric_mean"] == ""
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in FILES if name.endswith("png"))
    assert all("<svg" in (out / name).read_text() for name in FILES if name.endswith("svg"))
    assert {path.name for path in out.iterdir()} == set(FILES)
