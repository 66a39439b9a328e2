"""Budget of a reply's thought: once it has that many tokens, the chat template's closing text is forced and the answer follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

import numpy as np

from apprentice.inference.generation_request import Constraint
from apprentice.serve.generation.replies.reply_parts import PartReader

_TAIL = 24  # last tokens of a thought in which its closing text is looked for; no tokenizer cuts a tag into more


class _Place(Enum):
    """Where a reply is: before it is known whether it thinks, in its thought, in the forced closing text, or behind all that."""

    START, THOUGHT, CLOSING, ANSWER = auto(), auto(), auto(), auto()


class ThoughtBudget:
    """Constraint on one reply, read by `reader`, whose thought has at most `budget` tokens; `form` constrains it besides.

    The tags around a thought are not counted. `vocabulary` is the number of token ids. A reply that does not begin with a thought
    is left as it is.
    """

    def __init__(self, reader: PartReader, budget: int, vocabulary: int, form: Constraint | None = None) -> None:
        thoughts = reader.layout.reply_syntax.thoughts
        assert thoughts is not None, "only templates with thoughts have budgets of them"
        self._opening, self._closing_text = thoughts.opening.strip(), thoughts.closing.strip()
        self._closing_ids = reader.layout.tokenizer.encode(thoughts.closing)
        self._decode: Callable[[Sequence[int]], str] = reader.decode()
        self._budget, self._form = budget, form
        self._everything = np.ones(vocabulary, dtype=bool)
        self._ids: list[int] = []  # of the opening, then of the thought
        self._forced: list[int] = []  # what is left of the closing text
        self._place = _Place.START
        if reader.is_in_thought:
            self._enter_thought()

    def allowed(self) -> np.ndarray:
        """Mask (vocabulary,) of the token ids that may come next."""
        if self._place is _Place.CLOSING:
            only = np.zeros_like(self._everything)
            only[self._forced[0]] = True
            return only
        return self._everything if self._form is None else self._form.allowed()

    def accept(self, id: int) -> None:
        """Advances by the token `id`."""
        if self._form is not None:
            self._form.accept(id)
        if self._place is _Place.CLOSING:
            self._forced.pop(0)
            self._place = _Place.CLOSING if self._forced else _Place.ANSWER
        elif self._place is not _Place.ANSWER:
            self._ids.append(id)
            self._look_for_opening() if self._place is _Place.START else self._look_for_closing()

    def _look_for_opening(self) -> None:
        text = self._decode(self._ids).lstrip()
        if text.startswith(self._opening):
            self._enter_thought()
        elif not self._opening.startswith(text):
            self._place = _Place.ANSWER

    def _enter_thought(self) -> None:
        self._ids = []
        self._place = _Place.THOUGHT if self._budget else _Place.CLOSING
        self._forced = list(self._closing_ids)

    def _look_for_closing(self) -> None:
        if self._closing_text in self._decode(self._ids[-_TAIL:]):
            self._place = _Place.ANSWER
        elif len(self._ids) >= self._budget:
            self._place = _Place.CLOSING
