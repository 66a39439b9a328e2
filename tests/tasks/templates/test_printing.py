"""What only Python could print, a list, a mapping, bytes or None, is never text of a prompt or of an answer."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from apprentice.errors import RowError
from apprentice.tasks.importers.conversations import ConversationTemplate
from apprentice.tasks.importers.natural_instructions import InstanceTemplate
from apprentice.tasks.importers.preferences import PreferenceTemplate
from apprentice.tasks.importers.prompt_only import PromptOnlyTemplate
from apprentice.tasks.importers.promptsource import PromptSourceTemplate
from apprentice.tasks.importers.records import KINDS, RecordTemplate
from apprentice.tasks.schema import Task, Template

ROW = {"text": "Ten and ten?", "words": ["a", "b"], "answers": ["20", "twenty"], "meta": {"id": 1, "note": None}, "raw": b"caf\xe9"}
ROW |= {"deep": [["a"], None]}


def task_of(instruction: str = "Ask.", answer: str = "{{ answers[0] }}", input_text: str = "{{ text }}", **changes: Any) -> Task:
    content: dict[str, Any] = {
        "name": "own",
        "cluster": "own",
        "sources": [{"dataset": "own"}],
        "answer": answer,
        "metrics": ["exact_match"],
        "templates": [{"name": "ask", "instruction": instruction, "input": input_text}],
    }
    return Task.model_validate(content | changes)


def whole(template: Template) -> Task:
    metrics = {"metrics": ["rouge_l"]}
    return Task.model_validate(
        {"name": "own", "cluster": "own", "sources": [{"dataset": "own"}], "templates": [template]} | metrics
    )


def refusal(task: Task, row: dict[str, Any] | None = None) -> str:
    with pytest.raises(RowError) as error:
        task.render(row or ROW, task.templates[0])
    assert error.value.reason == "python_form", error.value
    return str(error.value)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "{{ answers }}",
            "a list would be printed as Python writes it, ['20', 'twenty']; say which part is meant, as in `answer[0]`",
        ),
        ("{{ answers }} {{ text | upper }}", "a list would be printed"),
        ("It is {{ answers[:1] }}", "a list would be printed as Python writes it, ['20'];"),
        (
            "{{ meta }}",
            "a mapping would be printed as Python writes it, {'id': 1, 'note': None}; say which part is meant, as in `answer.id`",
        ),
        ("{{ meta.note }}", "None would be printed for a value that is not there; say what stands for it"),
        ("{{ raw }}", "bytes would be printed as Python writes them, b'caf\\xe9'; give `encoding` in the source"),
        ("{{ 'so ' ~ answers }}", "a list would be printed"),
        ("{{ deep | join(', ') }}", "a list would be printed as Python writes it, ['a'];"),
        ("{{ deep[1:] | join(', ') }}", "None would be printed"),
        ("{{ [meta] | join(', ', attribute='note') }}", "None would be printed"),
        ("{{ answers | string }}", "a list would be printed"),
        ("{{ '%s' | format(answers) }}", "a list would be printed"),
        ("{% set x %}{{ answers }}{% endset %}{{ x }}", "a list would be printed"),
        ("{{ meta.keys() }}", "would be printed as Python writes it"),
    ],
)
def test_what_only_python_could_print_is_a_bad_row(said: str, message: str) -> None:
    old = {"answer": "x", "instruction": said}
    for task in (task_of(answer=said), task_of(instruction=said), task_of(input_text=said), task_of(**old)):
        assert message in refusal(task)
        as_ever = pickle.loads(pickle.dumps(task.of_format(1)))
        example = as_ever.render(ROW, as_ever.templates[0])
        assert any(form in f"{example}" for form in ("[", "{", "None", "b'"))
        assert as_ever == task.of_format(1)
        assert task.of_format(2) is task


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("{{ answers[0] }}", "20"),
        ("{{ words | join(', ') }}", "a, b"),
        ("{{ [meta] | join(', ', attribute='id') }}", "1"),
        ("{% for word in words %}{{ loop.index }}{{ word }} {% endfor %}", "1a 2b"),
        ("{{ meta.note | default('nothing', true) }}", "nothing"),
        ("{{ answers | length }} {{ 'a' in words }} {{ 1.5 }}", "2 True 1.5"),
        ("{{ '%s of %d' | format(text, 3) }}", "Ten and ten? of 3"),
        ("{{ answers | map('upper') | join(' ') }}", "20 TWENTY"),
    ],
)
def test_parts_that_are_text_are_printed(said: str, expected: str) -> None:
    task = task_of(answer=said, references="answers")
    assert task.render(ROW, task.templates[0]).target == expected


def test_references_see_the_row_where_the_answer_is_a_field_of_it() -> None:
    row = {"text": "a", "answer": ["20", "twenty"]}
    task = task_of(answer="{{ answer[0] }}", references="answer")
    assert task.render(row, task.templates[0]).references == ("20", "twenty")
    as_ever = task.of_format(1)
    assert as_ever.render(row, as_ever.templates[0]).references == ("2", "0")


def test_choices_and_references_are_text_too() -> None:
    task = task_of(answer="{{ text }}", references="[answers, answers]")
    assert "a list would be printed" in refusal(task)
    assert task.of_format(1).render(ROW, task.of_format(1).templates[0]).references[0] == "['20', 'twenty']"
    ranked = {"answer": None, "choices": "deep", "label": "0", "metrics": ["accuracy"]}
    assert "a list would be printed as Python writes it, ['a'];" in refusal(task_of(**ranked))


CONTENT: dict[str, Any] = {"content": {"a": 1}}


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (
            RecordTemplate(name="a", instruction="", columns=KINDS["alpaca"]),
            {"instruction": "Ask.", "input": None, "output": ["20"]},
        ),
        (InstanceTemplate(name="a", instruction="Ask."), {"input": "x", "output": [["20"]]}),
        (InstanceTemplate(name="a", instruction="Ask."), {"input": {"x": 1}, "output": "x"}),
        (
            ConversationTemplate(name="a", instruction=""),
            {"messages": [{"role": "user", **CONTENT}, {"role": "assistant", "content": "b"}]},
        ),
        (PreferenceTemplate(name="a", instruction=""), {"prompt": [{"role": "user", **CONTENT}], "chosen": "x", "rejected": "y"}),
        (PromptOnlyTemplate(name="a", instruction=""), {"prompt": [{"role": "user", **CONTENT}]}),
        (PromptOnlyTemplate(name="a", instruction=""), {"prompt": "x", "system": ["y"]}),
    ],
)
def test_rows_that_bring_their_own_texts(template: Template, row: dict[str, Any]) -> None:
    task = whole(template)
    assert "would be printed as Python writes it" in refusal(task, row)
    as_ever = task.of_format(1)
    assert as_ever.render(row, as_ever.templates[0])


def test_promptsource_prints_lists_as_ever_with_the_separators_of_the_row() -> None:
    task = whole(PromptSourceTemplate(name="a", instruction="Say {{ words }}. ||| {{ words[1] }}", output=""))
    row = {"words": ["x ||| y", "||| z"]}
    example = task.render(row, task.templates[0])
    assert (example.instruction, example.target) == ("Say ['x ||| y', '||| z'].", "||| z")
    as_ever = task.of_format(1)
    assert "\\ue000pipes\\ue000" in as_ever.render(row, as_ever.templates[0]).instruction
