"""Records in a file: the same ones, split without a leak, repeated by their weights, and a run over them."""

import json

import pytest

from spectune.errors import SpectuneError
from spectune.training.config import load_config
from spectune.training.data.encoding import Example
from spectune.training.data.rows import Row, same
from spectune.training.data.splitting import copies, repeated, split
from spectune.training.data.spool import Spool, Spooled
from spectune.training.data.store import Store, _Growing
from spectune.training.tasks import make_task


def spooled(rows):
    spool = Spool()
    for number, values in enumerate(rows):
        spool.append(Row(values, f"line {number}", {"prompt": "a", "completion": "b"}))
    return spool.all()


def test_records_come_back_as_they_were():
    rows = [{"text": "häl\n"}, {"messages": [{"role": "user", "content": None}]}, {"text": "", "n": 1.5}]
    found = spooled(rows)
    assert [dict(row) for row in found] == rows
    assert [row.where for row in found] == ["line 0", "line 1", "line 2"]
    assert found[1].plain == {"prompt": "a", "completion": "b"}
    assert isinstance(found[1:], Spooled)
    assert [dict(row) for row in found[::2]] == rows[::2]


def test_copies_stay_on_one_side_wherever_they_stand():
    rows = [{"text": f"say {i % 30}"} for i in range(60)]
    found = spooled(rows)
    learned, held = split(found, 0.2, seed=3)
    assert (len(learned), len(held)) == (48, 12)
    assert not {same(row) for row in learned} & {same(row) for row in held}
    assert copies(learned, held) == (24, 0)
    again = split(spooled(rows[::-1]), 0.2, seed=3)[1]
    assert {same(row) for row in again} == {same(row) for row in held}
    assert {same(row) for row in split(found, 0.2, seed=4)[1]} != {same(row) for row in held}
    assert copies(found, held) == (30, 12)


def test_one_kind_of_record_is_never_all_held_out():
    learned, held = split(spooled([{"text": "a"}] * 9 + [{"text": "b"}]), 0.5, seed=0)
    assert len(learned) > 0
    assert len(learned) + len(held) == 10


def test_weights_are_of_the_source(tmp_path):
    for name in ("a", "b"):
        rows = [{"text": f"{name} {i}"} for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"data=[{tmp_path}/a.jsonl, {{path: {tmp_path}/b.jsonl, weight: 2.5}}]"
    found = {}
    for streaming in ("true", "false"):
        config = load_config(None, ["model=m", data, "output=o", f"streaming={streaming}", "held_out=0"])
        records, held = make_task(config).read()
        assert not held
        found[streaming] = sorted(record["text"] for record in records)
    assert found["true"] == found["false"]
    assert 30 < len(found["true"]) < 40
    assert isinstance(repeated(spooled([{"text": "a"}]), 0), Spooled)


def test_what_json_cannot_hold_is_named():
    with pytest.raises(SpectuneError, match="line 0: streaming keeps records as JSON, and Object of type bytes"):
        spooled([{"text": b"a"}])


def test_tasks_that_look_at_all_records_refuse():
    with pytest.raises(SpectuneError, match="task: classify looks at all records at once: leave streaming out"):
        load_config(None, ["model=m", "data=d", "output=o", "streaming=true", "task=classify"])


def test_many_tokens_go_to_a_file(monkeypatch):
    monkeypatch.setattr("spectune.training.data.store._IN_MEMORY", 10)
    growing = _Growing("i")
    for start in range(0, 100, 7):
        growing.add(range(start, start + 7))
    assert growing.tensor().tolist() == [*range(105)]
    examples = [[_example(n)] for n in range(1, 30)]
    assert [*Store.of(examples, list)] == examples


def _example(size):
    return Example([*range(size)], [i % 3 == 1 for i in range(size)])
