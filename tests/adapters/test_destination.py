"""Where a result may go: into what is new, empty or of its kind, and never over what it is made from."""

import json

import pytest

from spectune import SpectuneError
from spectune.adapters.destination import MERGED, check_destination, check_run_folder


@pytest.fixture
def places(tmp_path):
    for name in ("empty", "adapter", "merged", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "merged" / MERGED).write_text(json.dumps({"library_name": "spectune"}))
    (tmp_path / "other" / "thesis.tex").write_text("")
    return tmp_path


def test_what_is_new_or_empty_may_be_written(places):
    check_destination(places / "new" / "deeper")
    check_destination(places / "empty", [places / "adapter"])
    check_destination(places / "empty", merged=True)


@pytest.mark.parametrize(("kind", "merged"), [("adapter", False), ("merged", True)])
def test_an_earlier_result_is_replaced_by_its_own_kind_alone_when_asked(places, kind, merged):
    with pytest.raises(SpectuneError, match="--overwrite to replace it"):
        check_destination(places / kind, merged=merged)
    check_destination(places / kind, overwrite=True, merged=merged)
    with pytest.raises(SpectuneError, match="so that it is not overwritten"):
        check_destination(places / kind, overwrite=True, merged=not merged)
    with pytest.raises(SpectuneError, match="so that it is not overwritten"):
        check_destination(places / "other", overwrite=True, merged=merged)


def test_what_a_result_is_made_from_stays(places):
    with pytest.raises(SpectuneError, match="holds what the result is made from"):
        check_destination(places / "adapter", [places / "adapter"], overwrite=True)
    with pytest.raises(SpectuneError, match="holds what the result is made from"):
        check_destination(places, [places / "adapter"], overwrite=True, merged=True)
    check_destination(places / "adapter", ["pirate"], overwrite=True)  # a name that is no folder


def test_a_result_may_lie_beside_what_it_is_made_from_in_its_folder(places):
    check_destination(places / "adapter" / "lora", [places / "adapter"])
    check_run_folder(places / "merged" / "runs" / "a", [places / "merged"], "run.json", [])  # as of who works in there


def test_what_no_folder_can_be_is_told(places):
    (places / "link").symlink_to(places / "empty")
    with pytest.raises(SpectuneError, match="symbolic link"):
        check_destination(places / "link")
    with pytest.raises(SpectuneError, match="is a file"):
        check_destination(places / "other" / "thesis.tex")
    with pytest.raises(SpectuneError, match=r"cannot be made: .*thesis.tex is no folder"):
        check_destination(places / "other" / "thesis.tex" / "out")


def test_a_run_leaves_alone_what_no_run_wrote(places):
    (places / "other" / "config.yaml").write_text("")
    with pytest.raises(SpectuneError, match=r"holds a config.yaml that no run wrote"):
        check_run_folder(places / "other", [], "run.json", ["config.yaml"])
    (places / "other" / "run.json").write_text("{}")
    check_run_folder(places / "other", [], "run.json", ["config.yaml"])
    check_run_folder(places / "adapter", [], "run.json", ["config.yaml"])
