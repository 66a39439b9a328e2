"""Token ids to text as they come: whole characters only, and nothing of a stop string.

Knows nothing of engines or HTTP. A streamed reply and a whole one pass through here alike, so they read the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # how tokenizers decode the first bytes of a character whose last ones are in the next token
_MOST_UNFINISHED = 16  # tokens; no character has so many, so what is held back then is rubbish and may go out


class TextStream:
    """Text from ids, with the exact stop strings `stop` cut off. `decode` turns ids into text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._given = 0  # ids whose text is in `_held` or was given out
        self._context = 0  # decoding starts here: some tokenizers write a word differently at the start of a text
        self._held = ""
        self.stopped = False

    def add(self, id: int) -> str:
        """The text that is certain now. Sets `stopped` once a stop string has been met."""
        if self.stopped:
            return ""
        self._ids.append(id)
        return self._pass_on(self._new_text(final=False), final=False)

    def end(self) -> str:
        """What was held back and now stays as it is."""
        return "" if self.stopped else self._pass_on(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._given])
        text = self._decode(self._ids[self._context :])
        held_back = text.endswith(_UNFINISHED) and len(self._ids) - self._given <= _MOST_UNFINISHED
        if (held_back and not final) or len(text) <= len(before):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text[len(before) :]

    def _pass_on(self, new: str, *, final: bool) -> str:
        self._held += new
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        certain = len(self._held) if final else len(self._held) - self._begun()
        passed, self._held = self._held[:certain], self._held[certain:]
        return passed

    def _begun(self) -> int:
        """Characters at the end of the held text that may be the beginning of a stop string."""
        lengths = (size for text in self._stop for size in range(1, len(text)) if self._held.endswith(text[:size]))
        return max(lengths, default=0)
