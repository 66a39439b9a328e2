"""Written replies as questions to other models: to a reward model, which is better; to their writer and its base, how likely.

A reply is put as a choice, so that what ranks choices gives the numbers. Pure; knows nothing of models or of Ray.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from apprentice.data.encoding.prompt_format import Layout
from apprentice.evaluate.questions.row_selection import Request

Record = dict[str, Any]
Asked = list[tuple[Record, list[Record]]]  # a question, and the record that each of its choices is the reply of


def request_of(record: Mapping[str, Any]) -> Request:
    """The request that a record answers."""
    return Request(*(record[name] for name in Request._fields))


def written(records: Sequence[Record]) -> dict[Request, list[Record]]:
    """Request → the records of all subjects that wrote a reply to it."""
    found: dict[Request, list[Record]] = defaultdict(list)
    for record in records:
        if record["prediction"] is not None and not record["choices"]:
            found[request_of(record)].append(record)
    return found


def to_a_judge(questions: Sequence[Record], replies: Mapping[Request, Sequence[Record]], layout: Layout) -> Asked:
    """`questions` as the judge's `layout` phrases them, each with the subjects' replies and the end as its choices."""
    asked: Asked = []
    for question in questions:
        records = list(replies.get(request_of(question), ()))
        if records and not question["dropped"]:
            texts = [record["prediction"] for record in records]
            ids = [[*answer, *layout.end_ids] for answer in layout.encode_answers(texts)]
            asked.append((question | {"choices": texts, "choice_ids": ids}, records))
    return asked


def to_the_writer(questions: Sequence[Record], replies: Mapping[Request, Sequence[Record]], subject: str, layout: Layout) -> Asked:
    """`questions` with the reply of one `subject`, as it was spoken to; without the end, since some replies were cut."""
    asked: Asked = []
    for question in questions:
        own = [record for record in replies.get(request_of(question), ()) if record["subject"] == subject]
        ids = layout.encode_answers([record["prediction"] for record in own])
        if own and all(ids):
            asked.append((question | {"choices": [own[0]["prediction"]], "choice_ids": ids[:1]}, own[:1]))
    return asked
