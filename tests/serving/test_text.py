"""Text from tokens: characters and stop strings that several tokens make are never sent by halves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.servers import SAID, byte_tokenizer, words
from spectune.serving.text import TextStream, token_bytes

BYTES = byte_tokenizer()


def pieces(tokenizer, tokens, stops=(), prompt=()):
    """Return what a stream gives for each token and at its end, up to a stop."""
    stream, found = TextStream(tokenizer, prompt, stops), []
    for token in tokens:
        found.append(stream.add(token))
        if stream.stopped:
            return found
    return [*found, stream.end()]


def ids(text):
    return BYTES(text, add_special_tokens=False)["input_ids"]


def test_no_piece_has_half_a_character():
    found = pieces(BYTES, ids(SAID))
    assert "".join(found) == SAID
    assert not any("\ufffd" in piece for piece in found)


@settings(max_examples=40)
@given(st.text(min_size=1, max_size=30))
def test_pieces_are_the_text(text):
    assert "".join(pieces(BYTES, ids(text))) == text


def test_a_character_that_is_cut_off_is_left_out():
    assert "".join(pieces(BYTES, ids("ahoy ⚓")[:-1])) == "ahoy "


def test_bytes_that_are_no_text_go_by():
    wild = [token for _ in range(20) for token in (BYTES.convert_tokens_to_ids("ÿ"), *ids("a"))]
    found = "".join(pieces(BYTES, wild))
    assert found.replace("\ufffd", "") == "a" * 20
    run = [BYTES.convert_tokens_to_ids("ÿ")] * 50
    assert len("".join(pieces(BYTES, run))) >= 40  # not held for ever


@pytest.mark.parametrize("stop", ["STOP", "STOP and", " 🏴‍☠️ STOP", "d", "ST"])
def test_nothing_of_a_stop_string_is_sent(stop):
    found = pieces(BYTES, ids(SAID), [stop])
    assert "".join(found) == SAID[: SAID.index(stop)]


@given(st.text("ab", min_size=1, max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stops_cut_where_the_first_of_them_is_complete(text, stops):
    found = "".join(pieces(BYTES, ids(text), stops))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first = min((end for end, _ in ends), default=None)
    expected = text if first is None else text[: min(at for end, at in ends if end == first)]
    assert found == expected


def test_what_looked_like_a_stop_is_sent_after_all():
    assert "".join(pieces(BYTES, ids("STO-STOR"), ["STOP"])) == "STO-STOR"


def test_text_goes_on_from_the_prompt():
    tokenizer = words()
    prompt, more = ([tokenizer.convert_tokens_to_ids(w) for w in text.split()] for text in ("one two", "three four"))
    assert "".join(pieces(tokenizer, more, (), prompt)) == " three four"


def test_bytes_of_tokens():
    assert b"".join(token_bytes(BYTES, token) for token in ids(SAID)) == SAID.encode()
    assert token_bytes(BYTES, 10**6) == b""
