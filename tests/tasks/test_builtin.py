"""The built-in mixture: enough rows, nothing of the test in training, and no shortcut that scores."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import Counter
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest

from apprentice.errors import TaskError
from apprentice.tasks import builtin
from apprentice.tasks.builtin import GENERATORS, VERSION
from apprentice.tasks.builtin.seeded_random import SeededRandom
from apprentice.tasks.registry import find_tasks
from apprentice.tasks.schema import Example, Task

TASKS = {task.name: task for task in find_tasks("quickstart", Path())}
EXPECTED_TASKS, EXPECTED_CLUSTERS, LIMIT = 11, 10, 0.6


rows = cache(builtin.rows)  # made once for all tests, which only read them


def examples(task: Task, split: str) -> list[Example]:
    """Row i in wording i, over the scored wordings."""
    wordings = task.scored_templates
    return [task.render(row, wordings[i % len(wordings)]) for i, row in enumerate(rows(task.name, split))]


def words_of(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def score(task: Task, prediction: str, target: str) -> float:
    """The task's main metric for one answer; a ranked answer counts if its words are the target's."""
    said, right = words_of(prediction), words_of(target)
    if task.metrics[0] != "token_f1":
        return float(said == right)
    both = sum((Counter(said) & Counter(right)).values())
    return 2 * both / (len(said) + len(right)) if both else 0.0


def test_the_mixture_is_large_enough() -> None:
    assert len(TASKS) == EXPECTED_TASKS
    assert len({task.cluster for task in TASKS.values()}) == EXPECTED_CLUSTERS
    assert set(TASKS) == set(GENERATORS)
    assert {task.sources[0].builtin for task in TASKS.values()} == set(GENERATORS)


def test_the_rows_of_this_version_never_change() -> None:
    content = json.dumps({name: [rows(name, "train"), rows(name, "test")] for name in GENERATORS}, ensure_ascii=False)
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert (VERSION, digest) == (2, "5efd2843a7b83a724fceb555ff2817b6196b70bf3486ed8f03700d59f05ddf4e"), (
        "rows changed: raise VERSION, then write the new checksum here"
    )


@pytest.mark.parametrize("name", GENERATORS)
def test_rows_are_many_different_and_flat(name: str) -> None:
    train, test = rows(name, "train"), rows(name, "test")
    assert (len(train), len(test)) == (400, 100)
    columns = [list(row) for row in train + test]
    assert columns == [columns[0]] * 500
    kinds = {type(value) for row in train + test for value in row.values()}
    assert kinds <= {str, int, list}
    distinct = {json.dumps(next(iter(row.values()))) for row in train + test}
    assert len(distinct) == 500


@pytest.mark.parametrize("name", GENERATORS)
def test_no_prompt_of_the_test_rows_is_trained_on(name: str) -> None:
    task = TASKS[name]
    for template in task.scored_templates:
        train = {(e.instruction, e.input) for e in (task.render(row, template) for row in rows(name, "train"))}
        test = {(e.instruction, e.input) for e in (task.render(row, template) for row in rows(name, "test"))}
        assert (len(train), len(test), train & test) == (400, 100, set())


def test_the_order_of_the_words_does_not_hide_a_test_row_in_train() -> None:
    train = {frozenset(row["words"]) for row in rows("one_of_a_kind", "train")}
    test = {frozenset(row["words"]) for row in rows("one_of_a_kind", "test")}
    assert (len(train), len(test), train & test) == (400, 100, set())


@pytest.mark.parametrize("name", GENERATORS)
def test_every_wording_renders_every_test_row(name: str) -> None:
    task = TASKS[name]
    assert len(task.templates) >= 8
    assert len(task.inverted_templates) == 2
    examples = [task.render(row, template) for template in task.templates for row in rows(name, "test")]
    assert len(examples) == 100 * len(task.templates)
    for example in examples:
        assert example.instruction
        assert example.target
        assert not example.choices or example.target in example.choices
        assert len((example.instruction + example.input + example.target).split()) <= 90


@pytest.mark.parametrize("name", GENERATORS)
def test_no_constant_answer_scores(name: str) -> None:
    """Neither the commonest answer of the training rows nor any other of them, whichever wording asks."""
    task = TASKS[name]
    if task.is_ranked:
        labels = [row["label"] for row in rows(name, "test")]
        assert max(Counter(labels).values()) / len(labels) < LIMIT
    answers = Counter(example.target for example in examples(task, "train"))
    targets = [example.target for example in examples(task, "test")]
    best = max(sum(score(task, answer, target) for target in targets) / len(targets) for answer, _ in answers.most_common(60))
    assert len(targets) == 100
    assert best < LIMIT


@pytest.mark.parametrize("name", GENERATORS)
def test_copying_does_not_score(name: str) -> None:
    task = TASKS[name]
    for part in ("input", "instruction"):
        scores = [score(task, getattr(example, part), example.target) for example in examples(task, "test")]
        assert len(scores) == 100
        assert sum(scores) / len(scores) < LIMIT
    first = next(iter(rows(name, "test")[0]))
    copied = [score(task, str(row[first]), e.target) for row, e in zip(rows(name, "test"), examples(task, "test"), strict=True)]
    assert sum(copied) / len(copied) < LIMIT


def test_extracted_answers_stand_in_their_passage() -> None:
    stands = [row["answer"] in row["passage"] for row in rows("passage_questions", "train")]
    assert stands == [True] * 400


def test_word_problems_are_right() -> None:
    checked = Counter[str]()
    for row in rows("word_problems", "train"):
        numbers = sorted(int(number) for number in re.findall(r"\d+", row["problem"]))
        first, sign, second, _, result = row["calculation"].split()
        assert sorted([int(first), int(second)]) == numbers
        assert int(result) == int(first) + int(second) * (1 if sign == "+" else -1)
        assert int(result) > 0
        checked[sign] += 1
    assert checked == {"+": 200, "-": 200}


def test_written_dates_are_right() -> None:
    right_dates = [
        datetime.strptime(row["written"], "%d %B %Y").date().isoformat() == row["date"] for row in rows("written_dates", "train")
    ]
    assert right_dates == [True] * 400


def test_labels_are_balanced_and_do_not_follow_the_row_number() -> None:
    labels = [row["label"] for row in rows("short_reviews", "train")]
    assert Counter(labels) == {0: 200, 1: 200}
    assert 170 <= sum(label == number % 2 for number, label in enumerate(labels)) <= 230


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(TaskError, match=r"'one_of_kind' is not built in\. Did you mean 'one_of_a_kind'\?"):
        rows("one_of_kind", "train")
    with pytest.raises(TaskError, match=r"has no split 'tests'\. Did you mean 'test'\?"):
        rows("one_of_a_kind", "tests")  # type: ignore[arg-type]


def test_dice_repeat_and_stay_in_range() -> None:
    assert [SeededRandom("key").below(1000) for _ in range(2)] == [56, 56]
    rng = SeededRandom("key")
    assert {rng.between(2, 4) for _ in range(50)} == {2, 3, 4}
    assert sorted(rng.shuffled("abcd")) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="3 of 2 options"):
        rng.some("ab", 3)
