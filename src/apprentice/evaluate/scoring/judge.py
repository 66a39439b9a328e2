"""Questions about generated replies: to a reward model, for their reward; to the subjects, for their log-probability.

A reply is put as the choice of a question, so that the code that scores choices computes the numbers. Pure functions of records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from apprentice.data.encoding.prompt_format import Layout
from apprentice.evaluate.questions.row_selection import QuestionRequest

Record = dict[str, Any]
ReplyQuestions = list[tuple[Record, list[Record]]]  # (question, the record of each of its choices)


def request_of(record: Mapping[str, Any]) -> QuestionRequest:
    """Request that a record answers."""
    return QuestionRequest(*(record[name] for name in QuestionRequest._fields))


def group_replies(records: Sequence[Record]) -> dict[QuestionRequest, list[Record]]:
    """Request → the records of all subjects with a generated reply to it."""
    replies: dict[QuestionRequest, list[Record]] = defaultdict(list)
    for record in records:
        if record["prediction"] is not None and not record["choices"]:
            replies[request_of(record)].append(record)
    return replies


def judge_questions(
    questions: Sequence[Record], replies: Mapping[QuestionRequest, Sequence[Record]], layout: Layout
) -> ReplyQuestions:
    """Questions to the judge: `questions` in its prompt format `layout`, with all subjects' replies, end included, as choices."""
    reply_questions: ReplyQuestions = []
    for question in questions:
        records = list(replies.get(request_of(question), ()))
        if records and not question["dropped"]:
            texts = [record["prediction"] for record in records]
            ids = [[*answer, *layout.end_ids] for answer in layout.encode_answers(texts)]
            reply_questions.append((question | {"choices": texts, "choice_ids": ids}, records))
    return reply_questions


def likelihood_questions(
    questions: Sequence[Record], replies: Mapping[QuestionRequest, Sequence[Record]], subject: str, layout: Layout
) -> ReplyQuestions:
    """`questions` in a `subject`'s own prompt format, each with its reply as the only choice.

    The choice lacks the end of an answer, because some replies were cut by the limit of tokens.
    """
    reply_questions: ReplyQuestions = []
    for question in questions:
        own = [record for record in replies.get(request_of(question), ()) if record["subject"] == subject]
        ids = layout.encode_answers([record["prediction"] for record in own])
        if own and all(ids):
            reply_questions.append((question | {"choices": [own[0]["prediction"]], "choice_ids": ids[:1]}, own[:1]))
    return reply_questions
