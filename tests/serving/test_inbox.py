"""What other threads hand to the engine's: who waits, who is woken, and what is refused."""

from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from spectune.serving.inbox import Inbox
from spectune.serving.jobs import Busy, Closing


def job(**options) -> Any:
    return SimpleNamespace(mixture=None, cancelled=False, **options)


def put(inbox, *jobs):
    for one in jobs:
        inbox.put(one, lambda: {})


def test_what_names_stand_for_is_said_when_a_request_comes_and_not_where_it_is_refused():
    inbox, asked = Inbox(1), []
    one = job()
    inbox.put(one, lambda: asked.append(1) or {"version": 1.0})
    assert one.mixture == {"version": 1.0}
    with pytest.raises(Busy, match="1 requests wait already"):
        inbox.put(job(), lambda: asked.append(2))
    assert asked == [1]
    assert len(inbox) == 1


def test_a_name_that_stands_for_nothing_leaves_nobody_waiting():
    inbox = Inbox(2)

    def unknown():
        raise KeyError("a")

    with pytest.raises(KeyError):
        inbox.put(job(), unknown)
    assert len(inbox) == 0


def test_a_closed_one_takes_nothing_and_tells_the_engine():
    inbox = Inbox(2)
    put(inbox, job())
    inbox.close()
    for hand in (lambda: put(inbox, job()), lambda: inbox.call(print)):
        with pytest.raises(Closing):
            hand()
    assert inbox.next(busy=False)[1] is True
    assert len(inbox.take_where(lambda one: True)) == 1
    assert len(inbox) == 0


def test_calls_are_given_once_and_in_order():
    inbox = Inbox(2)
    futures = [inbox.call(function) for function in (int, str)]
    calls, closing = inbox.next(busy=False)
    assert [function for function, _ in calls] == [int, str]
    assert [future for _, future in calls] == futures
    assert not closing
    assert not inbox.next(busy=True)[0]  # which does not wait while rows run


@pytest.mark.parametrize("what", ["put", "cancel", "came"])
def test_whatever_may_let_somebody_begin_wakes_a_stalled_engine(what):
    inbox, waiting = Inbox(4), job()
    put(inbox, waiting)
    inbox.take([], stalled=True)
    if what == "put":
        put(inbox, job())
    elif what == "cancel":
        inbox.cancel(waiting)
        assert waiting.cancelled
    else:
        version: Any = SimpleNamespace(coming=True)
        inbox.came(version)
        assert version.coming is False
    assert not inbox._stalled


def test_requests_are_taken_out_by_what_is_true_of_them():
    inbox = Inbox(4)
    jobs = [job(late=late) for late in (False, True, False, True)]
    put(inbox, *jobs)
    assert inbox.take_where(lambda one: one.late) == [jobs[1], jobs[3]]
    with inbox.held() as waiting:
        assert list(waiting) == [jobs[0], jobs[2]]


def test_an_engine_with_nothing_to_do_waits_for_a_call():
    inbox, seen = Inbox(1), list[Any]()
    thread = Thread(target=lambda: seen.append(inbox.next(busy=False)))
    thread.start()
    inbox.call(int)
    thread.join(60)
    ((calls, closing),) = seen
    assert [function for function, _ in calls] == [int]
    assert not closing
