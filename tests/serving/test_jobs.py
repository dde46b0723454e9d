"""Requests as the engine has them: how long they may take, and which would never fit."""

import math
from types import SimpleNamespace

import pytest

from spectune import SpectuneError
from spectune.serving.jobs import Job, Limits


def job(*longest, seconds=None):
    return Job([SimpleNamespace(most=most) for most in longest], {}, lambda events: None, seconds)


def test_a_request_is_late_once_its_seconds_are_over():
    assert not job(1).late
    assert not job(1, seconds=math.inf).late
    late = job(1, seconds=1.0)
    late.began -= 2.0
    assert late.late


def test_a_reply_that_memory_could_never_hold_is_refused():
    Limits(tokens=100).check(job(20, 100))
    Limits().check(job(10**9))
    with pytest.raises(SpectuneError, match=r"may take 101 tokens, and memory holds 100: ask for fewer"):
        Limits(tokens=100).check(job(20, 101))
