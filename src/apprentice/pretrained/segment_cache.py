"""Tokenization with a cache of text segments: a text between special tokens or blank lines is encoded once and then reused.

Datasets repeat themselves: one passage under five questions, one instruction under a thousand rows, one exemplar in many
prompts. A text is split only where the tokenizer's own rules split it, so that the ids are those of the whole text. With `⏎⏎` as a
border, these two prompts share the cached ids of their first segment:

    Answer from the passage.⏎ │ ⏎Who wrote it?
    Answer from the passage.⏎ │ ⏎When was it written?
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

REMEMBERED_TOKENS = 1 << 22  # cached in each of two generations, four bytes each
_BLANK_LINE = re.compile(r"\n(?<=\S\n)\n(?=\S)")  # begins with a literal, which the search finds many times faster
_PLACES = (1, 2)  # where a blank line may be split: GPT-2's rules split between its two newlines, later ones behind both
_BESIDE = ("a", "B", "7", ".", ",", "”", '"', "'", ":", "-", ")", "(", "é", "字", "ب", "🙂", "_", "<", "|", "s")  # probes


class SegmentCache:
    """Caching encoder over `backend`, a `tokenizers.Tokenizer` whose special tokens are `special`.

    The cache has two generations: when the recent one is full it becomes the older one, and the previous older one is dropped.
    """

    def __init__(self, backend: Any, special: Sequence[Any]) -> None:
        self._backend = backend
        self._special = special
        self._borders = self._find_borders()
        self._place = self._find_place() if self._borders else 0
        self._recent: dict[str, array[int]] = {}
        self._older: dict[str, array[int]] = {}
        self._room = REMEMBERED_TOKENS

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; special tokens in it are recognised, none are added."""
        segments_of_texts = [self._split(text) for text in texts]
        known: dict[str, array[int]] = {}
        new: dict[str, None] = {}
        for parts in segments_of_texts:
            for part in parts:
                if part not in known and part not in new:
                    if (ids := self._recent.get(part) or self._older.get(part)) is None:
                        new[part] = None
                    else:
                        known[part] = ids
        encoded = self._backend.encode_batch_fast(list(new), add_special_tokens=False)
        known.update((part, array("i", encoding.ids)) for part, encoding in zip(new, encoded, strict=True))
        self._remember(known)
        return [_joined([known[part] for part in parts]) for parts in segments_of_texts]

    def _remember(self, segments: dict[str, array[int]]) -> None:
        for part, ids in segments.items():
            if part not in self._recent:
                self._recent[part] = ids
                self._room -= len(ids)
        if self._room < 0:
            self._recent, self._older, self._room = {}, self._recent, REMEMBERED_TOKENS

    def _split(self, text: str) -> list[str]:
        sections = self._borders.split(text) if self._borders else [text]
        if self._place:
            sections = [part for section in sections for part in self._at_blank_lines(section)]
        return [part for part in sections if part]

    def _at_blank_lines(self, text: str) -> list[str]:
        if "\n\n" not in text:
            return [text]
        places = [match.start() + self._place for match in _BLANK_LINE.finditer(text)]
        return [text[start:end] for start, end in pairwise([0, *places, len(text)])]

    def _find_borders(self) -> re.Pattern[str] | None:
        """A pattern for special tokens; None if the tokenizer encodes a text beside them differently from the text alone."""
        special = self._special
        if not special or any(token.normalized or token.lstrip or token.rstrip or token.single_word for token in special):
            return None
        longest_first = sorted((token.content for token in special), key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # Some tokenizers treat the start of a text, or the text behind a special token, differently: no splitting there.
        probe = f"a b{special[0].content}a b\n{special[0].content} c{special[0].content}\nd"
        alone = [id for part in pattern.split(probe) for id in self._ids(part)]
        return pattern if alone == self._ids(probe) else None

    def _find_place(self) -> int:
        """Offset in a blank line at which the pre-tokenizer splits whatever characters are beside it; 0 if there is none."""
        return next((place for place in _PLACES if all(self._parts_at(place, *pair) for pair in product(_BESIDE, _BESIDE))), 0)

    def _parts_at(self, place: int, before: str, after: str) -> bool:
        text = f"x {before}\n\n{after} y"
        border = text.index("\n") + place
        rule = self._backend.pre_tokenizer
        words = rule.pre_tokenize_str(text) if rule else []
        no_merge_reaches_across = any(start == border for _, (start, _) in words)
        return no_merge_reaches_across and self._ids(text) == self._ids(text[:border]) + self._ids(text[border:])

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def _joined(parts: Sequence[array[int]]) -> list[int]:
    ids = array("i")
    for part in parts:
        ids += part
    return ids.tolist()
