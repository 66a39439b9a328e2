"""Words of rows, hashes of their n-grams, digests and shingles, for deduplication and decontamination."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apprentice.data.sampling.permutation import Keys, Numbers, mix

MIN_WORDS = 4  # least words of a row that is shorter than an n-gram and is compared as a whole
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: no factor in common with 2**64


def words_of(row: Mapping[str, Any], *, only_texts: bool = False) -> list[list[str]]:
    """The words of every text in the row, and of every number unless `only_texts`: lower case, no punctuation, one list a text."""
    return [_WORD.findall(text.lower()) for name in sorted(row) for text in _leaves(row[name], only_texts)]


def _leaves(value: Any, only_texts: bool) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _leaves(value[key], only_texts)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for part in value:
            yield from _leaves(part, only_texts)
    elif not only_texts and value is not None:
        yield str(value)


def ngrams(rows: Sequence[Sequence[Sequence[str]]], length: int) -> tuple[Keys, Numbers, Numbers]:
    """(hash, index of the row, index of its first word among the row's words) of every n-gram of `length` words of every text.

    A row with fewer words than `length`, but at least `MIN_WORDS`, has one n-gram: all its words. Hashes (uint64) of equal words
    are equal in every process.
    """
    parts: list[tuple[Keys, Numbers, Numbers]] = []
    texts: list[list[str]] = []
    places: list[tuple[int, int]] = []  # (row, place of the first word) of each text
    for number, row in enumerate(rows):
        if sum(map(len, row)) < length:
            whole = [word for text in row for word in text]
            if len(whole) >= MIN_WORDS:
                parts.append((_hash_windows(_hash_words(whole), len(whole)), np.array([number]), np.array([0])))
            continue
        place = 0
        for text in row:
            if len(text) >= length:
                texts.append(list(text))
                places.append((number, place))
            place += len(text)
    if texts:
        sizes = np.array([len(text) for text in texts])
        ends = np.cumsum(sizes)
        within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        usable = np.flatnonzero(within <= np.repeat(sizes, sizes) - length)  # windows that do not run into the next text
        hashes = _hash_windows(_hash_words([word for text in texts for word in text]), length)[usable]
        owner, first = np.repeat(np.array(places, np.int64), sizes, axis=0)[usable].T
        parts.append((hashes, owner, first + within[usable]))
    if not parts:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    hashes, owners, starts = (np.concatenate(part) for part in zip(*parts, strict=True))
    return hashes, owners, starts


def digest(row: Sequence[Sequence[str]]) -> int:
    """A 64-bit hash of all words of a row, for exact duplicates; 0 for a row without texts."""
    flat = [word for text in row for word in (*text, "\x1f")]
    return int(_hash_windows(_hash_words(flat), len(flat))[0]) if flat else 0


def shingles(row: Sequence[Sequence[str]], length: int = 3) -> list[bytes]:
    """Every `length` consecutive words, or the single words where there are fewer; MinHash compares the sets of these."""
    words = [word for text in row for word in text]
    if len(words) < length:
        return [word.encode() for word in words]
    return [" ".join(words[start : start + length]).encode() for start in range(len(words) - length + 1)]


def _hash_words(words: Sequence[str]) -> Keys:
    return mix(np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words)))


def _hash_windows(hashes: Keys, length: int) -> Keys:
    """The polynomial hash of every `length` consecutive word hashes."""
    count = len(hashes) - length + 1
    total = np.zeros(count, np.uint64)
    for offset in range(length):
        total = total * _BASE + hashes[offset : offset + count]
    mixed: NDArray[np.uint64] = mix(total)
    return mixed
