"""Words and n-grams of rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from apprentice.data.index.ngrams import digest, ngrams, shingles, words_of

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12)


def test_words_of_a_row() -> None:
    row = {"text": "It's 5 o'clock, ÉTÉ!", "label": 3, "answers": {"text": ["Yes.", "no"], "start": [1]}}
    assert words_of(row) == [["1"], ["yes"], ["no"], ["3"], ["it", "s", "5", "o", "clock", "été"]]
    assert words_of(row, only_texts=True) == [["yes"], ["no"], ["it", "s", "5", "o", "clock", "été"]]


@given(rows=st.lists(st.lists(WORDS, max_size=3), max_size=6))
def test_equal_passages_and_no_others_have_equal_hashes(rows: list[list[list[str]]]) -> None:
    hashes, owners, starts = ngrams(rows, 5)
    passages = {}
    for hash_, owner, start in zip(hashes.tolist(), owners.tolist(), starts.tolist(), strict=True):
        flat = [word for text in rows[owner] for word in text]
        length = 5 if len(flat) >= 5 else len(flat)
        passages[owner, start] = tuple(flat[start : start + length])
        assert passages.setdefault(hash_, passages[owner, start]) == passages[owner, start]
    expected = set()
    for owner, row in enumerate(rows):
        flat, place = [word for text in row for word in text], 0
        if len(flat) == 4:
            expected.add((owner, 0))
        for text in row:
            expected |= {(owner, place + at) for at in range(len(text) - 4)}
            place += len(text)
    assert {key for key in passages if isinstance(key, tuple)} == expected
    assert len({value for key, value in passages.items() if isinstance(key, tuple)}) == len(np.unique(hashes))


def test_hashes_are_the_same_in_every_process() -> None:
    assert ngrams([[["a", "b", "c", "d"]]], 4)[0].tolist() == [1925059669262905930]
    assert digest([["a"], ["b"]]) != digest([["a", "b"]]) != digest([["b", "a"]])
    assert shingles([["a", "b"], ["c", "d"]]) == [b"a b c", b"b c d"]
    assert shingles([["a", "b"]]) == [b"a", b"b"]
