"""Greedy generation of predictions: replies of the model as text, up to the end that the prompt format prescribes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apprentice.data.encoding.prompt_format import SEPARATOR, Layout
from apprentice.errors import EvaluationError
from apprentice.inference.decoding import generate
from apprentice.inference.generation_request import NotFiniteError

if TYPE_CHECKING:
    from apprentice.model_pool.answer_settings import AnswerSettings


def generate_replies(model: Any, questions: Sequence[Mapping[str, Any]], answer_settings: AnswerSettings) -> list[dict[str, Any]]:
    """Generates a reply to every question, a record with `prompt_ids`; returns records with `prediction`, in the same order.

    Raises `EvaluationError`, which names the question, where the model's logits are not finite.
    """
    prompts = [list(question["prompt_ids"]) for question in questions]
    try:
        replies = generate(model, prompts, max_new_tokens=answer_settings.reply, stop_ids=answer_settings.layout.stop_ids)
    except NotFiniteError as error:
        raise EvaluationError(f"{question_name(questions[error.number])}: {error}") from error
    return [{"prediction": reply_text(answer_settings.layout, ids)} for ids in replies]


def reply_text(layout: Layout, ids: Sequence[int]) -> str:
    """Text of a reply's token ids. In all prompt formats but `chat`, text after the reply is cut (`cut_reply`)."""
    return cut_reply(layout, layout.tokenizer.decode(ids))


def cut_reply(layout: Layout, text: str) -> str:
    """`text` up to the exemplar separator, after which a base model goes on to invent exemplars; `chat` replies stay whole."""
    return (text if layout.name == "chat" else text.partition(SEPARATOR.strip("\n"))[0]).strip()


def question_name(record: Mapping[str, Any]) -> str:
    """Name of a question for messages: its task, row and wording, or the row number alone for a row of a file."""
    if "task" not in record:
        return f"row {record['row']}"
    return f"{record['task']} row {record['row']}, wording {record['template']}"
