"""Example questions of a report: a few of each task, and those where the last subject did best and worst. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from apprentice.evaluate.report.report_schema import Column, SampleQuestion, TaskEntry, first_column_of

Record = Mapping[str, Any]
SAMPLES = 2  # questions per task
EXTREMES = 10  # best and worst of the whole report
RecordsByColumn = Mapping[str, Sequence[Record]]
Extreme = Literal["best", "worst"]
_QuestionKey = tuple[int, str]  # row and template


def sample_questions(records: RecordsByColumn, columns: Sequence[Column]) -> list[SampleQuestion]:
    """First `SAMPLES` questions of a task, one per row, with the reply of every column."""
    first_of_row: dict[int, SampleQuestion] = {}
    for (row, template), fields in sorted(_replies(records, columns).items()):
        first_of_row.setdefault(row, SampleQuestion(row=row, template=template, **fields))
    return list(first_of_row.values())[:SAMPLES]


def best_and_worst_questions(records: RecordsByColumn, columns: list[Column]) -> dict[Extreme, list[SampleQuestion]]:
    """Best and worst questions of a task, by the last subject's score, then by its gain over the subject it is compared with.

    At most `EXTREMES` of each, one per row; `select_extremes` selects from those of all tasks.
    """
    column = first_column_of(columns[-1].subject, columns)
    if column.key not in records:
        return {"best": [], "worst": []}
    other = records.get(column.against, ()) if column.against else ()
    score_before = {_key(record): record["score"] for record in other if record["score"] is not None and not record["perturbation"]}
    replies = _replies(records, columns)
    first_of_row: dict[int, SampleQuestion] = {}
    for record in records[column.key]:
        if record["score"] is None or record["perturbation"] or record["row"] in first_of_row:
            continue
        key, score = _key(record), record["score"]
        gain = score - score_before[key] if key in score_before else None
        first_of_row[record["row"]] = SampleQuestion(
            task=record["task"], row=key[0], template=key[1], **replies[key], score=score, gain=gain
        )
    ordered = sorted(first_of_row.values(), key=_rank)
    return {"best": ordered[::-1][:EXTREMES], "worst": ordered[:EXTREMES]}


def select_extremes(tasks: Sequence[TaskEntry], extreme: Extreme) -> list[SampleQuestion]:
    """Selects `EXTREMES` questions from all tasks, one of each task in turn, so that no task fills the list."""
    lists = [task.extremes[extreme] for task in tasks]
    in_turn = [questions[turn] for turn in range(EXTREMES) for questions in lists if turn < len(questions)]
    sign = -1 if extreme == "best" else 1
    return sorted(in_turn[:EXTREMES], key=lambda question: tuple(sign * value for value in _rank(question)))


def _rank(question: SampleQuestion) -> tuple[float, float]:
    return question.score or 0.0, question.gain or 0.0


def _key(record: Record) -> _QuestionKey:
    return record["row"], record["template"]


def _replies(records: RecordsByColumn, columns: Sequence[Column]) -> dict[_QuestionKey, dict[str, Any]]:
    """(row, template) → prompt, target, and the reply of each column."""
    questions: dict[_QuestionKey, dict[str, Any]] = {}
    for key in (column.key for column in columns if column.key in records):
        for record in records[key]:
            if record["prediction"] is None or record["perturbation"]:
                continue
            question = questions.setdefault(_key(record), {"prompt": None, "target": record["target"], "replies": {}})
            question["replies"][key] = record["prediction"]
            question["prompt"] = question["prompt"] or record["prompt"]
    return questions
