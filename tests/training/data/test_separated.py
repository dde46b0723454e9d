"""Tables of fields with something between them: what the first line says, and rows that are otherwise."""

import pytest

from spectune import SpectuneError
from spectune.training.data.separated import separated


def read(text, delimiter=None):
    notes = []
    found = separated("a.csv", iter(text.splitlines(keepends=True)), delimiter, notes.append)
    return [row for row, _ in found], notes


def test_fields_are_the_texts_that_they_are():
    rows, notes = read('name,age\n007,None\n"a, ""b""\nc",\n')
    assert rows == [{"name": "007", "age": "None"}, {"name": 'a, "b"\nc', "age": ""}]
    assert notes == []


@pytest.mark.parametrize("delimiter", ",;\t|")
def test_the_first_line_says_what_is_between_fields(delimiter):
    assert read(f"a{delimiter}b\n1{delimiter}2\n")[0] == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2,3\n", r"a.csv, row 1: has other columns than the first line \(3 for 2 names\); quote commas"),
        ("a;b\n1\n", r"row 1: has other columns than the first line \(1 for 2 names\); quote texts with line ends"),
        ("a,a\n1,2\n", "two columns are named 'a'"),
        ("a,b\n1,2\na,b\n", "row 2: has the names of the first line again"),
        ('a,b\n1,2\n3,"4\n', "row 2, which begins in line 3: it is not CSV"),
        ('sep=,\na,b\n1,"2" 3\n', "row 1, which begins in line 3: it is not CSV"),
        ('a\tb\n"1\t2\n3\t4"\t5\n', "goes on over the ends of rows"),
    ],
)
def test_rows_that_are_otherwise_are_told(text, message):
    with pytest.raises(SpectuneError, match=message):
        read(text)


def test_what_was_taken_for_names_is_told_once():
    rows, notes = read("good,yes\ngood,no\ngood,maybe\n")
    assert len(rows) == 2
    (note,) = notes
    assert "row 1 has 'good' in the column of that name" in note
    assert "holds 'x'" in read("a,\n1,x\n2,y\n")[1][0]
