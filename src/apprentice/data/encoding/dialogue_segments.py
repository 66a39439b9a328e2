"""Segments of a conversation with functions and thoughts: each turn of the assistant behind the very prompt it is served with.

Turns that follow each other without a change of what stands before them are learnt in one segment, whose loss has gaps. A turn
whose prompt is written anew, because the template drops earlier thoughts, begins another. So no prefix is repeated needlessly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from apprentice.data.encoding.dialogue_template import AssistantTurn
from apprentice.data.encoding.prompt_format import Layout
from apprentice.tasks.dialogue import Dialogue, DialogueTurn
from apprentice.tasks.schema import Example

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Segment:
    """Token ids of one prompt and the turns behind it; trained on from `prompt_length` on, except the ranges `untrained`."""

    ids: list[int]
    prompt_length: int
    untrained: tuple[tuple[int, int], ...]


def split_thought(text: str) -> tuple[str | None, str]:
    """The thought at the beginning of an answer (None without one), and the rest."""
    match = _THOUGHT.match(text)
    return (match[1].strip(), text[match.end() :]) if match else (None, text)


def without_thoughts(example: Example) -> Example:
    """The example with answers from which the thoughts are taken."""
    history = tuple((question, split_thought(answer)[1]) for question, answer in example.history)
    references = tuple(split_thought(text)[1] for text in example.references)
    rejected = split_thought(example.rejected)[1]
    return replace(example, target=split_thought(example.target)[1], history=history, references=references, rejected=rejected)


def dialogue_of(example: Example) -> Dialogue:
    """The example as a dialogue, in which thoughts at the beginning of answers are apart from them."""
    if example.dialogue is not None:
        last = max(place for place, turn in enumerate(example.dialogue.turns) if turn.role == "user")
        question = "\n\n".join(filter(None, [example.instruction, example.input]))  # it may have been changed
        turns = [replace(turn, content=question) if place == last else turn for place, turn in enumerate(example.dialogue.turns)]
        return replace(example.dialogue, turns=tuple(_apart(turn) for turn in turns))
    system = [DialogueTurn("system", example.system)] if example.system else []
    pairs = [*example.history, ("\n\n".join(filter(None, [example.instruction, example.input])), example.target)]
    turns = [*system, *(turn for ask, say in pairs for turn in (DialogueTurn("user", ask), DialogueTurn("assistant", say)))]
    return Dialogue(tuple(_apart(turn) for turn in turns))


def _apart(turn: DialogueTurn) -> DialogueTurn:
    if turn.role != "assistant" or turn.reasoning is not None:
        return turn
    reasoning, content = split_thought(turn.content)
    return replace(turn, reasoning=reasoning, content=content)


def messages_of(dialogue: Dialogue) -> list[dict[str, Any]]:
    """The dialogue as messages in OpenAI's form."""
    messages: list[dict[str, Any]] = []
    for turn in dialogue.turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.reasoning is not None:
            message["reasoning_content"] = turn.reasoning
        if turn.calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        if turn.name:
            message["name"] = turn.name
        messages.append(message)
    return messages


def encode_segments(
    layout: Layout, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], max_length: int
) -> tuple[list[Segment], bool]:
    """The segments of a conversation, each of at most `max_length` tokens, and whether some turns had no room.

    Raises `ChatTemplateError` where the template refuses the messages, `ContractError` where it drops `tools`.
    """
    turns = layout.dialogue_template(tools).turns(layout.with_system(messages), tools)
    segments: list[Segment] = []
    first, is_cut = 0, False
    for last in range(len(turns)):
        if last + 1 < len(turns) and turns[last].end_in(turns[last + 1].prompt) is not None:
            continue
        fitting = (_segment(layout, turns, first, stop) for stop in range(last, first - 1, -1))
        segment = next((one for one in fitting if len(one.ids) <= max_length), None)
        whole = _segment(layout, turns, first, last)
        is_cut = is_cut or segment is None or len(segment.ids) < len(whole.ids)
        segments += [segment] if segment is not None else []
        first = last + 1
    return segments, is_cut


def _segment(layout: Layout, turns: Sequence[AssistantTurn], first: int, last: int) -> Segment:
    """The segment that ends with turn `last`, and in which the turns from `first` on are learnt."""
    prompt = turns[last].prompt
    shown = [place for place in range(last) if turns[place].end_in(prompt) is not None]
    numbers = iter(shown)
    ids: list[int] = []
    mask: list[bool] = []
    for piece in layout.encode_turns(prompt, turns[:last]):
        place = next(numbers) if piece[1] else None
        ids += piece[0]
        mask += _mask(layout, turns[place], len(piece[0])) if place is not None and place >= first else [False] * len(piece[0])
    thought, body = layout.encode_turn(turns[last], turns[last].ends[0])
    ids += thought + body
    mask += _mask(layout, turns[last], len(thought + body))
    start = mask.index(True)
    runs = [(is_trained, sum(1 for _ in run)) for is_trained, run in groupby(mask[start:])]
    untrained, position = [], start
    for is_trained, length in runs:
        untrained += [] if is_trained else [(position, position + length)]
        position += length
    return Segment(ids, start, tuple(untrained))


def _mask(layout: Layout, turn: AssistantTurn, length: int) -> list[bool]:
    """True for each token of a turn that is trained on: all, or all behind the thought."""
    hidden = len(layout.encode_turn(turn, "")[0]) if layout.reasoning == "mask" else 0
    return [False] * hidden + [True] * (length - hidden)
