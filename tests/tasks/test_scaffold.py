"""First task files: which column is what, and what is written of it."""

from __future__ import annotations

from typing import Any

import pytest

from apprentice.errors import TaskError
from apprentice.tasks.scaffold import Columns, UnclearLabelsError, draft, fields_of, guess
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
    assert (
        rendered(draft("own", Columns(("text",), label="label"), stars, FILES, list("12345")), {"text": "a", "label": 5})[0][2]
        == "5"
    )
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
    example = rendered(content, {"city": "Paris", "year": 1900, "answer": "yes"})
    assert example[1] == ("What is the answer?", "City: Paris\nYear: 1900", "yes")
    assert len(example) == 3


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


def test_labels_that_are_numbers_ask_for_their_names() -> None:
    rows = [{"text": f"text {n}", "label": str(n % 11)} for n in range(30)]
    with pytest.raises(UnclearLabelsError) as error:
        draft("own", Columns(("text",), label="label"), rows, FILES)
    assert str(error.value) == (
        "the labels in column 'label' are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, which say nothing to a model; give each a name, in this"
        " order, as in --choices name0,name1,name2,…; to learn them as they are, --choices 0,1,2,3,4,5,6,7,8,9,10."
    )
    assert error.value.values == tuple(map(str, range(11)))
    content = draft("own", Columns(("text",), label="label"), rows, FILES, [f"name {n}" for n in range(11)])
    assert rendered(content, {"text": "a", "label": "10"})[0][2] == "name 10"


COPA = {"premise": "It rained.", "choice1": "Grass grew.", "choice2": "Ice melted.", "question": "effect", "label": 0}
PIQA = {"goal": "To cut", "sol1": "use a knife", "sol2": "use a spoon", "label": 1}
MEDICAL = {"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "cop": 3}
LETTERED = {"Question": "Which?", "A": "one", "B": "two", "C": "three", "D": "four", "Answer": "D"}
LISTED = {"question": "Which?", "options": ["one", "two", "three"], "label": 2}
BY_TEXT = {"question": "Which?", "options": ["one", "two", "three"], "label": "three"}


@pytest.mark.parametrize(
    ("row", "label", "labels", "own", "listed", "right"),
    [
        (COPA, "label", [0, 1], "choice1,choice2", "- Grass grew.\n- Ice melted.", "Grass grew."),
        (PIQA, "label", [0, 1], "sol1,sol2", "- use a knife\n- use a spoon", "use a spoon"),
        ({**PIQA, "label": "1"}, "label", ["0", "1"], "sol1,sol2", "- use a knife\n- use a spoon", "use a spoon"),
        (MEDICAL, "cop", [1, 2, 3], "opa,opb,opc", "- a\n- b\n- c", "c"),
        (LETTERED, "Answer", list("ABCD"), "A,B,C,D", "- one\n- two\n- three\n- four", "four"),
        (LISTED, "label", [0, 1, 2], "options", "- one\n- two\n- three", "three"),
    ],
)
def test_choices_that_stand_in_columns(
    row: dict[str, Any], label: str, labels: list[Any], own: str, listed: str, right: str
) -> None:
    rows = [row | {label: value} for value in labels] * 5
    with pytest.raises(UnclearLabelsError) as error:
        draft("own", guess(list(row), "own.csv", label=label), rows, FILES)
    assert f"what a row chooses from, --choices {own}" in str(error.value)
    assert f"or {own} if each row's choices stand there" in error.value.question
    columns = guess(list(row), "own.csv", label=label, choices=own.split(","))
    assert columns.choices == tuple(own.split(","))
    content = draft("own", columns, rows, FILES)
    examples = rendered(content, {field: row[column] for field, column in fields_of(columns).items()})
    assert len(examples) == 3
    assert all(text.endswith(listed) and target == right for _, text, target in examples)


def test_choices_in_columns_with_the_label_as_text() -> None:
    columns = guess(list(BY_TEXT), "own.csv", label="label", choices=["options"])
    assert rendered(draft("own", columns, [BY_TEXT] * 3, FILES), BY_TEXT)[0][2] == "three"
    with pytest.raises(
        TaskError, match="column 'label' holds four, which are neither numbers nor letters nor texts of the choices"
    ):
        draft("own", columns, [{**BY_TEXT, "label": "four"}], FILES)
    with pytest.raises(TaskError, match="--choices question: this column holds one text a row; name one column for each choice"):
        draft("own", guess(list(BY_TEXT), "own.csv", label="label", choices=["question"]), [BY_TEXT], FILES)


def test_two_columns_of_a_pair_are_only_suggested() -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "label": n % 2} for n in range(10)]
    columns = guess(["sentence1", "sentence2", "label"], "own.csv")
    with pytest.raises(UnclearLabelsError, match=r"give each a name.*; if sentence1, sentence2 hold what a row chooses from"):
        draft("own", columns, rows, FILES)
    content = draft("own", columns, rows, FILES, ["other", "same"])
    assert rendered(content, rows[1])[0][1:] == ("Sentence1: a\nSentence2: b", "same")


@pytest.mark.parametrize(
    ("answer", "wording", "references"),
    [
        (["20", "twenty"], "{{ answer[0] }}", "answer"),
        ({"text": ["20", "twenty"], "answer_start": [3, 5]}, "{{ answer.text[0] }}", "answer.text"),
    ],
)
def test_answers_that_are_lists(answer: Any, wording: str, references: str) -> None:
    rows = [{"question": "Ten and ten?", "hints": ["add", "carry"], "answer": answer}] * 3
    content = draft("own", guess(["question", "hints", "answer"], "own.jsonl"), rows, FILES)
    assert (content["answer"], content["references"]) == (wording, references)
    assert content["metrics"] == ["exact_match", "token_f1"]
    task = Task.model_validate(content)
    example = task.render(rows[0], task.templates[0])
    assert (example.input, example.target, example.references) == ("add\ncarry", "20", ("20", "twenty"))


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"text": "a", "answer": {"x": 1}},
            Columns(("text",), answer="answer"),
            "'answer' holds a mapping with the keys x in each row, which is no text",
        ),
        ({"text": {"x": 1}, "answer": "b"}, Columns(("text",), answer="answer"), "name other columns with --input"),
        (
            {"text": b"caf\xe9", "answer": "b"},
            Columns(("text",), answer="answer"),
            "holds bytes, not text, such as b'caf\\xe9'; say",
        ),
        ({"text": "a", "label": ["x"]}, Columns(("text",), label="label"), "column 'label' holds a list with"),
    ],
)
def test_columns_that_are_no_text(row: dict[str, Any], columns: Columns, message: str) -> None:
    with pytest.raises(TaskError) as error:
        draft("own", columns, [row] * 3, FILES)
    assert message.removesuffix(" with") in str(error.value)
