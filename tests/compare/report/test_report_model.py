"""The types of a comparison's document: what lies in an interval, which methods ran, and what a header may add."""

import pytest
from pydantic import ValidationError

from compare.comparison import HEADER, failed, results
from spectune.compare.report.document import document
from spectune.compare.report.model import Document, Estimate, Mean, Paired


@pytest.fixture(scope="module")
def found():
    finals, searches = results(methods=("lora", "svf"))
    return document(HEADER, [*finals, failed("vera")], searches).model_dump()


def test_what_an_interval_holds():
    estimate = Estimate(mean=0.5, low=0.4, high=0.7)
    assert estimate.ends == (0.4, 0.7)
    assert [estimate.holds(value) for value in (0.39, 0.4, 0.5, 0.7, 0.71)] == [False, True, True, True, False]


@pytest.mark.parametrize("ends", [{}, {"low": 0.1}, {"high": 0.9}])
def test_half_an_interval_is_none(ends):
    assert Estimate(mean=0.5, **ends).ends is None
    assert not Estimate(mean=0.5, **ends).holds(0.5)


def test_zero_is_an_end():
    assert Paired(mean=0.1, low=0.0, high=0.2).holds(0.0)
    assert Mean(mean=-0.1, low=-0.2, high=0.0, values=[-0.1]).ends == (-0.2, 0.0)


def test_the_document_comes_back_from_json_with_what_else_its_header_says(found):
    again = Document.model_validate_json(Document(**found).model_dump_json())
    assert again.model_dump() == found
    more = Document(**found, later="a field of another version")
    assert more.model_dump()["later"] == "a field of another version"


def test_those_that_ran(found):
    typed = Document(**found)
    assert [row.method for row in typed.methods if row not in typed.ran] == ["vera"]
    assert typed.ran[0].method == typed.best
    assert typed.methods[-1].parameters == 0.0


def test_fields_are_checked(found):
    with pytest.raises(ValidationError, match="floor"):
        Document(**{**found, "uncounted": "walls"})
    with pytest.raises(ValidationError, match="metric"):
        Document(**{key: value for key, value in found.items() if key != "metric"})
