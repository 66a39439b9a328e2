"""Generation: the prediction is the model's greedy reply, up to the end that the layout prescribes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apprentice.data.encoding.prompt_format import SEPARATOR, Layout
from apprentice.errors import EvaluationError
from apprentice.inference.decoder import NotFiniteError, generate

if TYPE_CHECKING:
    from apprentice.model_pool.limits import Manner


def reply(model: Any, questions: Sequence[Mapping[str, Any]], manner: Manner) -> list[dict[str, Any]]:
    """`prediction` for every question (a record of `predictions.ENCODED`).

    Raises `EvaluationError` with the question's name where the model's numbers are not finite.
    """
    prompts = [list(question["prompt_ids"]) for question in questions]
    try:
        replies = generate(model, prompts, max_new_tokens=manner.reply, stop_ids=manner.layout.stop_ids)
    except NotFiniteError as error:
        raise EvaluationError(f"{question_name(questions[error.number])}: {error}") from error
    return [{"prediction": shown(manner.layout, ids)} for ids in replies]


def shown(layout: Layout, ids: Sequence[int]) -> str:
    """The reply's text. In layouts of plain text it ends where a model goes on to write exemplars of its own."""
    return bounded(layout, layout.tokenizer.decode(ids))


def bounded(layout: Layout, text: str) -> str:
    """`text` up to where an exemplar of the model's own would begin."""
    return (text if layout.name == "chat" else text.partition(SEPARATOR.strip("\n"))[0]).strip()


def question_name(record: Mapping[str, Any]) -> str:
    """A question as a person finds it again: its task, row and wording; a row of a file has a number alone."""
    if "task" not in record:
        return f"row {record['row']}"
    return f"{record['task']} row {record['row']}, wording {record['template']}"
