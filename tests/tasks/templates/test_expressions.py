"""The little language of task files: what it needs, what it renders, and what it must not be able to do."""

from __future__ import annotations

import datetime
import pickle

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import SecurityError

from apprentice.tasks.templates.expressions import MAX_REPEAT, Expression, PromptSourceWording, Wording


def test_names_are_the_fields_that_the_text_needs() -> None:
    text = "{% for choice in choices %}{{ loop.index }}. {{ choice }} {% endfor %}{% set n = a %}{{ n }}{{ b.c[d] }}"
    assert Wording(text).names == {"choices", "a", "b", "d"}
    assert Wording("no fields").names == set()
    assert Expression("answers.text[number] if wanted else []").names == {"answers", "number", "wanted"}


def test_text_is_rendered_and_stripped() -> None:
    assert Wording("  {{ word }}, {{ word | upper }}\n")({"word": "so"}) == "so, SO"
    assert Wording(" plain ")({}) == "plain"
    assert Wording("{% if word %}a{% endif %}")({"word": ""}) == ""
    assert Wording("{# a remark #}left")({}) == "left"


@pytest.mark.parametrize("value", ["so", 7, 0.1, True, None, [1, "a"], {"b": 2}, ""])
def test_a_bare_field_is_shown_as_jinja_shows_it(value: object) -> None:
    source = "Say:{# a remark #}\n{{ value }}, {{ value }}!\n"
    assert Wording(source)({"value": value}, python_forms=True) == jinja2.Template(source).render(value=value).strip()
    if isinstance(value, str | int | float):
        assert Wording(source)({"value": value}) == jinja2.Template(source).render(value=value).strip()


def test_what_a_row_holds_is_not_rendered_again() -> None:
    assert Wording("{{ word }}")({"word": "{{ secret }} <b>"}) == "{{ secret }} <b>"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_through_unchanged(text: str) -> None:
    assert Wording("{{ text }}")({"text": text}) == text.strip()


def test_an_expression_gives_a_value_and_not_text() -> None:
    assert Expression("[first, second]")({"first": 1, "second": "b"}) == [1, "b"]
    assert Expression("choices.label.index(key)")({"choices": {"label": ["A", "B"]}, "key": "B"}) == 1
    assert Expression("word")({"word": None}) is None


@pytest.mark.parametrize("source", ["{{ missing }}", "{{ row.missing }}", "{{ row.list[3] }}", "{{ missing.deeper }}"])
def test_what_is_not_there_is_an_error_and_not_an_empty_string(source: str) -> None:
    values = {"row": {"list": [1]}}
    with pytest.raises(jinja2.UndefinedError):
        Wording(source)(values)
    with pytest.raises(jinja2.UndefinedError):
        Expression(source[2:-2].strip())(values)


@pytest.mark.parametrize(
    "source",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "numbers.__class__.__base__",
        "(numbers | attr('__class__'))",
        "numbers.append.__globals__",
        "'{0.__class__.__mro__}'.format(numbers)",
    ],
)
def test_python_cannot_be_reached(source: str) -> None:
    with pytest.raises((SecurityError, jinja2.UndefinedError, jinja2.TemplateSyntaxError)):
        Wording("{{ " + source + " }}")({"numbers": [1, 2]})
    with pytest.raises((SecurityError, jinja2.UndefinedError, jinja2.TemplateSyntaxError)):
        Expression(f"({source}) ~ ''")({"numbers": [1, 2]})


@pytest.mark.parametrize("source", ["numbers.append(3)", "numbers.clear()", "row.update({'a': 1})", "row.pop('a')"])
def test_a_row_cannot_be_changed(source: str) -> None:
    values = {"numbers": [1, 2], "row": {"a": 0}}
    with pytest.raises(SecurityError):
        Wording("{{ " + source + " }}")(values)
    assert values == {"numbers": [1, 2], "row": {"a": 0}}


@pytest.mark.parametrize("name", ["range", "lipsum", "cycler", "namespace", "dict"])
def test_there_are_no_globals(name: str) -> None:
    assert Wording("{{ " + name + "(10**9) }}").names == {name}
    with pytest.raises(jinja2.UndefinedError):
        Wording("{{ " + name + "(10**9) }}")({})
    assert Wording("{{ " + name + " }}")({name: "a column of that name"}) == "a column of that name"


@pytest.mark.parametrize("source", ["'ab' * 10**9", "10**9 * [0]", "words * 60000", "2 ** 65", "9 ** 9 ** 9", "'a' * 1e9"])
def test_huge_things_cannot_be_built_by_repetition(source: str) -> None:
    with pytest.raises(jinja2.TemplateRuntimeError, match="would build something too large"):
        Wording("{{ " + source + " }}")({"words": ["a", "b"]})


def test_ordinary_arithmetic_and_repetition_work() -> None:
    assert Wording("{{ 400000 * 300000 }} {{ 2 ** 10 }} {{ '-' * 3 }} {{ 0.5 * 3 }}")({}) == "120000000000 1024 --- 1.5"
    assert len(Wording("{{ 'x' * many }}")({"many": MAX_REPEAT})) == MAX_REPEAT


def test_bad_syntax_is_found_on_construction() -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        Wording("{{ open")
    with pytest.raises(jinja2.TemplateSyntaxError):
        Expression("answers.text[0")


def test_both_travel_between_processes() -> None:
    wording = pickle.loads(pickle.dumps(Wording("{{ a }}!")))
    expression = pickle.loads(pickle.dumps(Expression("a + 1")))
    assert (wording({"a": 1}), wording.names) == ("1!", {"a"})
    assert (expression({"a": 1}), expression.names) == (2, {"a"})


GROW = "{% set ns = namespace(x='aaaa', l=[1], n=3) %}{% for i in range(100) %}"
# Two equal lists and a tuple that hold each other twice, a hundred times: looked at without sharing they have 2^100 parts.
DOUBLE = (
    "{% set ns = namespace(a=[1], b=[1], t=(1,)) %}{% for i in range(90) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{{ range(10**9) | list }}",
        "{{ 'a' * 10**9 }}",
        "{{ 9**9**9 }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        GROW + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        GROW + "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
        GROW + "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
        GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
        GROW + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
        "{% for i in range(99) %}{{ zip(range(99999), range(99999)) | list | length }}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 7 | round(20000000) }}",
        "{{ 1.5 | round(-20000000, 'floor') }}",
        DOUBLE + "{{ ns.a == ns.b }}",
        DOUBLE + "{{ ns.a < ns.b }}",
        DOUBLE + "{{ ns.a in [ns.b] }}",
        DOUBLE + "{{ ns.a is eq ns.b }}",
        DOUBLE + "{{ [ns.a] | reject('in', [ns.b]) | list | length }}",
        DOUBLE + "{{ [ns.a].index(ns.b) }}",
        DOUBLE + "{{ [ns.a, ns.b] | sort | length }}",
        DOUBLE + "{{ [ns.a, ns.b] | max | length }}",
        DOUBLE + "{{ '%s' | format(ns.a) }}",
        DOUBLE + "{{ '%r %s' | format(1, {'a': ns.a}) }}",
        DOUBLE + "{{ {(ns.t,): 1} }}",
        DOUBLE + "{{ [ns.t] | unique | list | length }}",
        DOUBLE + "{{ {}.get(ns.t) }}",
        DOUBLE + "{{ {}[ns.t] }}",
        DOUBLE + "{{ [ns.t] | most_frequent }}",
        GROW + "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
        GROW + "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ [ns.x] | string }}",
        "{{ range(50000) | batch(1) | sum(start=[]) | length }}",
        "{% set n = ('f' * 99999) | int(base=16) %}{{ n // 3 }}",
        "{% for i in range(9999) %}{{ ('f' * 9999) | int(0, 16) // 7 }}{% endfor %}",
        GROW + "{% set ns.n = ns.n ** 60 %}{% endfor %}",
        "{{ ('a' * 99999).encode('utf-32') }}",
        "{{ (5).to_bytes(2000000000, 'big') }}",
        "{{ 'a'.encode().ljust(2000000000) }}",
        "{% for i in range(1000) %}{{ [i] | batch(99999, 'x') | list | length }}{% endfor %}",
        "{% for i in range(1000) %}{{ [i] | slice(99999, 'x') | list | length }}{% endfor %}",
        "{% set t = 'a' * 99999 %}{% for i in range(99999) %}{% set u = t[1:] %}{% endfor %}",
        "{% set t = 'a ' * 49999 %}{% for i in range(99999) %}{% set u = t.split() %}{% endfor %}",
        "{% for i in range(99999) %}{% set u = 'a' * 99999 %}{% endfor %}",
        "{% for i in range(99999) %}{% set u = [1] * 99999 %}{% endfor %}",
        "{% for i in [1] recursive %}" + "a" * 1000 + "{{ loop(range(100000)) if loop.depth < 9 }}{% endfor %}",
        "{{ [[1]] | map('_steps', -10**12) | list }}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) | _steps(-9) %}{% endfor %}",
        "{% set l = [1] %}{% for i in range(99) %}{{ l.extend(l) or '' }}{% endfor %}{{ l | length }}",
    ],
)
@pytest.mark.timeout(60)  # each would run for hours, or fill the memory, if it were let
def test_work_without_end_is_an_error(source: str) -> None:
    with pytest.raises((jinja2.TemplateError, RecursionError)):
        PromptSourceWording(source)({})


@pytest.mark.parametrize("source", ["a == b", "a in [b]", "{t: 1}", "a | sort", "n // 3 * n * n * n * n", "(text * 99).split()"])
def test_expressions_pay_as_templates_do(source: str) -> None:
    a: object = 1
    b: object = 1
    t: object = 1
    for _ in range(90):
        a, b, t = [a, a], [b, b], (t, t)
    values = {"a": a, "b": b, "t": t, "n": 2**4000, "text": "a " * 500_000}
    with pytest.raises(jinja2.TemplateRuntimeError):
        Expression(source)(values)


def test_many_plain_pieces_have_a_bound_too() -> None:
    with pytest.raises(jinja2.TemplateRuntimeError, match="more than 16,000,000 characters"):
        Wording("{{ text }}" * 20_000)({"text": "a" * 100_000})
    assert len(Wording("{{ text }}" * 200)({"text": "a" * 10_000})) == 2_000_000


@pytest.mark.parametrize(
    "inner", ["9" * 100_000, "[" * 3000 + "]" * 3000, "(" * 150 + "1" + ")" * 150, "0x" + "f" * 5000 + " // 3"]
)
def test_what_python_cannot_compile_is_a_wrong_template(inner: str) -> None:
    with pytest.raises((jinja2.TemplateSyntaxError, jinja2.TemplateRuntimeError)):
        Wording("{{ " + inner + " }}" if "(" not in inner else "{{ " + inner * 20 + " }}")({})
    with pytest.raises((jinja2.TemplateSyntaxError, jinja2.TemplateRuntimeError)):
        Expression(inner if "(" not in inner else inner * 20)({})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 2.567 | round(2) }} {{ 7 | round }} {{ '12' | int + 1 }} {{ 'ff' | int(base=16) }}", "2.57 7 13 255"),
        ("{{ [1, 2, 3] | sum }} {{ rows | sum(attribute='n') }}", "6 3"),
        ("{{ [3, 1, 2] | sort | join(', ') }} {{ [1, 1, 2] | unique | list }}", "1, 2, 3 [1, 2]"),
        ("{{ [1, 2, 3] | batch(2) | list }} {{ [1, 2, 3] | slice(2) | list }}", "[[1, 2], [3]] [[1, 2], [3]]"),
        ("{{ 'a-b'.split('-')[1:] | first }} {{ text.strip().lower()[:2] }} {{ 1 < 2 < 3 }}", "b so True"),
        ("{{ day.year }}-{{ day.month }} {{ day.isoformat() }}", "2026-11 2026-11-30"),
        ("{{ {'a': 1}['a'] }} {{ rows | map(attribute='n') | list }} {{ rows[0].get('m', 0) }}", "1 [1, 2] 0"),
        (
            "{% for key, value in rows[1].items() %}{{ key }}{{ value }}{% endfor %} {{ '%s and %d' | format('x', 3) }}",
            "n2 x and 3",
        ),
    ],
)
def test_ordinary_work_is_let_through(source: str, text: str) -> None:
    values = {"rows": [{"n": 1}, {"n": 2}], "text": " Some ", "day": datetime.date(2026, 11, 30)}
    assert Wording(source)(values, python_forms=True) == text
    assert PromptSourceWording(source)(values) == text


@pytest.mark.parametrize(
    "source", ["'a'.encode()", "n.to_bytes(2, 'big')", "n.bit_length()", "raw.hex()", "day.strftime('%99999d')"]
)
def test_methods_that_are_not_on_the_list_are_refused(source: str) -> None:
    with pytest.raises((SecurityError, jinja2.UndefinedError)):
        Wording("{{ " + source + " }}")({"n": 5, "raw": b"ab", "day": datetime.date(2026, 11, 30)})


def test_a_list_does_not_grow_under_the_loop() -> None:
    assert (
        PromptSourceWording("{% set l = [1, 2] %}{% for x in l %}{{ l.append(x) or '' }}{% endfor %}{{ l }}")({}) == "[1, 2, 1, 2]"
    )


def test_an_allowance_is_for_one_rendering() -> None:
    wording = PromptSourceWording("{% for i in range(90000) %}{% endfor %}done")
    assert [wording({}) for _ in range(20)] == ["done"] * 20


# Statements that make something larger or look at all of it; a state that is nested, long, or many.
STATEMENTS = (
    "{% set ns.a = [ns.a, ns.a] %}",
    "{% set ns.a = ns.a + ns.a %}",
    "{% set ns.a = (ns.a, ns.b) %}",
    "{% set ns.a = {'k': ns.a, 'l': ns.a} %}",
    "{% set ns.a = ns.a | list %}",
    "{% set ns.b = ns.a %}",
    "{% set ns.b = [ns.b] * 50 %}",
    "{% set ns.s = ns.s ~ ns.s %}",
    "{% set ns.s = ns.s * 3 %}",
    "{% set ns.s = ns.s | replace('a', ns.s) %}",
    "{% set ns.s = ns.s.join([ns.s, 'a', ns.s]) %}",
    "{% set ns.s = ns.s | upper | lower | title | trim %}",
    "{% set ns.s %}{{ ns.s }}{{ ns.a }}{% endset %}",
    "{% set ns.a = ns.s.split('a') %}",
    "{% set ns.a = ns.a | batch(7, ns.s) | list %}",
    "{% set ns.a = ns.a | slice(900, ns.a) | list %}",
    "{% set ns.n = ns.n * ns.n + 7 %}",
    "{% set ns.n = ns.n ** 3 // 5 %}",
    "{% set ns.n = (ns.s | int(1, 16)) * ns.n %}",
    "{% set ns.n = ns.n | round(99) | int %}",
    "{{ ns.a == ns.b }}{{ ns.a in [ns.b] }}",
    "{{ ns.a | unique | list | length }}",
    "{{ ns.a | sort | length }}{{ ns.a | groupby(0) | length }}",
    "{{ '%s%s' | format(ns.a, ns.s) }}",
    "{{ ns.s[1:] | length }}{{ ns.a[::2] | length }}",
    "{% for x in ns.a %}{{ x }}{% endfor %}",
    "{% for x in ns.s %}{{ x }}{% endfor %}",
)


@given(st.lists(st.tuples(st.sampled_from([1, 9, 400]), st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=4)), max_size=4))
@settings(max_examples=60, deadline=None)
def test_no_mixture_of_statements_reaches_the_kernels_limits(blocks: list[tuple[int, list[str]]]) -> None:
    loops = "".join(f"{{% for i in range({times}) %}}{''.join(statements)}{{% endfor %}}" for times, statements in blocks)
    wording = PromptSourceWording(
        "{% set ns = namespace(a=['a', 1], b=[], s='aab', n=3) %}" + loops + "{{ ns.s }}{{ ns.a }}{{ ns.n }}"
    )
    reason = ""
    try:
        wording({})
    except jinja2.TemplateRuntimeError as error:
        reason = str(error)
    assert "took more than" not in reason
    assert "MemoryError" not in reason


class Slow(str):
    """A text that works for ever where the allowance cannot see it."""

    def upper(self) -> str:
        while True:
            pass


class Huge(str):
    """A text that fills the memory where the allowance cannot see it."""

    def upper(self) -> str:
        return "a" * (8 << 30)


def test_the_kernel_bounds_what_the_allowance_does_not_see() -> None:
    wording = PromptSourceWording("{{ text.upper() }}")
    with pytest.raises(jinja2.TemplateRuntimeError, match="took more than 5 s of processor time"):
        wording({"text": Slow("a")})
    with pytest.raises(jinja2.TemplateRuntimeError, match="MemoryError"):
        wording({"text": Huge("a")})
    assert wording({"text": "a"}) == "A"
