"""How a chat template writes answers: what stands before one, what ends it, and whether earlier ones stand as the last one does.

Found by rendering short conversations and looking at what is around the answers; nothing is known of any template beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from apprentice.errors import ContractError

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]  # messages, whether the assistant's turn is opened → text
_QUESTION, _ANSWER, _NEXT = "\u2402question\u2403", "\u2402answer\u2403", "\u2402next\u2403"


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template writes around answers.

    A prompt is the text that the template opens a turn with, without `withdrawn` at its end (an open thought, where plain answers
    have none) and with `lead` behind it (a channel's marks, an empty thought): what the template itself writes before an answer.
    """

    withdrawn: str
    lead: str
    end: str  # behind the last answer, up to the token that ends it
    inner_end: str  # behind an earlier answer
    space: str  # before an answer, which prompts leave out: with it they would end in half a word
    alike: bool  # an earlier answer has the prompt that it had when it was the last

    def opened(self, text: str) -> str:
        """The prompt, of the text with the assistant's turn opened."""
        return text.removesuffix(self.withdrawn) + self.lead

    @property
    def remarks(self) -> str:
        """What a person may not expect of the template, each remark behind a comma."""
        beyond = f", {self.lead!r} belongs to the prompt" if self.lead else ""
        without = f", prompts go without the template's {self.withdrawn!r}" if self.withdrawn else ""
        return beyond + without + ("" if self.alike else ", of a conversation only the last answer is learnt")

    @property
    def closes_a_thought(self) -> bool:
        """True if the prompt ends a thought, so that an answer with one of its own would be a second."""
        return "</think>" in self.lead


def read_turns(render: Render, control: re.Pattern[str], fallback: str) -> Turns:
    """The turns of a template. `control` matches what may end a turn; `fallback` ends one that the template does not end.

    Raises `ContractError` where the template writes answers in another place than behind the turn that it opens.
    """
    asked = {"role": "user", "content": _QUESTION}
    answered = [asked, {"role": "assistant", "content": _ANSWER}]
    opened = render([asked], True)
    last, _, behind_last = render(answered, False).partition(_ANSWER)
    inner, _, behind_inner = render([*answered, {"role": "user", "content": _NEXT}], True).partition(_ANSWER)
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
    # What both end with is the end; where they differ (gpt-oss, GLM-4), each has its own.
    shared = _up_to_control(_common_start(behind_last, between), control, last=True)
    inner_end = shared or _up_to_control(between, control)
    end = shared or _up_to_control(behind_last, control) or inner_end or behind_last.rstrip() or fallback
    bare = lead.rstrip(" ")
    return Turns(withdrawn, bare, end, inner_end or end, lead.removeprefix(bare), alike)


def _common_start(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _up_to_control(text: str, control: re.Pattern[str], *, last: bool = False) -> str:
    """The start of `text` up to its first (or last) control token; empty where it has none."""
    ends = [found.end() for found in control.finditer(text)]
    return text[: ends[-1 if last else 0]] if ends else ""
