"""Whole characters only, and nothing of a stop string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import SupportsIndex

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from apprentice.serve.generation.detokenize import IncrementalDetokenizer


def of_bytes(ids: Sequence[int]) -> str:
    """A byte-level tokenizer's decoding, one byte a token."""
    return bytes(ids).decode(errors="replace")


def words(ids: Sequence[int]) -> str:
    """A tokenizer that drops the space at the start of a text, as SentencePiece ones do."""
    return "".join((" alpha", " beta", "ta", " gamma")[id] for id in ids).removeprefix(" ")


def pieces(text: bytes, stop: Sequence[str] = ()) -> list[str]:
    stream = IncrementalDetokenizer(of_bytes, stop)
    return [*(stream.add(byte) for byte in text), stream.end()]


def test_characters_come_whole() -> None:
    assert pieces("aé🙂b".encode()) == ["a", "", "é", "", "", "", "🙂", "b", ""]


def test_what_never_becomes_a_character_comes_in_the_end() -> None:
    assert pieces(b"a\xf0\x9f") == ["a", "", "", "\ufffd"]
    rubbish = pieces(b"\xff" * 40)
    assert "".join(rubbish) == "\ufffd" * 40
    assert max(map(len, rubbish)) <= 17


def test_words_keep_their_spaces() -> None:
    stream = IncrementalDetokenizer(words)
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
    stream = IncrementalDetokenizer(of_bytes, stop)
    for byte in text.encode():
        stream.add(byte)
    assert stream.stopped is (expected not in (text,))


class Counted(str):
    """A text that counts the characters that are taken out of it."""

    taken = 0

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        part = super().__getitem__(key)
        Counted.taken += len(part)
        return part


def test_a_stop_string_costs_what_is_held_back_and_not_its_length() -> None:
    """Each character of the reply is compared with a stop string's a few times, however long that is."""
    for stop, reply in (("b" * 2000, "a" * 500), ("a" * 2000, "a" * 500), ("aab" * 700, "aa" * 250)):
        Counted.taken = 0
        assert "".join(pieces(reply.encode(), [Counted(stop)])) == reply
        assert Counted.taken <= 4 * len(reply)


@pytest.mark.parametrize("stop", [["aab"], ["abab", "bb"], ["aabaa", "ba"], ["aaaa"]])
def test_a_stop_string_is_found_wherever_it_begins(stop: list[str]) -> None:
    for letters in itertools.product("ab", repeat=9):
        text = "".join(letters)
        ends = [place + len(each) for each in stop if (place := text.find(each)) >= 0]
        if not ends:
            assert "".join(pieces(text.encode(), stop)) == text
        else:  # the first that is whole; of two that end together the one that begins first
            begins = min(min(ends) - len(each) for each in stop if text[: min(ends)].endswith(each))
            assert "".join(pieces(text.encode(), stop)) == text[:begins]


def test_tokens_without_text_are_not_decoded_again_for_ever() -> None:
    """A reply of special tokens, which have no text, decodes a bounded number of ids a step."""
    most = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal most
        most = max(most, len(ids))
        return "".join(chr(id) for id in ids if id)

    stream = IncrementalDetokenizer(decode)
    assert "".join(stream.add(id) for id in [97, *[0] * 500, 98]) == "ab"
    assert most < 50


def test_the_librarys_stream_loses_the_start_of_a_character_that_a_reply_ends_in() -> None:
    """`DecodeStream` cannot be told that no token comes any more; once it can, it may take the detokenizer's place."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: id for id, letter in enumerate(sorted(letters))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = tokenizer.encode("a🙂").ids[:3]  # `max_tokens` cuts the emoji

    ours = IncrementalDetokenizer(lambda ids: str(tokenizer.decode(list(ids))))
    assert "".join([*map(ours.add, ids), ours.end()]) == tokenizer.decode(ids) == "a\ufffd"
    stream = DecodeStream(skip_special_tokens=True)
    assert "".join(stream.step(tokenizer, id) or "" for id in ids) == "a"
