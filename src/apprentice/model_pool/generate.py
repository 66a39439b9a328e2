"""Answers of a worker's model, a transformers model or a `VllmModel`: greedy replies as text, and the scores of choices."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apprentice.data.encoding.prompt_format import SEPARATOR, Layout
from apprentice.errors import EvaluationError
from apprentice.inference.choices.choice_scoring import choice_logprobs
from apprentice.inference.decoding import generate
from apprentice.inference.generation_request import NotFiniteError
from apprentice.model_pool.vllm_model import VllmModel
from apprentice.pretrained.replies.reply_parser import parse_reply
from apprentice.tasks.dialogue import write_calls

if TYPE_CHECKING:
    from apprentice.model_pool.answer_settings import AnswerSettings


def generate_replies(model: Any, questions: Sequence[Mapping[str, Any]], answer_settings: AnswerSettings) -> list[dict[str, Any]]:
    """Generates a reply to every question, a record with `prompt_ids`; returns records with `prediction`, in the same order.

    Raises `EvaluationError`, which names the question, where the model's logits are not finite.
    """
    prompts = [list(question["prompt_ids"]) for question in questions]
    try:
        limits: dict[str, Any] = {"max_new_tokens": answer_settings.reply, "stop_ids": _stop_ids(answer_settings.layout, questions)}
        replies = model.generate(prompts, **limits) if isinstance(model, VllmModel) else generate(model, prompts, **limits)
    except NotFiniteError as error:
        raise EvaluationError(f"{question_name(questions[error.number])}: {error}") from error
    pairs = zip(questions, replies, strict=True)
    return [{"prediction": reply_text(answer_settings.layout, ids, question)} for question, ids in pairs]


def _stop_ids(layout: Layout, questions: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    return layout.call_stop_ids if any(question.get("tools") for question in questions) else layout.stop_ids


def score_choices(model: Any, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    """Natural log-probability of every choice (token ids) after its prompt; `choices[i]` are those of `prompts[i]`."""
    if isinstance(model, VllmModel):
        return model.choice_logprobs(prompts, choices)
    return choice_logprobs(model, prompts, choices)


def reply_text(layout: Layout, ids: Sequence[int], question: Mapping[str, Any]) -> str:
    """Text of a reply's token ids. In all prompt formats but `chat`, text after the reply is cut (`cut_reply`).

    Where thoughts are apart or functions were offered, it is what `answer_in` finds.
    """
    if not question.get("tools") and not layout.leaves_thoughts:
        return cut_reply(layout, layout.tokenizer.decode(ids))
    stops = layout.call_stop_ids
    kept = ids[: next((place for place, id in enumerate(ids) if id in stops), len(ids))]
    return answer_in(layout, layout.tokenizer.decode(kept, skip_special=False), question)


def answer_in(layout: Layout, text: str, question: Mapping[str, Any]) -> str:
    """The scored part of a reply: its calls as a JSON list of names and arguments, or what it says behind its thought."""
    tools = json.loads(question["tools"]) if question.get("tools") else None
    reply = parse_reply(layout.reply_syntax, text, tools, is_in_thought=layout.opens_thought)
    return write_calls(reply.tool_calls) if reply.tool_calls else reply.content.strip()


def cut_reply(layout: Layout, text: str) -> str:
    """`text` up to the exemplar separator, after which a base model goes on to invent exemplars; `chat` replies stay whole."""
    return (text if layout.name == "chat" else text.partition(SEPARATOR.strip("\n"))[0]).strip()


def question_name(record: Mapping[str, Any]) -> str:
    """Name of a question for messages: its task, row and wording, or the row number alone for a row of a file."""
    if "task" not in record:
        return f"row {record['row']}"
    return f"{record['task']} row {record['row']}, wording {record['template']}"
