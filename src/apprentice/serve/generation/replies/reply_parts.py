"""Parts of a chat's reply: content, thought and calls, read from its text as it comes."""

from __future__ import annotations

import uuid
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from apprentice.data.encoding.prompt_format import Layout
from apprentice.pretrained.replies.reply_parser import ReplyDelta, ReplyParser
from apprentice.serve.api.schemas.responses import CallDelta, CalledFunction, ChatDelta, ChatMessage, FunctionCall, FunctionDelta


@dataclass(frozen=True)
class PartReader:
    """How the replies to one request are read: in the syntax of `layout`, with calls of `tools` (none: calls are text)."""

    layout: Layout
    tools: tuple[dict[str, Any], ...] = ()
    is_in_thought: bool = False

    def parser(self) -> ReplyParser:
        """A parser of one reply."""
        return ReplyParser(self.layout.reply_syntax, self.tools, is_in_thought=self.is_in_thought)

    def thought_tokens(self, ids: Sequence[int]) -> int:
        """How many of a reply's tokens are its thought, with the texts around it."""
        thoughts, decode = self.layout.reply_syntax.thoughts, self.decode()
        if thoughts is None or not self.layout.leaves_thoughts:
            return 0
        if not self.is_in_thought and not decode(ids).lstrip().startswith(thoughts.opening.strip()):
            return 0
        closing = thoughts.closing.strip()
        return bisect_left(range(len(ids)), True, key=lambda end: closing in decode(ids[: end + 1])) + (closing in decode(ids))

    def decode(self) -> Callable[[Sequence[int]], str]:
        """Decoder of token ids that keeps the special tokens by which parts are told apart, and the others out."""
        tokenizer, markers = self.layout.tokenizer, self.layout.reply_syntax.markers
        dropped = {tokenizer.encode(text)[0] for text in tokenizer.special_texts if not any(text in marker for marker in markers)}
        return lambda ids: tokenizer.decode([id for id in ids if id not in dropped], skip_special=False)


def message_of(parts: Sequence[ReplyDelta]) -> ChatMessage:
    """The message of a whole reply; its content is null where it has calls alone."""
    content = "".join(part.content for part in parts)
    thought = "".join(part.reasoning for part in parts)
    calls: dict[int, tuple[str, str]] = {}
    for part in parts:
        if part.call is not None:
            name, arguments = calls.get(part.call, ("", ""))
            calls[part.call] = (name + (part.name or ""), arguments + part.arguments)
    more: dict[str, Any] = {"reasoning_content": thought} if thought else {}
    if calls:
        more["tool_calls"] = [
            FunctionCall(id=_call_id(), type="function", function=CalledFunction(name=name, arguments=arguments))
            for name, arguments in calls.values()
        ]
    return ChatMessage(role="assistant", content=content or (None if calls else ""), **more)


def delta_of(part: ReplyDelta) -> ChatDelta:
    """A part of a streamed message; the first part of a call has its id and its name."""
    if part.call is None:
        return ChatDelta(reasoning_content=part.reasoning) if part.reasoning else ChatDelta(content=part.content)
    if part.name is None:
        return ChatDelta(tool_calls=[CallDelta(index=part.call, function=FunctionDelta(arguments=part.arguments))])
    function = FunctionDelta(name=part.name, arguments=part.arguments)
    return ChatDelta(tool_calls=[CallDelta(index=part.call, id=_call_id(), type="function", function=function)])


def has_calls(parts: Sequence[ReplyDelta]) -> bool:
    """True if there is a part of a call."""
    return any(part.call is not None for part in parts)


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
