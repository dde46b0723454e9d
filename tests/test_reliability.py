"""A few of the kills, failures and hostile documents of `make reliability`."""

import sys

import pytest

import reliability

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes that fork and are killed")


def test_killed_at_any_call_everything_is_old_or_new():
    done = reliability.kills(3 * len(reliability.OPERATIONS))
    assert set(done.values()) == {3}


def test_without_space_everything_is_old_or_new():
    assert reliability.full_disks(6) > 30
    reliability.file_size_limit()


def test_changed_documents_are_read_or_refused():
    assert min(reliability.hostile(60).values()) > 0


@pytest.mark.slow
def test_all_of_it():
    reliability.kills(200)
    reliability.full_disks(40)
    reliability.hostile(20_000)
