"""The sandbox that templates run in: they cannot reach Python, and cannot work or grow without end.

Every loop, call and filter, and everything that makes longer text or lists out of shorter ones, is paid for out of one
allowance for each rendering; when it is spent the rendering fails. So a stranger's template ends within a second, whatever
it says. Knows nothing of tasks or rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment
from jinja2.visitor import NodeTransformer

from apprentice.tasks.printing import text_of

MAX_WORK = 1_000_000  # of one rendering: steps of loops, calls, and characters in sixteens
MAX_REPEAT = 100_000  # characters or items that `*` and `range` may build
_MAX_BITS = 4096  # of a product of whole numbers
_CHARACTERS = 16  # that cost as much as one step
_FILTERS = (
    "abs batch capitalize count d default dictsort e escape first float groupby int items join last length list lower map max min"
    " reject rejectattr replace reverse round select selectattr slice sort string sum title trim truncate unique upper wordcount"
)
_CALL = 16  # steps that a call costs
_PADDING = frozenset(["center", "expandtabs", "ljust", "rjust", "translate", "zfill"])


class _Allowance(threading.local):
    """What one rendering may still spend, and the chance that its draws come from."""

    left = MAX_WORK
    values: Mapping[str, Any] = {}
    source = ""
    chance: random.Random | None = None
    python_forms = False

    def renew(self, source: str, values: Mapping[str, Any], *, python_forms: bool = False) -> None:
        """Begins a rendering; with `python_forms` lists and the like are printed as Python writes them."""
        self.left, self.source, self.values, self.chance = MAX_WORK, source, values, None
        self.python_forms = python_forms

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise jinja2.TemplateRuntimeError("the template works too long or builds something too large")

    def check_text(self, value: Any) -> None:
        """Raises `PythonForm` for a value that is to be printed and is no text."""
        if not self.python_forms:
            text_of(value)

    def drawn(self, items: Any) -> Any:
        """One of `items`, drawn by the template and the row alone."""
        if self.chance is None:
            row = json.dumps(dict(self.values), sort_keys=True, default=str)
            self.chance = random.Random(hashlib.blake2b(f"{self.source}\n{row}".encode()).digest())
        return self.chance.choice(list(items))


_ALLOWANCE = _Allowance()
renew = _ALLOWANCE.renew


def _weight(value: Any) -> int:
    """What `value` costs to copy or print, nested parts included; pays for looking at them."""
    if isinstance(value, str):
        return 1 + len(value) // _CHARACTERS
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if not isinstance(value, list | tuple | set):
        return 1
    _ALLOWANCE.spend(4 * len(value))
    return 1 + sum(_weight(item) for item in value)


def _paid(value: Any) -> Any:
    _ALLOWANCE.spend(_weight(value))
    _ALLOWANCE.check_text(value)
    return value


def _joined(parts: list[Any]) -> str:
    for part in parts:
        _paid(part)
    return "".join(map(str, parts))


def _steps(items: Any, each: int) -> Any:
    """What a loop goes over, paid for beforehand; a copy, so that it cannot grow under the loop."""
    if isinstance(items, jinja2.Undefined | str | Mapping):
        items = list(items)
    elif not isinstance(items, list | tuple | range):
        items = _bounded(items)
    _ALLOWANCE.spend(len(items) * each)
    return list(items) if isinstance(items, list) else items


def _bounded(items: Any) -> list[Any]:
    found = []
    for item in items:
        _ALLOWANCE.spend(2)
        found.append(item)
    return found


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_REPEAT:
        raise jinja2.TemplateRuntimeError(f"range() has {len(numbers)} numbers, more than {MAX_REPEAT}")
    return numbers


@jinja2.pass_context  # so that a draw from a constant list is not made once and for all while the template is compiled
def _drawn(context: Any, items: Any) -> Any:
    return _ALLOWANCE.drawn(items)


def _most_frequent(items: Any) -> list[Any]:
    """The items that appear most often, in the order in which they come first."""
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]


def _format(text: str, *values: Any) -> str:
    """`text % values`, with no more than two digits of padding."""
    if re.search(r"%[^a-zA-Z%]*(\d{3}|\*)", text):
        raise jinja2.TemplateRuntimeError("'format' would pad text with more than 99 characters")
    return str(text) % values


def _metered(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter that is paid for by the size of what it gets, and by what it will make."""

    @functools.wraps(call)
    def metered(*arguments: Any, **options: Any) -> Any:
        arguments = tuple(_bounded(argument) if hasattr(argument, "__next__") else argument for argument in arguments)
        sized = [argument for argument in arguments if isinstance(argument, str | list | tuple | range | dict)]
        _ALLOWANCE.spend(1 + sum(_weight(argument) if name in _PRINTING else len(argument) for argument in sized))
        texts = [argument for argument in arguments if isinstance(argument, str)]
        if name == "join" and texts and sized:
            _ALLOWANCE.spend(len(sized[0]) * len(texts[-1]) // _CHARACTERS)
        if name == "replace" and len(texts) > 2:
            _ALLOWANCE.spend(texts[0].count(texts[1]) * len(texts[2]) // _CHARACTERS)
        if name in _PRINTING or name == "format":
            _check_printed(name, arguments, options)
        if name in ("batch", "slice", "truncate") and max([n for n in arguments if isinstance(n, int)], default=0) > MAX_REPEAT:
            raise jinja2.TemplateRuntimeError(f"{name!r} would build something too large")
        return call(*arguments, **options)

    return metered


def _check_printed(name: str, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raises `PythonForm` where a filter would print what is no text; its first argument may be Jinja's environment."""
    first, *more = [argument for argument in arguments if not isinstance(argument, jinja2.Environment | nodes.EvalContext)]
    if name == "join":
        attribute = options.get("attribute", more[1] if len(more) > 1 else None)
        get = jinja2.filters.make_attrgetter(STRICT, attribute) if attribute is not None else lambda item: item
        printed = list(map(get, first)) if isinstance(first, list | tuple) else []
    else:
        printed = more if name == "format" else [first]
    for value in printed:
        _ALLOWANCE.check_text(value)


_PRINTING = frozenset(["join", "string", "e", "escape", "replace", "title", "trim", "upper", "lower", "capitalize"])


class _Limits(SandboxedEnvironment):
    """What both sandboxes share: operators and calls that are paid for, and no methods that pad or format."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        length = max((len(side) for side in (left, right) if isinstance(side, str | list | tuple)), default=0)
        number = max((side for side in (left, right) if isinstance(side, int | float)), default=0)
        bits = sum(side.bit_length() for side in (left, right) if isinstance(side, int))
        if operator == "+":
            _ALLOWANCE.spend(1 + length)
        elif operator == "%" and isinstance(left, str):
            raise jinja2.TemplateRuntimeError("'%' does not format text here; join parts with '~'")
        elif length * number > MAX_REPEAT or (operator == "**" and number > 64) or bits > _MAX_BITS:
            raise jinja2.TemplateRuntimeError(f"{operator!r} would build something too large")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(getattr(value, "__self__", None), str):
            raise SecurityError("text cannot be formatted with a method here; join parts with '~'")
        return None

    def call(self, context: Any, obj: Any, /, *arguments: Any, **options: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        _ALLOWANCE.spend(_CALL)
        if isinstance(owner, str | list | tuple | dict):
            _ALLOWANCE.spend(len(owner) // (_CHARACTERS if isinstance(owner, str) else 1))
            if isinstance(owner, str) and name == "replace" and len(arguments) > 1:
                _ALLOWANCE.spend(owner.count(arguments[0]) * len(arguments[1]) // _CHARACTERS)
            if isinstance(owner, str) and name == "join" and arguments:
                arguments = (_bounded(arguments[0]), *arguments[1:])
                _ALLOWANCE.spend(_weight(arguments[0]) + len(arguments[0]) * len(owner) // _CHARACTERS)
        found = super().call(context, obj, *arguments, **options)
        if isinstance(found, str):
            _ALLOWANCE.spend(len(found) // _CHARACTERS)
        return found


class _Strict(ImmutableSandboxedEnvironment, _Limits):
    pass


class _Guard(NodeTransformer):
    """Puts the payments into a parsed template: around what loops go over, what is printed and what is joined."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment

    def _through(self, name: str, node: Any, *more: nodes.Expr) -> nodes.Filter:
        lineno = node.lineno if node is not None else 1
        made = nodes.Filter(node, name, list(more), [], None, None, lineno=lineno)
        return made.set_environment(self.environment)  # type: ignore[return-value]

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (Jinja's name)
        self.generic_visit(node)
        texts = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        each = 1 + texts // _CHARACTERS + sum(1 for _ in node.find_all(nodes.Expr)) // 8
        node.iter = self._through("_steps", node.iter, nodes.Const(each, lineno=node.lineno))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [part if isinstance(part, nodes.TemplateData) else self._through("_paid", part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return self._through("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:  # noqa: N802
        self.generic_visit(node)
        node.filter = self._through("_paid", node.filter)
        return node


def compiled(environment: jinja2.Environment, parsed: nodes.Template) -> jinja2.Template:
    """The template that `parsed` is, with its payments; call `renew` before each rendering of it."""
    code = environment.compile(_Guard(environment).visit(parsed))
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _furnished(environment: jinja2.Environment, filters: Mapping[str, Callable[..., Any]], **names: Any) -> jinja2.Environment:
    """Only the filters and names given here, the filters metered."""
    environment.filters = {name: _metered(call, name) for name, call in filters.items()}
    environment.filters |= {"_paid": _paid, "_steps": _steps, "_joined": _joined}
    environment.globals.clear()
    environment.globals.update(names)
    return environment


_KNOWN = {name: jinja2.filters.FILTERS[name] for name in _FILTERS.split()} | {"format": _format}

# Our own task files: a name in a template is always a field of the row, and what is not there is an error.
STRICT = _furnished(_Strict(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=False), _KNOWN)
# PromptSource: what is not there is empty; templates build lists; some draw at random, here by the row's content.
LENIENT = _furnished(
    _Limits(autoescape=False),
    _KNOWN | {"choice": _drawn, "random": _drawn, "most_frequent": _most_frequent},
    range=_range,
    zip=zip,
    namespace=jinja2.utils.Namespace,
    dict=dict,
)
