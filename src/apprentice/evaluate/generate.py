"""Generation: the prediction is the model's greedy reply, up to the end that the layout prescribes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apprentice.data.layout import SEPARATOR, Layout
from apprentice.models.decoding import generate


def reply(model: Any, questions: Sequence[Mapping[str, Any]], layout: Layout, max_new_tokens: int) -> list[dict[str, Any]]:
    """`prediction` for every question (a record of `predictions.ENCODED`)."""
    prompts = [list(question["prompt_ids"]) for question in questions]
    replies = generate(model, prompts, max_new_tokens=max_new_tokens, stop_ids=layout.stop_ids)
    return [{"prediction": shown(layout, ids)} for ids in replies]


def shown(layout: Layout, ids: Sequence[int]) -> str:
    """The reply's text. In layouts of plain text it ends where a model goes on to write exemplars of its own."""
    text = layout.tokenizer.decode(ids)
    return (text if layout.name == "chat" else text.partition(SEPARATOR.strip("\n"))[0]).strip()
