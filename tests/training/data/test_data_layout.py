"""Where tokens lie in a packed row: each example finds all of its own, in order, and attends to those before alone."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectune.training.data.encoding import Example
from spectune.training.data.layout import Layout


def example(*tokens):
    return Example(list(tokens), [True] * len(tokens))


def check(examples, share):
    """Check the layout's laws: rows hold an example's tokens, and a row sees its example's tokens up to its own."""
    layout = Layout(examples, share)
    mask = layout.mask(None)[0, 0]
    assert mask.shape == (layout.count, layout.count)
    held: dict[int, int] = {}
    for one, rows in zip(examples, layout.rows, strict=True):
        assert len(rows) == len(one.tokens)
        for place, (row, token) in enumerate(zip(rows, one.tokens, strict=True)):
            assert held.setdefault(row, token) == token
            assert mask[row].nonzero().flatten().tolist() == sorted(rows[: place + 1])
    assert sorted(held) == [*range(layout.count)]
    assert sum(layout.own) == layout.count
    assert sorted(layout.order) == [*range(len(examples))]
    assert layout.seen == [len(examples[i].tokens) for i in layout.order]
    assert all(1 <= own <= seen for own, seen in zip(layout.own, layout.seen, strict=True))
    return layout


BEGIN = range(10, 22)
EXAMPLES = [
    example(*BEGIN, 1, 2),
    example(5, 6),
    example(*BEGIN, 1, 3, 4),
    example(*BEGIN),
    example(*BEGIN, 1, 2),  # once more
    example(*BEGIN[:9], 7),
]


def test_nothing_is_shared_where_it_is_not_to_be():
    layout = check(EXAMPLES, False)
    assert layout.order == [*range(6)]
    assert layout.own == layout.seen
    assert layout.rows[1] == [14, 15]


def test_a_beginning_in_common_lies_there_once():
    assert check(EXAMPLES, True).own == [2, 10, 12 - 9, 14 - 12, 14 - 13, 15 - 13]  # in the order of their tokens
    twice = check([EXAMPLES[0], EXAMPLES[4]], True)
    assert twice.own == [14, 1]  # at least one row of its own, whose logits are its


def test_short_beginnings_are_not_worth_it():
    short, long = [example(*range(7), i) for i in (50, 51)], [example(*range(8), i) for i in (50, 51)]
    assert check(short, True).count == 16
    assert check(long, True).count == 10


@pytest.mark.parametrize("share", [False, True])
def test_one_example_alone(share):
    layout = check([example(3, 1, 2)], share)
    assert layout.rows == [[0, 1, 2]]
    assert torch.equal(layout.mask(None)[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())


def test_a_mask_in_a_dtype_is_zero_where_a_row_is_seen():
    layout = Layout(EXAMPLES, True)
    seen = layout.mask(None)
    for dtype in (torch.float32, torch.bfloat16):
        mask = layout.mask(dtype)
        assert mask.dtype == dtype
        assert torch.equal(mask == 0, seen)
        assert (mask[~seen] == torch.finfo(dtype).min).all()


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=6), st.booleans())
def test_any_examples(ends, share):
    """With beginnings of every length in common, in any order."""
    trunk = [*itertools.repeat(9, 8)]
    check([example(*trunk[: 4 * (len(end) % 3)], *end) for end in ends], share)
