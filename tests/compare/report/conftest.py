"""A report that is written once."""

import pytest

from compare.comparison import FILES, whole
from spectune.compare.report.document import document
from spectune.compare.report.files import write_report


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "new"
    found = document(*whole())
    assert write_report(found, out) == [out / name for name in FILES]
    return found.model_dump(), out
