"""spectune data"""

import json

import pytest
from typer.testing import CliRunner

from spectune.cli import app
from spectune.errors import SpectuneError
from training.folder import save_folder

RUNNER = CliRunner()


@pytest.fixture
def place(tmp_path):
    save_folder(tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "ahoy " * n}]}
            for n in (1, 1, 2, 3, 4)]  # fmt: skip
    rows.append({"messages": [{"role": "user", "content": "say " * 20}, {"role": "assistant", "content": "ahoy"}]})
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "dev.jsonl").write_text(json.dumps(rows[0]))
    return tmp_path


def run(place, *more):
    result = RUNNER.invoke(app, ["data", str(place / "chats.jsonl"), "-m", str(place / "model"), *more])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_what_is_learned_cut_left_out_repeated_and_in_both_parts(place):
    document = json.loads(run(place, "max_length=10", f"eval_data={place / 'dev.jsonl'}", "--json"))
    part = document["training"]
    assert (part["records"], part["repeated"], part["dropped"], document["leaks"]) == (6, 1, 1, 1)
    assert part["first_dropped"] == [
        {"where": f"{place / 'chats.jsonl'}, line 6", "why": "its answer begins at token 26 of 10"}
    ]
    assert part["lengths"] == {"least": 8, "median": 9.5, "95%": 27, "most": 27}
    assert (part["cut"], part["first_cut"][0]["tokens"]) == (1, 11)
    pieces = document["examples"][0]["examples"][0]["pieces"]
    assert "".join(piece["text"] for piece in pieces if piece["learned"]).split() == ["ahoy", "</s>"]
    assert document["held_out"]["records"] == 1


def test_the_terminal_and_the_page(place):
    told = run(place, "--show", "1", "--out", str(place / "chats.html"), f"eval_data={place / 'dev.jsonl'}")
    assert "to learn from: 6 records, 6 examples" in told
    assert "1 of 6 training records are repeated" in told
    page = (place / "chats.html").read_text()
    assert "<mark>" in page
    assert "ahoy" in page
    assert "held-out records are in the training data too" in page


def test_labels(place):
    rows = [{"text": "say one", "label": label} for label in "aab"]
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    document = json.loads(run(place, "--task", "classify", "held_out=0", "--json"))
    assert document["training"]["labels"] == {"a": 2, "b": 1}


def test_mistakes(place):
    with pytest.raises(SpectuneError, match="draws its answers itself"):
        run(place, "--task", "reinforce", "reward=a:b")
    with pytest.raises(SpectuneError, match=r"did you mean 'chats\.jsonl'"):
        RUNNER.invoke(app, ["data", str(place / "chat.jsonl"), "-m", "x"], catch_exceptions=False)
