"""The report's page: whole, whatever there is to show."""

import pytest

from compare.comparison import failed, results
from compare.report.test_document import begun, made
from pages.test_html import check_page
from spectune.compare.report.files import write_report
from spectune.compare.report.model import Document


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
