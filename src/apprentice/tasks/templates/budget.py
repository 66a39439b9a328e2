"""Budget of one rendering: limits on the work that a template may do and on the text that it may build.

Work is counted in steps; a step is about one iteration of an empty loop. Copying, comparing, hashing or printing a value costs
steps by its size: a text one for every 16 characters, a list or mapping one for each item plus the item's own cost.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import random
import threading
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

import jinja2

from apprentice.tasks.templates.printing import text_of

MAX_WORK = 1_000_000  # steps of one rendering
CHARACTERS = 16  # characters that cost one step
MAX_BITS = 4096  # most bits of an integer
MAX_DEPTH = 100  # deepest nesting of lists
_CONTAINERS: Any = list | tuple | set | frozenset | KeysView | ValuesView | ItemsView
_LEAVES = (
    bool | float | bytes | range | decimal.Decimal | datetime.date | datetime.time | datetime.timedelta | jinja2.Undefined | None
)


class _RenderingBudget(threading.local):
    """State of the current rendering in this thread: steps left, and the random generator of its draws."""

    left = MAX_WORK
    values: Mapping[str, Any] = {}
    source = ""
    chance: random.Random | None = None
    python_forms = False

    def start_rendering(self, source: str, values: Mapping[str, Any], *, python_forms: bool = False) -> None:
        """Begins a rendering; with `python_forms`, lists and the like are printed as Python writes them."""
        self.left, self.source, self.values, self.chance = MAX_WORK, source, values, None
        self.python_forms = python_forms

    def spend(self, work: int) -> None:
        self.left -= max(0, work)
        if self.left < 0:
            raise jinja2.TemplateRuntimeError("the template works too long or builds something too large")

    def check_text(self, value: Any) -> None:
        """Raises `PythonForm` for a value that is to be printed and has no text form, unless Python's forms are allowed."""
        if not self.python_forms:
            text_of(value)

    def random_item(self, items: Any) -> Any:
        """A random item of `items`; the seed is a hash of the template and the row, so draws are reproducible."""
        if self.chance is None:
            row = json.dumps(dict(self.values), sort_keys=True, default=str)
            self.chance = random.Random(hashlib.blake2b(f"{self.source}\n{row}".encode()).digest())
        return self.chance.choice(charged_list(items))


_BUDGET = _RenderingBudget()
start_rendering, spend, random_item, check_text = _BUDGET.start_rendering, _BUDGET.spend, _BUDGET.random_item, _BUDGET.check_text


def weight(value: Any, depth: int = 0) -> int:
    """Steps for copying, comparing, hashing or printing `value` with all nested parts; spends some for looking at them.

    Raises `jinja2.TemplateRuntimeError` for a value that is not plain data (a namespace, a macro), for lists nested more than
    `MAX_DEPTH` deep, and for integers of more than `MAX_BITS` bits.
    """
    if isinstance(value, str):
        return 1 + len(value) // CHARACTERS
    if isinstance(value, int):
        return within_bits(value) and 1
    if value is None or isinstance(value, _LEAVES) or hasattr(value, "__next__"):
        return 1
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if not isinstance(value, _CONTAINERS):
        raise jinja2.TemplateRuntimeError(f"a {type(value).__name__} cannot be shown or compared in a template")
    if depth == MAX_DEPTH:
        raise jinja2.TemplateRuntimeError(f"the template builds lists in lists, more than {MAX_DEPTH} deep")
    spend(4 * len(value))
    return 1 + sum(weight(item, depth + 1) for item in value)


def within_bits(number: int) -> bool:
    """True; raises `jinja2.TemplateRuntimeError` for an integer of more than `MAX_BITS` bits."""
    if number.bit_length() > MAX_BITS:
        raise jinja2.TemplateRuntimeError(f"the template would build something too large: a number of more than {MAX_BITS} bits")
    return True


def cost(value: Any) -> int:
    """The `weight` of an argument; 1 for objects that only templates know, such as a namespace."""
    return weight(value) if isinstance(value, str | int | Mapping | _CONTAINERS) else 1


def size(value: Any) -> int:
    """Steps for a shallow copy of `value`."""
    if isinstance(value, str):
        return 1 + len(value) // CHARACTERS
    return len(value) if isinstance(value, Mapping | range | _CONTAINERS) else 1


def charge(value: Any) -> Any:
    """`value` itself, checked to be printable, after its weight was spent."""
    check_text(value)
    spend(weight(value))
    return value


def charged_list(items: Any) -> list[Any]:
    """The items of any iterable as a list; each is paid for as it is taken."""
    if isinstance(items, str | Mapping | range | _CONTAINERS):
        spend(len(items))
        return list(items)
    charged = []
    for item in items:
        spend(2)
        charged.append(item)
    return charged
