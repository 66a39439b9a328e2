"""Tasks: what a task file may say, what rendering gives, and which rows are turned away for which reason."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from apprentice.errors import RowError
from apprentice.tasks.definition import definition_of
from apprentice.tasks.registry import library, load_task
from apprentice.tasks.schema import Example, Task, missing_fields
from apprentice.tasks.source_spec import SourceSpec

RANKED: dict[str, Any] = {
    "name": "reviews",
    "cluster": "sentiment",
    "sources": [{"dataset": "reviews"}],
    "choices": ["negative", "positive"],
    "label": "stars",
    "metrics": ["accuracy"],
    "templates": [
        {"name": "plain", "instruction": "Positive or negative?", "input": "{{ text }}"},
        {
            "name": "yes_no",
            "instruction": "Did they like it ({{ choices | join('/') }})?",
            "input": "{{ text }}",
            "choices": ["no", "yes"],
        },
        {"name": "write", "instruction": "Write a {{ answer }} review ({{ label }}).", "output": "{{ text }}", "inverted": True},
    ],
}
GENERATED: dict[str, Any] = {
    "name": "questions",
    "cluster": "qa",
    "sources": [{"dataset": "questions"}],
    "answer": "{{ answers.text[0] }}",
    "references": "answers.text",
    "metrics": ["token_f1", "exact_match"],
    "templates": [
        {"name": "ask", "instruction": "{{ question }}"},
        {"name": "invent", "instruction": "Ask for {{ answer }}.", "output": "{{ question }}", "inverted": True},
    ],
}
REVIEW = {"text": " Nice film. ", "stars": 1}
QUESTION = {"question": "Who?", "answers": {"text": ["Ada ", "Ada L."]}}


def ranked(**changes: Any) -> Task:
    return Task.model_validate(RANKED | changes)


def generated(**changes: Any) -> Task:
    return Task.model_validate(GENERATED | changes)


def rendered(task: Task, row: dict[str, Any], template: str) -> Example:
    return task.render(row, task.template_by_name[template])


def reason_of(task: Task, row: dict[str, Any], template: str) -> str:
    with pytest.raises(RowError) as caught:
        rendered(task, row, template)
    assert task.name in str(caught.value)
    return caught.value.reason


def test_a_ranked_example() -> None:
    expected = Example(
        "reviews", "plain", "Positive or negative?", "Nice film.", "positive", ("negative", "positive"), ("positive",)
    )
    assert rendered(ranked(), REVIEW, "plain") == expected


def test_a_template_may_name_the_choices_otherwise() -> None:
    example = rendered(ranked(), REVIEW, "yes_no")
    assert (example.target, example.choices, example.references) == ("yes", ("no", "yes"), ("yes",))
    assert example.instruction == "Did they like it (no/yes)?"


def test_a_chain_of_thought_is_reasoning_and_answer_and_not_scored() -> None:
    thought = {"name": "think", "instruction": "Why?", "output": "{{ text }} So: {{ answer }}", "cot": True}
    task = ranked(templates=[*RANKED["templates"], thought])
    example = rendered(task, REVIEW, "think")
    assert (example.target, example.choices, example.references) == ("Nice film.  So: positive", (), ("Nice film.  So: positive",))
    assert [template.name for template in task.scored_templates] == ["plain", "yes_no"]
    assert [template.name for template in task.cot_templates] == ["think"]
    assert [template.name for template in task.inverted_templates] == ["write"]


def test_a_task_with_nothing_but_chains_of_thought_is_scored_on_them() -> None:
    task = generated(templates=[{"name": "think", "instruction": "{{ question }}", "cot": True}])
    assert [template.name for template in task.scored_templates] == ["think"]


def test_a_template_is_inverted_or_a_chain_of_thought() -> None:
    with pytest.raises(ValidationError, match="`inverted` or `cot`, not both"):
        ranked(templates=[RANKED["templates"][2] | {"cot": True}])


def test_an_inverted_example_has_no_choices() -> None:
    expected = Example("reviews", "write", "Write a positive review (1).", "", "Nice film.", (), ("Nice film.",))
    assert rendered(ranked(), REVIEW, "write") == expected


def test_a_generated_example_keeps_all_references() -> None:
    assert rendered(generated(), QUESTION, "ask") == Example("questions", "ask", "Who?", "", "Ada", (), ("Ada", "Ada L."))


def test_without_references_the_target_is_the_only_one() -> None:
    assert rendered(generated(references=None), QUESTION, "ask").references == ("Ada",)


def test_choices_may_be_an_expression_over_the_row() -> None:
    template = {"name": "pick", "instruction": "{{ choices[0] }}, or {{ choices[1] }}?"}
    task = ranked(choices="[one, two]", label="key | int(0) - 1", templates=[template])
    example = rendered(task, {"one": "tea", "two": " milk", "key": "2"}, "pick")
    assert (example.instruction, example.target, example.choices) == ("tea, or milk?", "milk", ("tea", "milk"))


def test_a_field_called_answer_is_seen_by_expressions_and_hidden_from_templates() -> None:
    template = {"name": "ask", "instruction": "{{ question }} ({{ answer }})"}
    task = ranked(choices=["no", "yes"], label="1 if answer else 0", templates=[template])
    assert task.fields == {"question", "answer"}
    assert rendered(task, {"question": "Rain?", "answer": True}, "ask").instruction == "Rain? (yes)"


def test_fields_are_what_templates_and_expressions_need() -> None:
    assert ranked().fields == {"text", "stars"}
    assert generated().fields == {"question", "answers"}


def test_scored_and_inverted_wordings() -> None:
    task = ranked()
    assert [template.name for template in task.scored_templates] == ["plain", "yes_no"]
    assert [template.name for template in task.inverted_templates] == ["write"]
    assert task.is_ranked
    assert not generated().is_ranked


@pytest.mark.parametrize(
    ("row", "template", "reason"),
    [
        ({"text": "a"}, "plain", "missing"),
        ({"text": None, "stars": 1}, "plain", "null"),
        ({"text": "a", "stars": -1}, "plain", "unknown_label"),
        ({"text": "a", "stars": 2}, "plain", "unknown_label"),
        ({"text": "a", "stars": "1"}, "plain", "unknown_label"),
        ({"text": "a", "stars": True}, "plain", "unknown_label"),
        ({"text": "a", "stars": 1.0}, "plain", "unknown_label"),
        ({"text": "  ", "stars": 1}, "write", "empty_answer"),
        ({"text": "caf\ufffd", "stars": 1}, "plain", "broken_character"),
    ],
)
def test_rows_are_turned_away_for_a_named_reason(row: dict[str, Any], template: str, reason: str) -> None:
    assert reason_of(ranked(), row, template) == reason


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"text": []}, "template"),
        ({"other": ["Ada"]}, "template"),
        ([], "template"),
        ({"text": [" "]}, "empty_answer"),
        (None, "null"),
    ],
)
def test_rows_whose_answer_cannot_be_found(answers: Any, reason: str) -> None:
    assert reason_of(generated(), {"question": "Who?", "answers": answers}, "ask") == reason


@pytest.mark.parametrize(
    "instruction", ["{{ text.__class__ }}", "{{ text * 10**9 }}", "{{ text / 2 }}", "{{ 1 // (stars - 1) }}", "{{ text[99] }}"]
)
def test_whatever_goes_wrong_in_a_template_is_counted_as_template(instruction: str) -> None:
    task = ranked(templates=[{"name": "bad", "instruction": instruction}])
    assert reason_of(task, REVIEW, "bad") == "template"


def test_range_is_a_column_that_does_not_exist() -> None:
    task = ranked(templates=[{"name": "bad", "instruction": "{{ range(10**9) | list }}"}])
    assert reason_of(task, REVIEW, "bad") == "missing"


def test_a_row_error_keeps_its_reason_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RowError("null", "a message")))
    assert (error.reason, str(error)) == ("null", "a message")


@pytest.mark.parametrize("warm", [False, True])
def test_a_task_travels_between_processes(warm: bool) -> None:
    task = ranked()
    if warm:
        rendered(task, REVIEW, "yes_no")  # compiled parts are now cached inside
    copy = pickle.loads(pickle.dumps(task))
    assert [rendered(copy, REVIEW, name) for name in copy.template_by_name] == [
        rendered(ranked(), REVIEW, name) for name in ("plain", "yes_no", "write")
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "Extra inputs are not permitted"),
        ({"name": "Two Words"}, "String should match pattern"),
        ({"sources": []}, "at least 1 item"),
        ({"templates": []}, "at least 1 item"),
        ({"metrics": ["speed"]}, "Input should be 'accuracy'"),
        ({"choices": None}, "either `choices` with a `label`, or an `answer`"),
        ({"answer": "{{ text }}"}, "either `choices` with a `label`, or an `answer`"),
        ({"label": None}, "`choices` and `label` come together"),
        ({"label": "stars +"}, "not a Jinja2 expression"),
        ({"choices": "endings["}, "not a Jinja2 expression"),
        ({"templates": [{"name": "a", "instruction": "{{ open"}]}, "not a Jinja2 template"),
        ({"templates": [{"name": "a", "instruction": "x", "colour": 1}]}, "Extra inputs are not permitted"),
        ({"templates": [{"name": "a", "instruction": "x"}] * 2}, "two templates are called 'a'"),
        ({"templates": [{"name": "a", "instruction": "x", "choices": ["one"]}]}, "as many choices as the task"),
        ({"templates": [{"name": "a", "instruction": "x", "choices": "endings["}]}, "not a Jinja2 expression"),
        ({"sources": [{"dataset": "a", "hub": "b/c"}]}, "exactly one of"),
        ({"sources": [{"splits": {"train": "train"}}]}, "exactly one of"),
        ({"sources": [{"dataset": "a", "splits": {"dev": "dev"}}]}, "Input should be 'train' or 'test'"),
    ],
)
def test_a_wrong_task_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ranked(**changes)


VARYING: dict[str, Any] = {
    "choices": "endings",
    "label": "right",
    "templates": [
        {"name": "whole", "instruction": "How does it go on?", "input": "{{ start }}"},
        {
            "name": "letters",
            "instruction": "Which letter?",
            "input": "{{ start }} {% for ending in endings %}({{ choices[loop.index0] }}) {{ ending }} {% endfor %}",
            "choices": ["A", "B", "C", "D"],
        },
        {"name": "numbers", "instruction": "Which number?", "choices": "numbers[:endings | length]"},
        {"name": "last", "instruction": "Which last word?", "choices": "endings | map('lower') | list"},
    ],
}
ROW = {"start": "He sat", "endings": ["Down", "up", "still"], "right": 1, "numbers": ["1", "2", "3", "4"]}


def test_a_wording_may_have_choices_of_its_own_where_those_of_the_rows_vary() -> None:
    task = ranked(**VARYING)
    examples = {name: task.render(ROW, name) for name in task.template_by_name}
    assert {name: (example.target, example.choices) for name, example in examples.items()} == {
        "whole": ("up", ("Down", "up", "still")),
        "letters": ("B", ("A", "B", "C")),
        "numbers": ("2", ("1", "2", "3")),
        "last": ("up", ("down", "up", "still")),
    }
    assert examples["letters"].input == "He sat (A) Down (B) up (C) still"
    assert task.fields == {"start", "endings", "right", "numbers"}
    assert ("numbers", "numbers") in missing_fields(task, SourceSpec(dataset="d"), ["start", "endings", "right"])
    assert pickle.loads(pickle.dumps(task)).render(ROW, "letters") == examples["letters"]


def test_too_few_choices_of_its_own_are_an_error_of_the_row() -> None:
    task = ranked(**VARYING)
    with pytest.raises(RowError, match=r"template 'letters': it has 4 choices of its own, and the row has 5\.?$") as caught:
        task.render(ROW | {"endings": list("vwxyz")}, "letters")
    assert caught.value.reason == "template"
    with pytest.raises(RowError, match="template 'numbers': it has 4 choices of its own, and the row has 5"):
        task.render(ROW | {"endings": list("vwxyz")}, "numbers")
    with pytest.raises(ValidationError, match="template 'a' has `choices`, and the task has none"):
        generated(templates=[{"name": "a", "instruction": "x", "choices": ["A"]}])


def test_choices_of_its_own_shape_the_definition_and_old_definitions_stay() -> None:
    task = ranked(**VARYING)
    other = ranked(**VARYING | {"templates": [*VARYING["templates"][:-1], VARYING["templates"][3] | {"choices": "endings"}]})
    assert definition_of(task) != definition_of(other)
    assert definition_of(load_task(library()["sst2"])) == "dd466c2d315a35d3c6e604cd57c10ee0b40464bc58c058c9978051ab8537ddf9"


def test_a_wrong_answer_is_refused() -> None:
    with pytest.raises(ValidationError, match="not a Jinja2 template"):
        generated(answer="{{ answers.text[0] ")


def test_missing_fields_say_who_needs_them() -> None:
    task = ranked()
    assert missing_fields(task, SourceSpec(dataset="reviews"), ["text", "stars"]) == []
    assert missing_fields(task, SourceSpec(dataset="reviews"), ["stars"]) == [
        ("plain", "text"),
        ("yes_no", "text"),
        ("write", "text"),
    ]
    assert missing_fields(task, SourceSpec(dataset="reviews"), ["text"]) == [("task", "stars")]


def test_missing_fields_go_by_the_names_of_the_source() -> None:
    renamed = SourceSpec(dataset="reviews", columns={"text": "body", "stars": "rating"})
    assert missing_fields(ranked(), renamed, ["body", "rating"]) == []
    assert ("plain", "text") in missing_fields(ranked(), renamed, ["text", "rating"])


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (
            "2",
            "label 2 is not the number of a choice (0 'bad', 1 'good'); correct `label`, as in `label - 1` where labels count",
        ),
        ("'good'", "label 'good' is not the number of a choice (0 'bad', 1 'good'); a text becomes one with `label: \"['first', "),
        ("true", "label True is not the number of a choice"),
    ],
)
def test_a_label_that_is_none_is_told_with_the_choices_and_the_remedy(label: str, said: str) -> None:
    task = Task.model_validate(
        {
            "name": "own",
            "cluster": "own",
            "sources": [{"dataset": "own"}],
            "choices": ["bad", "good"],
            "label": label,
            "metrics": ["accuracy"],
            "templates": [{"name": "ask", "instruction": "Good or bad?"}],
        }
    )
    with pytest.raises(RowError) as error:
        task.render({}, task.templates[0])
    assert error.value.reason == "unknown_label"
    assert said in str(error.value)
