"""Rank classification: the prediction is the choice with the largest log-probability after the prompt.

A choice's tokens are its own and those that end an answer in the layout, exactly what training taught the model to write: the sum
is the probability that the whole reply is this choice. Without the end, "card payment" would always beat "card payment fee", as
a prefix is never less likely than what continues it. Sums are not divided by length, as in T0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apprentice.models.scoring import choice_logprobs


def rank(model: Any, questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`prediction` and `choice_logprobs` for every question (a record of `predictions.ENCODED` with choices)."""
    prompts = [question["prompt_ids"] for question in questions]
    sums = choice_logprobs(model, prompts, [question["choice_ids"] for question in questions])
    return [
        {"prediction": question["choices"][best(found)], "choice_logprobs": found}
        for question, found in zip(questions, sums, strict=True)
    ]


def best(sums: Sequence[float]) -> int:
    """The place of the largest; the first of equals."""
    return max(range(len(sums)), key=lambda place: (sums[place], -place))
