"""Incremental detokenization: token ids to text as they arrive, in whole characters, cut before the first stop string.

    detokenizer = IncrementalDetokenizer(tokenizer.decode, stop=["END"])
    detokenizer.add(id)   # "A"  this token's text is certain
    detokenizer.add(id)   # ""   "E" may be the beginning of "END", so it is held back
    detokenizer.add(id)   # "EX" it was not

Streamed and whole replies both pass through here, so they have the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what tokenizers make of a character's first bytes while its last ones are in the next token
_MOST_INCOMPLETE_TOKENS = 16  # no character has more tokens, so such bytes are invalid and are passed on


class IncrementalDetokenizer:
    """Text of one reply from its token ids, ended before the first of the strings `stop`. `decode` turns ids into text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._searches = [_StopSearch(text) for text in stop if text]
        self._ids: list[int] = []
        self._converted = 0  # ids whose text is in `_held_back` or was returned
        self._context = 0  # decoding starts here: some tokenizers write a word differently at the start of a text
        self._held_back = ""
        self.length = 0  # characters so far, including those held back or cut off
        self.stopped = False

    def add(self, id: int) -> str:
        """Adds a token and returns the text that is now certain. Sets `stopped` once a stop string has been met."""
        if self.stopped:
            return ""
        self._ids.append(id)
        return self._certain_text(self._new_text(final=False), final=False)

    def end(self) -> str:
        """The rest of the text, which was held back, once there are no more tokens."""
        return "" if self.stopped else self._certain_text(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._converted])
        text = self._decode(self._ids[self._context :])
        is_incomplete = text.endswith(_INCOMPLETE) and len(self._ids) - self._converted <= _MOST_INCOMPLETE_TOKENS
        if (is_incomplete and not final) or len(text) <= len(before):
            if text == before and len(self._ids) - self._converted > _MOST_INCOMPLETE_TOKENS:
                del self._ids[self._converted :]  # special tokens, which have no text, whatever comes after them
            return ""
        self._context, self._converted = self._converted, len(self._ids)
        self.length += len(text) - len(before)
        return text[len(before) :]

    def _certain_text(self, new: str, *, final: bool) -> str:
        before = len(self._held_back)
        self._held_back += new
        starts = [before + place for search in self._searches if (place := search.begin_in(new)) is not None]
        if starts:
            self.stopped = True
            return self._held_back[: min(starts)]
        matched = max((search.matched for search in self._searches), default=0)
        certain = len(self._held_back) if final else len(self._held_back) - matched
        text, self._held_back = self._held_back[:certain], self._held_back[certain:]
        return text


class _StopSearch:
    """Search for one stop string in text that arrives in pieces (Knuth, Morris, Pratt 1977).

    A character costs a few comparisons, however long the string is, so that one request's stop string does not slow down others.
    `matched` is how many characters at the end of the text are the beginning of the string.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._borders = [0]  # for each prefix that has matched so far, the length of its longest proper border
        self.matched = 0

    def begin_in(self, new: str) -> int | None:
        """Feeds the next characters of the text; returns where the string begins once it is complete, else None.

        The place is counted from the first character of `new`: it is negative if the string began in an earlier piece.
        """
        for place, character in enumerate(new):
            self.matched = self._longest_prefix(self.matched, character)
            if self.matched == len(self._pattern):
                return place + 1 - self.matched
            if self.matched > len(self._borders):
                self._borders.append(self._longest_prefix(self._borders[-1], character))
        return None

    def _longest_prefix(self, length: int, character: str) -> int:
        """Length of the longest prefix of the string that ends with `character`, where one of `length` characters came before."""
        while length and self._pattern[length] != character:
            length = self._borders[length - 1]
        return length + (self._pattern[length] == character)
