"""Whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from apprentice.serve.text import TextStream


def of_bytes(ids: Sequence[int]) -> str:
    """A byte-level tokenizer's decoding, one byte a token."""
    return bytes(ids).decode(errors="replace")


def words(ids: Sequence[int]) -> str:
    """A tokenizer that drops the space at the start of a text, as SentencePiece ones do."""
    return "".join((" alpha", " beta", "ta", " gamma")[id] for id in ids).removeprefix(" ")


def pieces(text: bytes, stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(of_bytes, stop)
    return [*(stream.add(byte) for byte in text), stream.end()]


def test_characters_come_whole() -> None:
    assert pieces("aé🙂b".encode()) == ["a", "", "é", "", "", "", "🙂", "b", ""]


def test_what_never_becomes_a_character_comes_in_the_end() -> None:
    assert pieces(b"a\xf0\x9f") == ["a", "", "", "\ufffd"]
    rubbish = pieces(b"\xff" * 40)
    assert "".join(rubbish) == "\ufffd" * 40
    assert max(map(len, rubbish)) <= 17


def test_words_keep_their_spaces() -> None:
    stream = TextStream(words)
    assert [stream.add(id) for id in (0, 1, 2, 3)] == ["alpha", " beta", "ta", " gamma"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one tw", ["two"], "one tw"),
        ("one tone two", ["two", "one"], ""),
        ("a\n\nb", ["\n\n"], "a"),
        ("ababac", ["abac"], "ab"),
        ("abc", ["", "x"], "abc"),
    ],
)
def test_stop_strings(text: str, stop: list[str], expected: str) -> None:
    parts = pieces(text.encode(), stop)
    assert "".join(parts) == expected
    stream = TextStream(of_bytes, stop)
    for byte in text.encode():
        stream.add(byte)
    assert stream.stopped is (expected not in (text,))
