"""What is process-wide is there while somebody needs it, and gone afterwards."""

import subprocess
import sys
import threading

import torch.nn as nn
import torch.nn.functional as F
from transformers.trainer_callback import CallbackHandler

import spectune
from spectune.planning.batch import _whole_attention
from spectune.shared import WhileNeeded, replaced


class Owner:
    @staticmethod
    def answer():
        return 1


def test_the_first_starts_it_and_the_last_ends_it():
    events = []

    def start():
        events.append("start")
        return lambda: events.append("stop")

    effect = WhileNeeded(start)
    with effect.needed():
        with effect.needed():
            pass
        assert events == ["start"]
    assert events == ["start", "stop"]
    with effect.needed():
        pass
    assert events == ["start", "stop"] * 2


def test_contexts_that_overlap_in_threads_leave_what_was_there():
    before = F.scaled_dot_product_attention
    inside, leave = threading.Event(), threading.Event()

    def other():
        with _whole_attention.needed():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with _whole_attention.needed():
        thread.start()
        inside.wait(10)
    assert F.scaled_dot_product_attention is not before
    leave.set()
    thread.join()
    assert F.scaled_dot_product_attention is before


def test_what_somebody_else_replaced_after_us_stays():
    effect = replaced(Owner, "answer", lambda before: staticmethod(lambda: before() + 1).__func__)
    own = Owner.answer
    with effect.needed():
        ours = Owner.answer
        assert ours() == 2
        theirs = lambda: ours() + 10  # noqa: E731
        Owner.answer = theirs
    assert Owner.answer is theirs
    Owner.answer = own


ALONE = """
import copy, gc
import torch, torch.nn as nn
from transformers.trainer_callback import CallbackHandler
import spectune

before = CallbackHandler.__init__, torch.amp.GradScaler.scale
def as_it_was(): return (CallbackHandler.__init__, torch.amp.GradScaler.scale) == before
first, second = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
spectune.adapt(first, "adalora:rank=2")
spectune.adapt(second, "adalora:rank=2")
assert not as_it_was()
spectune.detach(first)
assert not as_it_was()
copied = copy.deepcopy(second)
spectune.detach(second)
assert not as_it_was()
spectune.detach(copied)
gc.collect()
assert as_it_was()
"""


def test_adalora_listens_to_trainers_only_while_it_is_on_a_model():
    # in a process of its own: models of other tests may be alive in this one
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trainer_of_another_model_has_no_callback_of_ours():
    model = nn.Sequential(nn.Linear(8, 8))
    spectune.adapt(model, "adalora:rank=2")

    def names(of):
        return [type(c).__name__ for c in CallbackHandler([], of, None, None, None).callbacks]

    assert "SpectuneRunLength" in names(model)
    assert "SpectuneRunLength" not in names(nn.Linear(2, 2))
    spectune.detach(model)
    assert "SpectuneRunLength" not in names(model)
