"""The little language of task files: what it needs, what it renders, and what it must not be able to do."""

from __future__ import annotations

import pickle

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import SecurityError

from apprentice.tasks.wording import MAX_REPEAT, Expression, Wording, lenient


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
    ],
)
@pytest.mark.timeout(60)  # each would run for hours, or fill the memory, if it were let
def test_work_without_end_is_an_error(source: str) -> None:
    with pytest.raises((jinja2.TemplateError, RecursionError)):
        lenient(source)({}, python_forms=True)


def test_a_list_does_not_grow_under_the_loop() -> None:
    assert (
        lenient("{% set l = [1, 2] %}{% for x in l %}{{ l.append(x) or '' }}{% endfor %}{{ l }}")({}, python_forms=True)
        == "[1, 2, 1, 2]"
    )


def test_an_allowance_is_for_one_rendering() -> None:
    wording = lenient("{% for i in range(90000) %}{% endfor %}done")
    assert [wording({}) for _ in range(20)] == ["done"] * 20
