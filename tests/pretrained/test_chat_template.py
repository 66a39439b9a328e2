"""Chat templates run in the sandbox of task templates: hostile ones end, ordinary constructs work."""

from __future__ import annotations

import pytest

from apprentice.errors import ChatTemplateError
from apprentice.pretrained.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "  a b  "}, {"role": "assistant", "content": "<think>c</think>d", "list": [1, 2]}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{{ 'a' * 10**9 }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ 'a\n' | indent(10**9) | length }}{{ 'x' * 10**8 }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 'a'.encode() }}",
        "{{ messages.append(1) }}",
        "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ raise_exception('no system turn') }}",
    ],
)
def test_a_hostile_template_ends_in_an_error_of_ours(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, "a folder").render(MESSAGES, generate=True)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ m.role }}:{{ m['content'] | trim }};{% endfor %}", "user:a b;assistant:<think>c</think>d;"),
        ("{{ messages[-1].content.split('</think>')[-1] }}", "d"),
        ("{% for m in messages[::-1] %}{{ loop.index0 }}{% if m.role == 'user' %}{% break %}{% endif %}{% endfor %}", "01"),
        ("{{ messages[1] | tojson }}", '{"role": "assistant", "content": "<think>c</think>d", "list": [1, 2]}'),
        ("{% macro f(m) %}{{ m.role | upper }}{% endmacro %}{% set ns = namespace(n=[]) %}{{ f(messages[0]) }}", "USER"),
        ("{{ messages[1].list }}{{ none }}{{ missing }}{{ add_generation_prompt }}", "[1, 2]NoneTrue"),
        ("{% generation %}x{% endgeneration %}{{ messages is iterable and messages is not string }}", "xTrue"),
    ],
)
def test_ordinary_templates_work(source: str, text: str) -> None:
    assert ChatTemplate(source, "a folder").render(MESSAGES, generate=True) == text


def test_a_long_conversation_is_within_the_allowance() -> None:
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1].strip() }}\n{% endfor %}"
    messages = [{"role": "user", "content": "word " * 20_000}, {"role": "assistant", "content": "word " * 400}] * 20
    assert len(ChatTemplate(source, "a folder").render(messages, generate=True)) > 2_000_000
