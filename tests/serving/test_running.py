"""The requests that are being answered: what a step's logits give each row, and what becomes of those that fail."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spectune.errors import SpectuneError
from spectune.serving.batch import Row
from spectune.serving.jobs import Job
from spectune.serving.running import Running
from spectune.serving.sampling import Logprobs
from spectune.serving.shelf import Version

END = 9


class Letters:
    """A text whose tokens are letters, each of which is certain but the last."""

    stopped = False

    def __init__(self):
        self.held = ""

    def add(self, token):
        certain, self.held = self.held, "abcdefghij"[token]
        return certain

    def end(self):
        return self.held


class Drawn:
    """A sampler that takes the least likely token, and tells of it."""

    plain = False

    def choose(self, logits, tokens):
        token = int(logits.argmin())
        return token, Logprobs(token, 0.0, [])


def row(limit=100, sampler: Any = None) -> Row:
    text: Any = Letters()
    return Row([5], sampler or SimpleNamespace(plain=True), text, limit, frozenset([END]))


class Asked:
    """A request with rows, and what was delivered to it."""

    def __init__(self, *rows, mixture=None):
        self.events: list[Any] = []
        self.job = Job(list(rows), {}, self.events.extend, mixture=mixture or {})


def running(*asked):
    """Return what runs, all of whose rows have places in a batch."""
    batch: Any = SimpleNamespace(rows=[])
    batch.leave = batch.rows.remove
    found = Running(batch)
    for one in asked:
        found.begin(one.job)
    batch.rows += found.unread
    found.unread.clear()
    return found, batch


def likely(*tokens):
    """Return logits (rows x 10) whose likeliest tokens these are; the least likely is the one before."""
    logits = torch.zeros(len(tokens), 10)
    for place, token in enumerate(tokens):
        logits[place, token], logits[place, token - 1] = 1.0, -1.0
    return logits


def test_rows_begin_with_the_adapters_that_have_a_place_on_the_model():
    there, aside = Version("a", "", slot="served-0"), Version("b", "")
    one = Asked(row(), row(), mixture={there: 0.5, aside: 2.0})
    found = Running(SimpleNamespace(rows=[]))
    found.begin(one.job)
    assert [r.mixture for r in one.job.rows] == [{"served-0": 0.5}] * 2
    assert one.job.rows[0].origin == one.job.rows[1].origin == frozenset({(there, 0.5), (aside, 2.0)})
    assert list(found.unread) == one.job.rows == one.job.left
    assert len(found) == 2
    assert one.job.rows[0] in found


def test_each_row_takes_its_token_and_text_is_told_once_it_is_certain():
    one, other = Asked(row(), row()), Asked(row(sampler=Drawn()))
    found, batch = running(one, other)
    found.take(list(batch.rows), likely(0, 1, 2))
    assert (one.events, other.events) == ([], [])  # nothing is certain
    found.take(list(batch.rows), likely(3, 4, 5))
    assert [(e.row, e.text, e.tokens, e.finish) for e in one.events] == [(0, "a", 2, None), (1, "b", 2, None)]
    (event,) = other.events
    assert (event.row, event.text) == (0, "b")
    assert [told.token for told in event.logprobs] == [1, 4]  # of the token that told nothing too, and each once
    assert other.job.rows[0].told == []
    assert found.tokens == 6


def test_rows_end_by_themselves_and_a_request_with_its_last():
    one = Asked(row(), row(limit=2))
    found, _ = running(one)
    first, second = one.job.rows
    found.take([first, second], likely(END, 1))
    assert [(e.row, e.text, e.finish) for e in one.events] == [(0, "", "stop")]
    assert (first in found, second in found, found.jobs) == (False, True, [one.job])
    found.take([second], likely(2))
    assert [(e.row, e.text, e.finish) for e in one.events[1:]] == [(1, "bc", "length")]
    assert (len(found), found.jobs, one.job.left) == (0, [], [])
    found.take([first], likely(3))  # which was computed while nobody knew that it had ended
    assert first.tokens == [END]


def test_a_row_that_is_no_number_ends_its_own_request_alone():
    one, other = Asked(row(), row()), Asked(row())
    found, batch = running(one, other)
    logits = likely(1, 2, 3)
    logits[1, 4] = torch.nan
    found.take(list(batch.rows), logits)
    assert [str(e.error) for e in one.events] == [
        "the model's answer is no number (NaN): the weights of the mixture may be too large, or the dtype too small"
    ]
    assert batch.rows == other.job.rows
    assert (found.jobs, len(found)) == ([other.job], 1)
    assert other.job.rows[0].tokens == [3]


def test_a_sampler_that_fails_ends_its_own_request_and_is_in_the_log(caplog):
    class Broken(Drawn):
        def choose(self, logits, tokens):
            raise RuntimeError("no such processor")

    one, other = Asked(row(sampler=Broken())), Asked(row())
    found, batch = running(one, other)
    with caplog.at_level(logging.ERROR, "spectune.serving"):
        found.take(list(batch.rows), likely(1, 2))
    assert isinstance(one.events[0].error, RuntimeError)
    assert "a request failed" in caplog.text
    assert found.jobs == [other.job]


def test_what_a_user_is_told_is_not_in_the_log(caplog):
    one = Asked(row())
    found, batch = running(one)
    found.blame(batch.rows, SpectuneError("the prompt is too long"))
    found.blame(one.job.rows, SpectuneError("once more"))  # of a request that has ended already
    assert [str(e.error) for e in one.events] == ["the prompt is too long"]
    assert caplog.text == ""


@pytest.mark.parametrize("where", ["unread", "read", "not begun"])
def test_a_request_that_fails_leaves_nothing_behind(where):
    one, other = Asked(row(), row()), Asked(row())
    found, batch = running(other)
    if where != "not begun":
        found.begin(one.job)
    if where == "read":
        batch.rows += found.unread
        found.unread.clear()
    found.fail(one.job, SpectuneError("it took too long"))
    assert [str(e.error) for e in one.events] == ["it took too long"]
    assert (found.jobs, list(found.unread), batch.rows, len(found)) == ([other.job], [], other.job.rows, 1)


def test_nobody_is_told_who_does_not_wait():
    one = Asked(row(limit=1))
    found, batch = running(one)
    one.job.cancelled = True
    found.take(list(batch.rows), likely(3))
    assert one.events == []
    gone = Asked(row())
    gone.job.cancelled = True
    found.begin(gone.job)
    found.fail(gone.job, SpectuneError("it left"))
    assert gone.events == []
