"""The report's files: the page whole and without a network, the tables, the pictures."""

import csv
import json

import pytest

from compare.comparison import failed, results, whole
from compare.report.test_document import begun, made
from pages.test_html import check_page
from spectune.compare.report.document import document
from spectune.compare.report.figures import COSTS, front
from spectune.compare.report.files import write_report
from spectune.compare.report.model import Document

FILES = ["report.html", "report.json", "report.csv", "runs.csv", "pareto.png", "pareto.svg", "curves.png", "curves.svg"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "new"
    found = document(*whole())
    assert write_report(found, out) == [out / name for name in FILES]
    return found.model_dump(), out


def test_the_page_holds_it_all(written):
    found, out = written
    text = (out / "report.html").read_text()
    outline = check_page(text)
    assert len(outline.all("svg")) == 4 + 2 + 11
    assert found["answer"][0] in text
    for word in (">nan<", ">None<", ">inf<"):
        assert word not in text
    for row in found["methods"]:
        assert row["method"] in text
    for part in (
        "the loss is not finite at step 17",
        "best at the highest tried",
        "spectune train model=minilm-l6",
        "Some CPU",
    ):
        assert part in text
    assert "svft:pattern=top_k is left out: it cannot be made as small as 100k parameters." in text


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


def test_the_front_is_what_nothing_beats(written):
    rows = [row for row in Document(**written[0]).ran if row.trainable_parameters]
    for cost in COSTS:
        kept = front(rows, cost, True)
        for row in rows:
            beaten = any(
                cost.of(r) <= cost.of(row) and r.value.mean >= row.value.mean and r is not row
                and (cost.of(r), r.value.mean) != (cost.of(row), row.value.mean) for r in rows
            )  # fmt: skip
            assert (row in kept) == (not beaten)


@pytest.mark.parametrize(
    ("finals", "searches"),
    [
        ([failed("lora"), failed("svf")], [failed("svf", "search")]),
        (results(methods=("base",))[0], []),
        results(seeds=(0,), methods=("lora", "svf")),
        (begun(results(methods=("lora", "svf"), lora=0.06, svf=0.06)[0], 0.05), []),
    ],
    ids=["all failed", "the base alone", "one seed", "nothing learned"],
)
def test_little_to_show_is_a_page_too(finals, searches, tmp_path):
    paths = write_report(Document(**made(finals, searches, notes=[], baseline="lora")), tmp_path)
    check_page((tmp_path / "report.html").read_text())
    assert all(path.exists() for path in paths)
