"""Tokenization of rendered examples within a length limit, many at once.

An example that is too long loses exemplars, from the last one, and then its input is cut from the end. Instruction and answer are
never cut. An example that still does not fit is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

from apprentice.data.encoding.dialogue_segments import (
    Segment,
    dialogue_of,
    encode_segments,
    messages_of,
    split_thought,
    without_thoughts,
)
from apprentice.data.encoding.prompt_format import Exemplar, Layout
from apprentice.errors import ChatTemplateError
from apprentice.tasks.schema import Example

# Reasons under which the mixture ledger counts examples that were cut or dropped.
CUT_EXEMPLARS = "truncated_exemplars"
CUT_INPUT = "truncated_input"
CUT_TURNS = "truncated_turns"
LAST_TURN_ONLY = "last_turn_only"  # the chat template changes earlier answers, so only the last one is trained on
TOO_LONG = "too_long"
REFUSED = "refused_by_template"  # the chat template raised an error over the messages
SECOND_THOUGHT = "second_thought"  # the prompt ends with a closed `<think>` block, and the answer has one of its own


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The token ids of one training example: prompt, answer and end tokens.

    All tokens from `prompt_length` on are trained on, except the ranges `untrained`.
    """

    ids: list[int]
    prompt_length: int
    exemplars_used: int
    truncated: str | None  # `CUT_EXEMPLARS`, `CUT_INPUT`, `CUT_TURNS` or `LAST_TURN_ONLY`; None where nothing was cut
    untrained: tuple[tuple[int, int], ...] = ()  # [start, stop) of a conversation's later questions, behind `prompt_length`
    rejected: Tokenized | None = None  # of a pair: the same prompt with the worse answer; of a labelled answer: with another row's
    is_desirable: bool | None = None  # label of the answer
    others: tuple[Tokenized, ...] = ()  # of a conversation whose prompts change between turns: its further segments

    @property
    def answers(self) -> tuple[Tokenized, ...]:
        """(itself,), for a pair (itself, rejected), or all segments of a conversation."""
        return (self, *self.others) if self.rejected is None else (self, self.rejected)

    @property
    def size(self) -> int:
        """Number of tokens; for a pair, those of both answers, each with its prompt; for a conversation, those of all segments."""
        return sum(len(answer.ids) for answer in self.answers)

    @property
    def target_tokens(self) -> int:
        """Number of tokens that are trained on, in all of `answers`."""
        untrained = sum(stop - start for answer in self.answers for start, stop in answer.untrained)
        return sum(len(answer.ids) - answer.prompt_length for answer in self.answers) - untrained


class FittedPrompt(NamedTuple):
    """A prompt cut to its limit, with what was cut (`truncated`, as in `Tokenized`)."""

    ids: list[int]
    exemplars_used: int
    truncated: str | None


def encode(
    layout: Layout,
    items: Sequence[tuple[Example, Sequence[Exemplar]]],
    max_length: int,
    target_length: int | None = None,
    row_length: int | None = None,
) -> list[Tokenized | None]:
    """Token ids of every (example, exemplars), at most `max_length` tokens each; None for a dropped one (see `drop_reason`).

    With a `target_length`, for encoder-decoders, `max_length` bounds the prompt alone and `target_length` the answer. The segments
    of a conversation have at most `row_length` tokens together (default: `max_length`).
    All prompts are tokenized in one batch, and all answers in another.
    """
    if layout.reasoning == "drop":
        items = [(without_thoughts(example), exemplars) for example, exemplars in items]
    if any(example.has_turns for example, _ in items):
        single = iter(encode(layout, [item for item in items if not item[0].has_turns], max_length, target_length))
        room = row_length or max_length
        return [_conversation(layout, item[0], max_length, room) if item[0].has_turns else next(single) for item in items]
    prompts = _prompts(layout, items)
    thoughts, answers = _encode_targets(layout, [example.target for example, _ in items])
    end = list(layout.end_ids)
    tokenized: list[Tokenized | None] = []
    for (example, shots), prompt, thought, answer in zip(items, prompts, thoughts, answers, strict=True):
        if prompt is None or _has_second_thought(layout, example):
            tokenized.append(None)
            continue
        answer = thought + answer + end
        # A causal answer shares `max_length` with its prompt; an encoder-decoder's has a side of its own.
        room, answer_room = (max_length - len(answer), max_length) if target_length is None else (max_length, target_length)
        fitted: FittedPrompt | None = FittedPrompt(prompt, len(shots), None)
        if len(answer) > answer_room:
            fitted = None
        elif len(prompt) > room:
            fitted = fit_prompt(layout, example, shots, room)
        if fitted is None:
            tokenized.append(None)
            continue
        learnt_from = len(fitted.ids) + (len(thought) if layout.reasoning == "mask" else 0)
        tokenized.append(Tokenized(fitted.ids + answer, learnt_from, fitted.exemplars_used, fitted.truncated))
    return tokenized


def _encode_targets(layout: Layout, targets: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of every answer's thought, and of the rest; all is rest where thoughts are no matter of their own."""
    syntax = layout.reply_syntax.thoughts
    if not layout.leaves_thoughts or syntax is None:
        return [[] for _ in targets], layout.encode_answers(targets)
    is_open = layout.opens_thought
    thoughts, rests = [], []
    for target in targets:
        thought, rest = split_thought(target)
        text = "" if thought is None and not is_open else syntax.write(thought or "", "")
        thoughts.append(text.removeprefix(syntax.opening) if is_open else text)
        rests.append(rest)
    return layout.encode_answers(thoughts), layout.encode_answers(rests)


def drop_reason(layout: Layout, example: Example, exemplars: Sequence[Exemplar] = ()) -> str:
    """Why `encode` dropped this example: `REFUSED`, `SECOND_THOUGHT` or `TOO_LONG`."""
    if _has_second_thought(layout, example):
        return SECOND_THOUGHT
    try:
        _prompt_text(layout, example, exemplars)
    except ChatTemplateError:
        return REFUSED
    return TOO_LONG


def _has_second_thought(layout: Layout, example: Example) -> bool:
    turns = layout.turns
    if layout.leaves_thoughts:
        return False
    return turns is not None and turns.closes_a_thought and any("</think>" in text for text in (example.target, example.rejected))


def _prompt_text(layout: Layout, example: Example, exemplars: Sequence[Exemplar]) -> str:
    """The text of an example's prompt. Raises `ChatTemplateError` where the chat template refuses it."""
    if example.has_turns:
        messages, tools = chat_of(layout, example)
        return layout.chat_prompt(messages, tools)
    return layout.prompt(example.instruction, example.input, exemplars)


def _prompts(layout: Layout, items: Sequence[tuple[Example, Sequence[Exemplar]]]) -> list[list[int] | None]:
    """Prompt ids of every item: empty for conversations, None where the chat template refuses the item."""
    texts: list[str | None] = []
    for example, shots in items:
        try:
            texts.append("" if example.has_turns else _prompt_text(layout, example, shots))
        except ChatTemplateError:
            texts.append(None)
    encoded = layout.encode_prompts([text or "" for text in texts])
    return [None if text is None else ids for text, ids in zip(texts, encoded, strict=True)]


def encode_pairs(layout: Layout, examples: Sequence[Example], max_length: int) -> list[Tokenized | None]:
    """Token ids of preference pairs: prompt and better answer, and the same prompt with the worse answer in `rejected`.

    Each of the two has at most `max_length` tokens: the prompt is cut to leave room for the longer answer. None for a dropped
    example (see `drop_reason`). Of a conversation only the last answers are compared; earlier turns belong to the prompt.
    """
    examples = _shown_examples(layout, examples)
    better = layout.encode_answers([example.target for example in examples])
    worse = layout.encode_answers([example.rejected for example in examples])
    end = list(layout.end_ids)
    rooms = [max_length - max(map(len, answers)) - len(end) for answers in zip(better, worse, strict=True)]
    tokenized: list[Tokenized | None] = []
    for fitted, chosen, rejected in zip(_fit_prompts(layout, examples, rooms), better, worse, strict=True):
        if fitted is None:
            tokenized.append(None)
            continue
        both = [Tokenized(fitted.ids + ids + end, len(fitted.ids), 0, fitted.truncated) for ids in (chosen, rejected)]
        tokenized.append(replace(both[0], rejected=both[1]))
    return tokenized


def encode_labelled(layout: Layout, items: Sequence[tuple[Example, Sequence[Exemplar]]], max_length: int) -> list[Tokenized | None]:
    """Token ids of labelled answers, at most `max_length` each; in `rejected` the same prompt with the exemplar's answer.

    The exemplar's answer is cut where it is too long, so that it decides on nothing. None for a dropped example (see
    `drop_reason`). Earlier turns of a conversation belong to the prompt.
    """
    examples = _shown_examples(layout, [example for example, _ in items])
    answers = layout.encode_answers([example.target for example in examples])
    beside = [shots[0].answer if shots else "" for _, shots in items]
    others = layout.encode_answers([split_thought(text)[1] for text in beside] if layout.reasoning == "drop" else beside)
    end = list(layout.end_ids)
    rooms = [max_length - len(answer) - len(end) for answer in answers]
    tokenized: list[Tokenized | None] = []
    prompts = _fit_prompts(layout, examples, rooms)
    for example, fitted, answer, other in zip(examples, prompts, answers, others, strict=True):
        if fitted is None:
            tokenized.append(None)
            continue
        room = max_length - len(fitted.ids) - len(end)
        mine, mismatched = (
            Tokenized(fitted.ids + ids + end, len(fitted.ids), 0, fitted.truncated) for ids in (answer, other[:room])
        )
        tokenized.append(replace(mine, rejected=mismatched, is_desirable=example.is_desirable))
    return tokenized


def encode_prompts(layout: Layout, examples: Sequence[Example], max_prompt_tokens: int) -> list[Tokenized | None]:
    """Prompts alone, for on-policy training, in at most `max_prompt_tokens` each; None for a dropped one (see `drop_reason`)."""
    tokenized = _fit_prompts(layout, _shown_examples(layout, examples), [max_prompt_tokens] * len(examples))
    return [fitted and Tokenized(fitted.ids, len(fitted.ids), 0, fitted.truncated) for fitted in tokenized]


def _shown_examples(layout: Layout, examples: Sequence[Example]) -> list[Example]:
    """The examples as texts show them: without thoughts where `layout` drops them."""
    return [without_thoughts(example) if layout.reasoning == "drop" else example for example in examples]


def _fit_prompts(layout: Layout, examples: Sequence[Example], rooms: Sequence[int]) -> list[FittedPrompt | None]:
    """The prompt of every example in at most `rooms[i]` tokens; a conversation's prompt is all before its last answer."""
    prompts_in_room: list[FittedPrompt | None] = []
    for example, prompt, room in zip(examples, _prompts(layout, [(one, ()) for one in examples]), rooms, strict=True):
        fitted = None if prompt is None else FittedPrompt(prompt, 0, None)
        if prompt is None or room <= 0 or _has_second_thought(layout, example):
            fitted = None
        elif example.has_turns or len(prompt) > room:
            fitted = fit_prompt(layout, example, (), room)
        prompts_in_room.append(fitted)
    return prompts_in_room


def chat_of(layout: Layout, example: Example) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A conversation up to its last answer, as OpenAI-style messages, and its functions."""
    if example.dialogue is not None or layout.leaves_thoughts:
        dialogue = dialogue_of(example)
        return messages_of(dialogue)[:-1], [json.loads(tool) for tool in dialogue.tools]
    return _messages(example), []


def _messages(example: Example) -> list[dict[str, Any]]:
    """A plain conversation up to its last question, as OpenAI-style messages."""
    system = [{"role": "system", "content": example.system}] if example.system else []
    turns = [
        {"role": role, "content": text} for turn in example.history for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return [*system, *turns, {"role": "user", "content": example.instruction}]


def _conversation(layout: Layout, example: Example, max_length: int, row_length: int) -> Tokenized | None:
    """A conversation in which every answer is trained on; one that is too long loses its last turns, or is dropped if none fits."""
    if example.dialogue is not None or layout.leaves_thoughts:
        return _dialogue(layout, example, max_length, row_length)
    try:
        pieces = layout.chat_pieces(_messages(example))
    except ChatTemplateError:
        return None
    if _has_second_thought(layout, example):
        return None
    pieces.append((layout.encode_answers([example.target])[0] + list(layout.end_ids), True))
    truncated = LAST_TURN_ONLY if example.history and len(pieces) == 2 else None
    while pieces and sum(len(piece) for piece, _ in pieces) > max_length:
        pieces, truncated = pieces[:-2], CUT_TURNS
    if not pieces:
        return None
    bounds = [0, *accumulate(len(piece) for piece, _ in pieces)]
    untrained = tuple((bounds[place], bounds[place + 1]) for place in range(2, len(pieces), 2))
    return Tokenized([id for piece, _ in pieces for id in piece], bounds[1], 0, truncated, untrained)


def _dialogue(layout: Layout, example: Example, max_length: int, row_length: int) -> Tokenized | None:
    """A conversation with functions or thoughts, in as many segments as its prompts change."""
    dialogue = dialogue_of(example)
    try:
        tools = [json.loads(tool) for tool in dialogue.tools]
        segments, is_cut = encode_segments(layout, messages_of(dialogue), tools, max_length)
    except ChatTemplateError:
        return None
    while segments and sum(len(segment.ids) for segment in segments) > row_length:
        segments, is_cut = segments[:-1], True
    parts = [_tokenized(segment, CUT_TURNS if is_cut else None) for segment in segments]
    return replace(parts[0], others=tuple(parts[1:])) if parts else None


def _tokenized(segment: Segment, truncated: str | None) -> Tokenized:
    return Tokenized(segment.ids, segment.prompt_length, 0, truncated, segment.untrained)


def fit_prompt(layout: Layout, example: Example, exemplars: Sequence[Exemplar], max_prompt_tokens: int) -> FittedPrompt | None:
    """The prompt of `example` in at most `max_prompt_tokens`; None where the instruction alone is too long or is refused."""
    try:
        return _fit(layout, example, exemplars, max_prompt_tokens)
    except ChatTemplateError:
        return None


def _fit(layout: Layout, example: Example, exemplars: Sequence[Exemplar], max_prompt_tokens: int) -> FittedPrompt | None:
    if example.has_turns:
        ids = layout.encode_chat(*chat_of(layout, example))
        return FittedPrompt(ids, 0, None) if len(ids) <= max_prompt_tokens else None
    ids = []
    for used in range(len(exemplars), -1, -1):
        ids = layout.encode_prompt(layout.prompt(example.instruction, example.input, exemplars[:used]))
        if len(ids) <= max_prompt_tokens:
            return FittedPrompt(ids, used, CUT_EXEMPLARS if used < len(exemplars) else None)
    input_text, tokens = example.input, len(layout.tokenizer.encode(example.input))
    while input_text:
        # Tokens can merge differently at the cut, so one round is not always enough.
        tokens -= len(ids) - max_prompt_tokens
        input_text = layout.tokenizer.truncate(example.input, max(tokens, 0))
        ids = layout.encode_prompt(layout.prompt(example.instruction, input_text))
        if len(ids) <= max_prompt_tokens:
            return FittedPrompt(ids, 0, CUT_INPUT)
    return None
