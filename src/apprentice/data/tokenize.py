"""Examples to token ids within a limit, many at once.

Too long: exemplars are dropped from the last, then the input is cut from its end; instruction and answer are never cut,
and what then still does not fit is dropped whole. Knows layouts, not where examples come from nor how they are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from apprentice.data.layout import Exemplar, Layout
from apprentice.tasks.schema import Example

# The words under which the ledger counts what was cut.
CUT_EXEMPLARS = "truncated_exemplars"
CUT_INPUT = "truncated_input"
TOO_LONG = "too_long"


@dataclass(frozen=True, slots=True)
class Tokenized:
    """One training example: prompt, answer and end; everything from `prompt_length` on is trained on."""

    ids: list[int]
    prompt_length: int
    exemplars_used: int
    truncated: str | None  # `CUT_EXEMPLARS`, `CUT_INPUT`, or nothing was cut


class Fitted(NamedTuple):
    """A prompt that keeps to its limit."""

    ids: list[int]
    exemplars_used: int
    truncated: str | None


def encode(
    layout: Layout, items: Sequence[tuple[Example, Sequence[Exemplar]]], max_length: int, target_length: int | None = None
) -> list[Tokenized | None]:
    """Token ids of every item, at most `max_length` each; None where instruction and answer do not fit (reason `TOO_LONG`).

    With a `target_length`, as encoder-decoders have it, `max_length` is for the prompt alone, and `target_length` for the answer.
    All prompts go through the tokenizer at once, and so do all answers.
    """
    prompts = layout.encode_prompts([layout.prompt(example.instruction, example.input, shots) for example, shots in items])
    answers = layout.encode_answers([example.target for example, _ in items])
    end = list(layout.end_ids)
    found: list[Tokenized | None] = []
    for (example, shots), prompt, answer in zip(items, prompts, answers, strict=True):
        answer += end
        # On one side with the prompt, or on a side of its own.
        room, answer_room = (max_length - len(answer), max_length) if target_length is None else (max_length, target_length)
        fitted: Fitted | None = Fitted(prompt, len(shots), None)
        if len(answer) > answer_room:
            fitted = None
        elif len(prompt) > room:
            fitted = fit_prompt(layout, example, shots, room)
        found.append(fitted and Tokenized(fitted.ids + answer, len(fitted.ids), fitted.exemplars_used, fitted.truncated))
    return found


def fit_prompt(layout: Layout, example: Example, exemplars: Sequence[Exemplar], max_prompt_tokens: int) -> Fitted | None:
    """The prompt of `example` in at most `max_prompt_tokens`; None where not even the instruction fits."""
    ids: list[int] = []
    for used in range(len(exemplars), -1, -1):
        ids = layout.encode_prompt(layout.prompt(example.instruction, example.input, exemplars[:used]))
        if len(ids) <= max_prompt_tokens:
            return Fitted(ids, used, CUT_EXEMPLARS if used < len(exemplars) else None)
    given, tokens = example.input, len(layout.tokenizer.encode(example.input))
    while given:
        # Tokens can merge differently at the cut, so one round is usually, not always, enough.
        tokens -= len(ids) - max_prompt_tokens
        given = layout.tokenizer.cut(example.input, max(tokens, 0))
        ids = layout.encode_prompt(layout.prompt(example.instruction, given))
        if len(ids) <= max_prompt_tokens:
            return Fitted(ids, 0, CUT_INPUT)
    return None
