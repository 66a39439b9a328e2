"""Cells of a table of pure text, such as CSV, which keep both their text and the value that it spells.

Templates print a cell as it was written, such as `00001` or `1.10`. The expressions `label` and `keep` count and compare, so
they see the number or truth value that the cell spells.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[+-]?(?:\d{1,18}(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)  # more digits are a code and no amount
_TRUTHS = {"true": True, "false": False}
_NOTHING = frozenset(["", "NA", "N/A", "n/a", "NULL", "null", "NaN", "nan"])


class Cell(str):
    """The text of one cell."""

    __slots__ = ()

    @property
    def value(self) -> int | float | bool | str | None:
        """The number or truth value that the cell spells; None for an empty cell or a word such as `NA`; else its text."""
        text = self.strip()
        if text in _NOTHING:
            return None
        if match := _NUMBER.fullmatch(text):
            return float(text) if "." in text or match[2] else int(text)
        return _TRUTHS.get(text.lower(), str(self))

    @property
    def spells(self) -> bool:
        """True if the cell spells something other than text."""
        return not isinstance(self.value, str)

    def __reduce__(self) -> tuple[type[Cell], tuple[str]]:
        return type(self), (str(self),)
