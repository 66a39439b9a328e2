"""Filters and tests for templates: reviewed ones of Jinja and our own, each charged to the rendering's budget (`budget.py`)."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import jinja2
from jinja2.filters import (
    FILTERS,
    do_batch,
    do_int,
    do_replace,
    do_round,
    make_attrgetter,
    sync_do_join,
    sync_do_slice,
    sync_do_sum,
)
from jinja2.tests import TESTS

from apprentice.tasks.templates.budget import CHARACTERS, charged_list, check_text, cost, random_item, size, spend, within_bits

MAX_REPEAT = 100_000  # characters or items that `*`, `range`, `batch` and `slice` may build
_MAX_PLACES = 100  # decimal places of `round`
_MAX_DIGITS = 1000  # of a text that `int` reads
_NAMES = (
    "abs batch capitalize count d default dictsort e escape first float groupby int items join last length list lower map max min"
    " reject rejectattr replace reverse round select selectattr slice sort string sum title trim truncate unique upper wordcount"
)
_UNSEEN = (  # these filters pass on the items of their arguments without reading them
    "batch choice count d default first items last length list map random reject rejectattr reverse select selectattr slice"
)
_SHALLOW = frozenset(_UNSEEN.split())
_PRINTING = frozenset(["string", "e", "escape", "replace", "title", "trim", "upper", "lower", "capitalize"])
_SORTING = frozenset(["dictsort", "groupby", "max", "min", "most_frequent", "sort", "unique"])


def _metered(call: Callable[..., Any], name: str, *, prints: bool) -> Callable[..., Any]:
    """`call`, charged by the size of its arguments: shallow for filters in `_SHALLOW`, else with all nested parts.

    With `prints`, a first argument that has no text form is refused.
    """
    first = 1 if hasattr(call, "jinja_pass_arg") else 0  # Jinja passes its context or environment first

    @functools.wraps(call)
    def metered(*arguments: Any, **options: Any) -> Any:
        arguments = tuple(charged_list(argument) if hasattr(argument, "__next__") else argument for argument in arguments)
        weigh = size if name in _SHALLOW else cost
        work = sum(weigh(argument) for argument in (*arguments[first:], *options.values()))
        spend(1 + work * (work.bit_length() if name in _SORTING else 1))
        if prints:
            check_text(arguments[first])
        return call(*arguments, **options)

    return metered


def _join(eval_context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    items = charged_list(value)
    spend(len(items) * len(str(d)) // CHARACTERS)
    get = make_attrgetter(eval_context.environment, attribute) if attribute is not None else lambda item: item
    for item in items:
        check_text(get(item))
    return str(sync_do_join(eval_context, items, d, attribute))


def _replace(eval_context: Any, s: str, old: str, new: str, count: int | None = None) -> str:
    spend(str(s).count(str(old)) * len(str(new)) // CHARACTERS)
    return str(do_replace(eval_context, s, old, new, count))


def _round(value: float, precision: int = 0, method: Literal["common", "ceil", "floor"] = "common") -> float:
    if abs(precision) > _MAX_PLACES:
        raise jinja2.TemplateRuntimeError(f"'round' has at most {_MAX_PLACES} places")
    return do_round(value, precision, method)


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    if isinstance(value, str | bytes) and len(value) > _MAX_DIGITS:
        raise jinja2.TemplateRuntimeError(f"'int' reads at most {_MAX_DIGITS} digits")
    number = int(do_int(value, default, base))
    within_bits(number)
    return number


def _sum(environment: Any, iterable: Any, attribute: Any = None, start: float = 0) -> Any:
    if not isinstance(start, int | float):
        raise jinja2.TemplateRuntimeError("'sum' adds numbers, and begins with one")
    return sync_do_sum(environment, iterable, attribute, start)


def _batch(value: Any, linecount: int, fill_with: Any = None) -> list[Any]:
    if linecount > MAX_REPEAT:
        raise jinja2.TemplateRuntimeError("'batch' would build something too large")
    items = charged_list(value)
    spend(len(items) + max(0, linecount))
    return list(do_batch(items, linecount, fill_with))


def _slice(value: Any, slices: int, fill_with: Any = None) -> list[Any]:
    items = charged_list(value)
    if slices > MAX_REPEAT:
        raise jinja2.TemplateRuntimeError("'slice' would build something too large")
    spend(len(items) + 2 * max(0, slices))
    return list(sync_do_slice(items, slices, fill_with))


def _format(text: str, *values: Any) -> str:
    """`text % values`, with padding to at most 99 characters."""
    if re.search(r"%[^a-zA-Z%]*(\d{3}|\*)", text):
        raise jinja2.TemplateRuntimeError("'format' would pad text with more than 99 characters")
    for value in values:
        check_text(value)
    return str(text) % values


def _most_frequent(items: Any) -> list[Any]:
    """The most frequent items, in the order of their first occurrence."""
    counts = Counter(charged_list(items))
    most = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == most]


@jinja2.pass_context  # keeps Jinja from folding a draw from a constant list into a constant
def _drawn(context: Any, items: Any) -> Any:
    return random_item(items)


_OWN: dict[str, Callable[..., Any]] = {
    "batch": _batch,
    "format": _format,
    "int": _int,
    "join": jinja2.pass_eval_context(_join),
    "replace": jinja2.pass_eval_context(_replace),
    "round": _round,
    "slice": _slice,
    "sum": jinja2.pass_environment(_sum),
}


def metered(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The filters by name, each charged to the budget."""
    return {name: _metered(call, name, prints=name in _PRINTING) for name, call in filters.items()}


KNOWN_FILTERS = metered({name: FILTERS[name] for name in _NAMES.split()} | _OWN)
DRAWING_FILTERS = metered({"choice": _drawn, "random": _drawn, "most_frequent": _most_frequent})  # PromptSource's
KNOWN_TESTS = {name: _metered(call, name, prints=False) for name, call in cast("dict[str, Callable[..., Any]]", TESTS).items()}
