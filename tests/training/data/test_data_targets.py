"""What texts are labelled with, as people write labels."""

import pytest

from spectune.adapters.labels import ONE, SEVERAL
from spectune.errors import SpectuneError
from spectune.training.data.targets import label_problem, notes, settle


def labelled(*labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize("labels", [([1, 0, 1], [0, 0, 0]), ([1, 0], [0, 1]), ("[0, 1]", "[1, 1]")])
def test_zeros_and_ones_for_each_label_are_no_names(labels):
    with pytest.raises(SpectuneError, match="a zero or one for each label, as all others are: write the names"):
        settle(labelled(*labels), SEVERAL)


def test_numbers_may_be_names_of_several():
    records = labelled([0, 1], [1, 2], [])
    settle(records, SEVERAL)
    assert [record["label"] for record in records] == [["0", "1"], ["1", "2"], []]


@pytest.mark.parametrize(
    ("label", "problem", "message"),
    [
        ("['a', 'b']", None, "a list as Python shows it: write JSON"),
        ("['a', 'b']", ONE, None),
        ("['a]", None, None),
        ("", None, "not '': name it, or take the record out"),
        (None, None, "not None: name it, or take the record out"),
        ([1.0, 0.0], None, "has 1.0; write the names of those that are 1"),
    ],
)
def test_labels_that_are_none(label, problem, message):
    found = label_problem(label, problem)
    assert found is None if message is None else message in found


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (["a", "b", "nan"], "'nan' is a label like others: take these records out, if it stands for none"),
        (["0,5", "1,5", "2"], "'0,5' is taken as a name: numbers to predict have a point"),
        (["a,b", "b,c", "a,c", "a"], "'a,b' is taken as one name: of several labels write a list"),
        (["yes, please", "no"], None),
        (["a,b", "b,c"], None),
        (["True", "False"], None),
    ],
)
def test_names_that_may_be_something_else_are_told(labels, note):
    found = notes(labelled(*labels), ONE, False)
    assert found == [] if note is None else len(found) == 1 and note in found[0]
