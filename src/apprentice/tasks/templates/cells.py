"""Cells of a table that is text alone, such as CSV: what was written stays, and what it spells is known where it is asked for.

Templates print a cell as it was written, `00001` and `1.10` too. A `label` or `keep` counts and compares, so it sees the number or
the truth value that a cell spells.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[+-]?(?:\d{1,18}(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)  # longer ones are codes, not amounts
_TRUTHS = {"true": True, "false": False}
_NOTHING = frozenset(["", "NA", "N/A", "n/a", "NULL", "null", "NaN", "nan"])


class Cell(str):
    """The text of one cell."""

    __slots__ = ()

    @property
    def value(self) -> int | float | bool | str | None:
        """The number or truth value that the cell spells, None where it says that there is none, or else its text."""
        text = self.strip()
        if text in _NOTHING:
            return None
        if found := _NUMBER.fullmatch(text):
            return float(text) if "." in text or found[2] else int(text)
        return _TRUTHS.get(text.lower(), str(self))

    @property
    def spells(self) -> bool:
        """True if it is more than text."""
        return not isinstance(self.value, str)

    def __reduce__(self) -> tuple[type[Cell], tuple[str]]:
        return type(self), (str(self),)
