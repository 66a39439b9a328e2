"""Turns of a chat template: the text it writes before and behind an answer, found by rendering short probe conversations.

For ChatML, a conversation is

    <|im_start|>user⏎Why?<|im_end|>⏎<|im_start|>assistant⏎Because.<|im_end|>⏎

The text up to `assistant⏎` is the prompt, and `end` is `<|im_end|>`. No template is known beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from apprentice.errors import ContractError

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]  # (messages, add the opening of the assistant's turn) → text
_QUESTION, _ANSWER, _NEXT = "\u2402question\u2403", "\u2402answer\u2403", "\u2402next\u2403"

# Probe questions: texts that chat templates are known to react to, and others that they might.
PROBE_QUESTIONS = (
    "a",
    "B\n\nc",
    "<think>d</think>e",
    "<tool_response>f</tool_response>",
    "{{ g }}",
    "<|h|>",
    "</s>",
    "[INST] i [/INST]",
    "é字",
)


@dataclass(frozen=True, slots=True)
class Turns:
    """The texts that a chat template writes around answers.

    The text with an opened assistant turn (`add_generation_prompt`) can differ from the text before an answer that is already in
    the messages. The prompt follows the latter: the opened text without `withdrawn`, plus `lead`.
    """

    withdrawn: str  # removed from the end of the opened text, such as `<think>` where answers without a thought have none
    lead: str  # added behind it, such as a channel's tokens or an empty thought
    end: str  # behind the last answer, up to the token that ends it
    inner_end: str  # behind an earlier answer
    space: str  # spaces before an answer, which prompts leave out, since they would end in half a word otherwise
    alike: bool  # True if an earlier answer has the same text before it as when it was the last one

    def opened(self, text: str) -> str:
        """The prompt for `text`, which is rendered messages with the assistant's turn opened."""
        return text.removesuffix(self.withdrawn) + self.lead

    @property
    def remarks(self) -> str:
        """Unusual properties of the template for messages to people, each behind a comma; empty if there are none."""
        beyond = f", {self.lead!r} belongs to the prompt" if self.lead else ""
        without = f", prompts go without the template's {self.withdrawn!r}" if self.withdrawn else ""
        return beyond + without + ("" if self.alike else ", of a conversation only the last answer is learnt")

    @property
    def closes_a_thought(self) -> bool:
        """True if the prompt has a closed `<think>` block, so that an answer with one would have two."""
        return "</think>" in self.lead


def read_turns(render: Render, control: re.Pattern[str], fallback: str) -> Turns:
    """Probes a template, given as its `render` function, for the texts around answers.

    `control` matches the control tokens that may end a turn; `fallback` is the end for a template that writes none. Raises
    `ContractError` where the template writes a question in one way before an answer and in another before an opened turn, so that
    no prompt would match the text that is trained on.
    """
    question = {"role": "user", "content": _QUESTION}
    conversation = [question, {"role": "assistant", "content": _ANSWER}]
    opened = render([question], True)
    last, _, behind_last = render(conversation, False).partition(_ANSWER)
    inner, _, behind_inner = render([*conversation, {"role": "user", "content": _NEXT}], True).partition(_ANSWER)
    before, alike = (inner, True) if inner.startswith(opened) else (last, inner == last)
    common = _common_start(opened, before)
    if _QUESTION not in common:
        raise ContractError(
            f"the chat template writes {opened[-60:]!r} where it opens an assistant's turn and {before[-60:]!r} before an"
            " answer, other texts around the same question: what is learnt would not be what is asked for. Give one that writes"
            " questions alike in data.chat_template."
        )
    withdrawn, lead = opened.removeprefix(common), before.removeprefix(common)
    between = behind_inner.partition(_NEXT)[0]
    # The end is what follows both the last and an earlier answer; where these differ (gpt-oss, GLM-4), each has its own.
    shared = _up_to_control(_common_start(behind_last, between), control, last=True)
    inner_end = shared or _up_to_control(between, control)
    end = shared or _up_to_control(behind_last, control) or inner_end or behind_last.rstrip() or fallback
    bare = lead.rstrip(" ")
    return Turns(withdrawn, bare, end, inner_end or end, lead.removeprefix(bare), alike)


def _common_start(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _up_to_control(text: str, control: re.Pattern[str], *, last: bool = False) -> str:
    """The start of `text` up to its first (or last) control token; empty where it has none."""
    ends = [match.end() for match in control.finditer(text)]
    return text[: ends[-1 if last else 0]] if ends else ""
