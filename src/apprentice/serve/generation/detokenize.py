"""Incremental detokenization: token ids to text as they arrive, in whole characters, cut before the first stop string.

    text = TextStream(tokenizer.decode, stop=["END"])
    text.add(id)   # "A"  this token's text is certain
    text.add(id)   # ""   "E" may be the beginning of "END", so it is held back
    text.add(id)   # "EX" it was not

Streamed and whole replies both pass through here, so they have the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what tokenizers make of a character's first bytes while its last ones are in the next token
_MOST_UNFINISHED = 16  # tokens; no character has more, so such bytes are invalid and are passed on


class TextStream:
    """Text of one reply from its token ids, ended before the first of the strings `stop`. `decode` turns ids into text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._searches = [_Search(text) for text in stop if text]
        self._ids: list[int] = []
        self._given = 0  # ids whose text is in `_held` or was returned
        self._context = 0  # decoding starts here: some tokenizers write a word differently at the start of a text
        self._held = ""
        self.length = 0  # characters so far, including those held back or cut off
        self.stopped = False

    def add(self, id: int) -> str:
        """Adds a token and returns the text that is now certain. Sets `stopped` once a stop string has been met."""
        if self.stopped:
            return ""
        self._ids.append(id)
        return self._pass_on(self._new_text(final=False), final=False)

    def end(self) -> str:
        """The rest of the text, which was held back, once there are no more tokens."""
        return "" if self.stopped else self._pass_on(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._given])
        text = self._decode(self._ids[self._context :])
        held_back = text.endswith(_UNFINISHED) and len(self._ids) - self._given <= _MOST_UNFINISHED
        if (held_back and not final) or len(text) <= len(before):
            if text == before and len(self._ids) - self._given > _MOST_UNFINISHED:
                del self._ids[self._given :]  # special tokens, which have no text, whatever comes after them
            return ""
        self._context, self._given = self._given, len(self._ids)
        self.length += len(text) - len(before)
        return text[len(before) :]

    def _pass_on(self, new: str, *, final: bool) -> str:
        before = len(self._held)
        self._held += new
        found = [before + place for search in self._searches if (place := search.begin_in(new)) is not None]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        begun = max((search.matched for search in self._searches), default=0)
        certain = len(self._held) if final else len(self._held) - begun
        passed, self._held = self._held[:certain], self._held[certain:]
        return passed


class _Search:
    """Search for one stop string in text that arrives in pieces (Knuth, Morris, Pratt 1977).

    A character costs a few comparisons, however long the string is, so that one request's stop string does not slow down others.
    `matched` is how many characters at the end of the text are the beginning of the string.
    """

    def __init__(self, sought: str) -> None:
        self._sought = sought
        self._borders = [0]  # for each prefix that has matched so far, the length of its longest proper border
        self.matched = 0

    def begin_in(self, new: str) -> int | None:
        """Feeds the next characters of the text; returns where the string begins once it is complete, else None.

        The place is counted from the first character of `new`: it is negative if the string began in an earlier piece.
        """
        for place, character in enumerate(new):
            self.matched = self._longer(self.matched, character)
            if self.matched == len(self._sought):
                return place + 1 - self.matched
            if self.matched > len(self._borders):
                self._borders.append(self._longer(self._borders[-1], character))
        return None

    def _longer(self, length: int, character: str) -> int:
        """Length of the longest prefix of the string that ends with `character`, where one of `length` characters came before."""
        while length and self._sought[length] != character:
            length = self._borders[length - 1]
        return length + (self._sought[length] == character)
