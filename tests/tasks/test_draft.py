"""First task files: which column is what, and what is written of it."""

from __future__ import annotations

from typing import Any

import pytest

from apprentice.errors import TaskError
from apprentice.tasks.draft import Columns, draft, fields_of, guess
from apprentice.tasks.schema import Task

FILES = {"train": "train.parquet", "test": "test.parquet"}


@pytest.mark.parametrize(
    ("columns", "said", "expected"),
    [
        (["text", "label"], {}, Columns(("text",), label="label")),
        (["id", "Instruction", "input", "output"], {}, Columns(("input",), "Instruction", "output")),
        (["prompt", "completion"], {}, Columns((), "prompt", "completion")),
        (["question", "context", "answer"], {}, Columns(("context",), "question", "answer")),
        (["article", "summary"], {}, Columns(("article",), answer="summary")),
        (["a", "b", "c"], {"label": "c"}, Columns(("a", "b"), label="c")),
        (["a", "b", "c"], {"answer": "c", "inputs": ("a",)}, Columns(("a",), answer="c")),
        (["text", "answer", "label"], {"label": "label", "inputs": ("text",)}, Columns(("text",), label="label")),
    ],
)
def test_columns_are_guessed(columns: list[str], said: dict[str, Any], expected: Columns) -> None:
    assert guess(columns, "own.csv", **said) == expected


@pytest.mark.parametrize(
    ("columns", "said", "message"),
    [
        (["text", "mark"], {}, "not clear which column of own.csv is to be learnt; its columns are text, mark. Say --label COLUMN"),
        (["text", "label"], {"label": "lable"}, "no column 'lable'. Did you mean 'label'?"),
        (["text", "label"], {"label": "label", "answer": "text"}, "either an answer to write or labels to choose from"),
        (["id", "label"], {}, "no column besides 'label'"),
    ],
)
def test_what_is_unclear_is_said(columns: list[str], said: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as error:
        guess(columns, "own.csv", **said)
    assert message in str(error.value)


def test_fields_are_names_that_templates_can_say() -> None:
    columns = Columns(("Review text", "review-text", "5 stars?"), label="Ergebnis")
    assert fields_of(columns) == {
        "review_text": "Review text",
        "review_text_": "review-text",
        "column_5_stars": "5 stars?",
        "ergebnis": "Ergebnis",
    }


def rendered(content: dict[str, Any], row: dict[str, Any]) -> list[tuple[str, str, str]]:
    task = Task.model_validate(content)
    examples = [task.render(row, template) for template in task.templates]
    return [(example.instruction, example.input, example.target) for example in examples]


def test_labels_of_any_kind() -> None:
    texts = [{"Review text": f"text {n}", "mark": ["good", "bad"][n % 2]} for n in range(10)]
    content = draft("reviews", Columns(("Review text",), label="mark"), texts, FILES)
    assert content["choices"] == ["bad", "good"]
    assert content["sources"] == [{"files": FILES, "columns": {"review_text": "Review text"}}]
    assert rendered(content, {"review_text": "a", "mark": "good"}) == [
        ("Choose the label that fits: bad, good.", "a", "good"),
        ("Which label does this deserve: bad, good?", "a", "good"),
        ("Sort this under one heading: bad, good. Answer with the heading alone.", "a", "good"),
    ]
    numbers = [{"text": f"text {n}", "label": n % 2} for n in range(10)]
    named = draft("own", Columns(("text",), label="label"), numbers, FILES, ["no", "yes"])
    assert (named["choices"], named["label"]) == (["no", "yes"], "label")
    assert rendered(named, {"text": "a", "label": 1})[0] == ("Choose the label that fits: no, yes.", "a", "yes")
    stars = [{"text": f"text {n}", "label": 1 + n % 5} for n in range(10)]
    assert rendered(draft("own", Columns(("text",), label="label"), stars, FILES), {"text": "a", "label": 5})[0][2] == "5"
    truths = [{"text": f"text {n}", "label": n % 2 == 1} for n in range(10)]
    assert rendered(draft("own", Columns(("text",), label="label"), truths, FILES), {"text": "a", "label": False})[0][2] == "False"


def test_answers_to_write() -> None:
    rows = [{"prompt": "Name a colour.", "completion": "Red is a colour that many people like."}]
    content = draft("own", Columns((), "prompt", "completion"), rows, FILES)
    assert content["metrics"] == ["rouge_l"]
    assert rendered(content, rows[0]) == [("Name a colour.", "", "Red is a colour that many people like.")]
    pairs = [{"City": "Paris", "Year": 1900, "answer": "yes"}]
    content = draft("own", Columns(("City", "Year"), answer="answer"), pairs, FILES)
    assert content["metrics"] == ["exact_match", "token_f1"]
    asked = rendered(content, {"city": "Paris", "year": 1900, "answer": "yes"})
    assert asked[1] == ("What is the answer?", "City: Paris\nYear: 1900", "yes")
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("rows", "choices", "message"),
    [
        ([{"text": "a", "label": "x"}], (), "column 'label' holds 1 different values; labels are 2 to 100"),
        ([{"text": "a", "label": str(n)} for n in range(101)], (), "holds 101 different values"),
        (
            [{"text": "a", "label": n} for n in range(3)],
            ("a", "b"),
            "--choices gives 2 names, but column 'label' holds 3 values: 0, 1, 2.",
        ),
    ],
)
def test_labels_that_are_none(rows: list[dict[str, Any]], choices: tuple[str, ...], message: str) -> None:
    with pytest.raises(TaskError) as error:
        draft("own", Columns(("text",), label="label"), rows, FILES, choices)
    assert message in str(error.value)
