"""Sandbox for templates: they cannot reach Python, and their work and output are bounded.

Every loop, call, filter, test, comparison and operator, and everything that builds longer texts or lists out of shorter ones,
is charged to one budget for each rendering (`budget.py`); when it is spent the rendering fails. The methods that a template
may call are listed for each type.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import LoopContext, Macro, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from apprentice.tasks.templates.budget import CHARACTERS, MAX_BITS, charge, charged_list, cost, size, spend, weight
from apprentice.tasks.templates.jinja_filters import DRAWING_FILTERS, KNOWN_FILTERS, KNOWN_TESTS, MAX_REPEAT, metered

_CALL = 16  # steps of a call
_MAX_EXPONENT = 64
_LISTS = "append clear copy count extend index insert pop remove reverse sort"  # the strict sandbox refuses those that change it
_MAPPINGS = "clear copy get items keys pop popitem setdefault update values"
_TEXTS = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric"
    " isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition"
    " rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_TIMES = "date day days hour isoformat isoweekday microsecond minute month second seconds time total_seconds weekday year"
# Type → methods and attributes that templates may use; other types have none.
_METHODS: tuple[tuple[Any, frozenset[str]], ...] = (
    (str, frozenset(_TEXTS.split())),
    (list, frozenset(_LISTS.split())),
    (tuple, frozenset(["count", "index"])),
    (Mapping, frozenset(_MAPPINGS.split())),
    (datetime.date | datetime.time | datetime.timedelta, frozenset(_TIMES.split())),
)
_JINJAS = frozenset(["_loop_vars", "_block_vars"])  # keyword arguments that Jinja itself adds to a call
_SPLITTING = frozenset(["rsplit", "split", "splitlines"])
_COMPARING = frozenset(["count", "index", "remove", "sort"])
_OF_TEMPLATES = Cycler | LoopContext | Macro | Namespace | TemplateReference | jinja2.Undefined


def _joined(parts: list[Any]) -> str:
    return "".join([str(charge(part)) for part in parts])


def _steps(items: Any, each: int) -> Any:
    """The items for a loop, charged beforehand; a copy, so that the list cannot grow during the loop."""
    sequence = items if isinstance(items, range) else charged_list(items)
    spend(len(sequence) * each)
    return sequence


def _copied(value: Any) -> Any:
    """`value`, which is to be sliced, after a shallow copy was charged."""
    spend(size(value))
    return value


def _compared(value: Any) -> Any:
    """`value`, which is to be compared or is a mapping's key, after its cost was charged."""
    spend(cost(value))
    return value


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_REPEAT:
        raise jinja2.TemplateRuntimeError(f"range() has {len(numbers)} numbers, more than {MAX_REPEAT}")
    return numbers


class _Limits(SandboxedEnvironment):
    """Base of both sandboxes: charged operators, calls and look-ups, and methods limited to a list for each type."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        spend(1)
        sides = (left, right)
        length = max((size(side) for side in sides if isinstance(side, str | list | tuple)), default=0)
        number = max((side for side in sides if isinstance(side, int | float)), default=0)
        bits = sum(side.bit_length() for side in sides if isinstance(side, int))
        if operator == "+":
            spend(length)
        elif operator == "%" and isinstance(left, str):
            raise jinja2.TemplateRuntimeError("'%' does not format text here; join parts with '~'")
        elif operator == "*" and length:
            items = max(len(side) for side in sides if isinstance(side, str | list | tuple))
            if items * number > MAX_REPEAT:
                raise jinja2.TemplateRuntimeError(f"{operator!r} would build something too large")
            spend(int(length * max(number, 0)))
        if bits > MAX_BITS or (operator == "**" and (number > _MAX_EXPONENT or bits > MAX_BITS // _MAX_EXPONENT)):
            raise jinja2.TemplateRuntimeError(f"{operator!r} would build something too large")
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            spend(cost(argument))
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return isinstance(obj, _OF_TEMPLATES) or any(isinstance(obj, kind) and attr in names for kind, names in _METHODS)

    def wrap_str_format(self, value: Any) -> Any:
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(getattr(value, "__self__", None), str):
            raise SecurityError("text cannot be formatted with a method here; join parts with '~'")
        return None

    def call(self, context: Any, obj: Any, /, *arguments: Any, **options: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        own = [value for name, value in options.items() if name not in _JINJAS]
        spend(_CALL + sum(cost(argument) for argument in (*arguments, *own)))
        if isinstance(owner, str):
            spend(size(owner))
            if name in _SPLITTING:
                by = arguments[0] if arguments else options.get("sep")
                spend(owner.count(by) if isinstance(by, str) and by else len(owner) // 2)
            if name == "replace" and len(arguments) > 1:
                spend(owner.count(arguments[0]) * len(arguments[1]) // CHARACTERS)
            if name == "join" and arguments:
                arguments = (charged_list(arguments[0]), *arguments[1:])
                spend(weight(arguments[0]) + len(arguments[0]) * len(owner) // CHARACTERS)
        elif isinstance(owner, list | tuple | Mapping):
            spend(weight(owner) * len(owner).bit_length() if name in _COMPARING else len(owner))
        result = super().call(context, obj, *arguments, **options)
        spend(size(result))
        return result


class _Immutable(ImmutableSandboxedEnvironment, _Limits):
    pass


class _Guard(NodeTransformer):
    """Rewrites a parsed template so that it pays for its loops, outputs, concatenations, comparisons and slices."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment

    def _through(self, name: str, node: Any, *more: nodes.Expr) -> nodes.Filter:
        lineno = node.lineno if node is not None else 1
        made = nodes.Filter(node, name, list(more), [], None, None, lineno=lineno)
        return made.set_environment(self.environment)  # type: ignore[return-value]

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (Jinja's name)
        if node.recursive:
            raise jinja2.TemplateSyntaxError("a loop cannot call itself here; write a macro", node.lineno)
        self.generic_visit(node)
        texts = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        each = 1 + texts // CHARACTERS + sum(1 for _ in node.find_all(nodes.Expr)) // 8
        node.iter = self._through("_steps", node.iter, nodes.Const(each, lineno=node.lineno))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [part if isinstance(part, nodes.TemplateData) else self._through("_paid", part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return self._through("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        node.expr = self._through("_compared", node.expr)
        for operand in node.ops:
            operand.expr = self._through("_compared", operand.expr)
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Dict:  # noqa: N802
        self.generic_visit(node)
        for pair in node.items:
            pair.key = self._through("_compared", pair.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._through("_copied", node.node)
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:  # noqa: N802
        self.generic_visit(node)
        node.filter = self._through("_paid", node.filter)
        return node


def compile_template(environment: jinja2.Environment, source: str) -> tuple[nodes.Template, jinja2.Template]:
    """`source` parsed, and compiled with its payments; call `start_rendering` before each rendering.

    Raises `jinja2.TemplateSyntaxError`, also for nesting or numbers that Python cannot compile.
    """
    try:
        parsed = environment.parse(source)
        if private := [node.name for node in parsed.find_all(nodes.Filter) if node.name.startswith("_")]:
            raise jinja2.TemplateSyntaxError(f"No filter named {private[0]!r}.", 1)
        code = environment.compile(_Guard(environment).visit(environment.parse(source)))
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise jinja2.TemplateSyntaxError("it is nested too deeply, or holds a number that is too long", 1) from error
    return parsed, environment.template_class.from_code(environment, code, environment.make_globals(None))


def _configure(environment: jinja2.Environment, filters: Mapping[str, Callable[..., Any]], **names: Any) -> jinja2.Environment:
    """The environment with only these filters and names, and the reviewed tests."""
    environment.filters = {
        **filters,
        "_paid": charge,
        "_steps": _steps,
        "_joined": _joined,
        "_copied": _copied,
        "_compared": _compared,
    }
    environment.tests = dict(KNOWN_TESTS)
    environment.globals.clear()
    environment.globals.update(names)
    return environment


# For our own task files: every name is a field of the row, and an undefined name is an error.
STRICT = _configure(_Immutable(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=False), KNOWN_FILTERS)
# For PromptSource: an undefined name is empty, templates build lists, and random draws are seeded by the row's content.
LENIENT = _configure(
    _Limits(autoescape=False),
    KNOWN_FILTERS | DRAWING_FILTERS,
    range=_range,
    zip=zip,
    namespace=Namespace,
    dict=dict,
)


def chat_environment(
    filters: Mapping[str, Callable[..., Any]], extensions: Sequence[type[Extension]], **names: Any
) -> jinja2.Environment:
    """The sandbox for chat templates, with more filters, extensions and names: an undefined name is empty, values are immutable."""
    environment = _Immutable(trim_blocks=True, lstrip_blocks=True, extensions=list(extensions))
    common = {"range": _range, "cycler": Cycler, "joiner": Joiner}
    return _configure(environment, KNOWN_FILTERS | metered(filters), **common, **names)
