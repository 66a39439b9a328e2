"""Conversations with functions and thoughts as a chat template writes them: each turn of the assistant with the prompt before it.

The text of a turn is what the template writes behind the turn's own prompt. Thoughts of earlier turns are what the template makes
of them, so the prompt of a later turn may not begin with the text of an earlier one; `split` says where it does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apprentice.data.encoding.chat_turns import Turns
from apprentice.errors import ChatTemplateError
from apprentice.pretrained.replies.reply_syntax import OWN_CALLS, ReplySyntax
from apprentice.pretrained.replies.template_probe import RenderChat
from apprentice.tasks.dialogue import ToolCall

ChatMessage = Mapping[str, Any]  # in OpenAI's form
_OWN_HEAD = (
    "You may call functions. Their signatures, one in a line:\n<tools>\n{tools}\n</tools>\n"
    "Write each call as a JSON object within tags:\n"
    '<tool_call>\n{{"name": <function>, "arguments": {{<name>: <value>}}}}\n</tool_call>'
)


@dataclass(frozen=True, slots=True)
class AssistantTurn:
    """One turn of the assistant: the prompt before it, its thought with the tags, its text, and the ends that it may have."""

    prompt: str
    thought: str
    body: str
    ends: tuple[str, ...]  # the last turn of a conversation has the first

    def end_in(self, text: str) -> str | None:
        """The end with which this turn stands at the start of `text`; None where the template wrote it in another way."""
        start = self.prompt + self.thought + self.body
        return next((end for end in self.ends if text.startswith(start + end)), None)


TurnPiece = str | tuple[AssistantTurn, str]  # text that is no answer, or a turn with its end


class DialogueTemplate:
    """Writes conversations by a chat template.

    `render` renders escaped messages, `escape` escapes a text's control tokens. With `has_own_form` functions are written in a form
    of our own, for a template that knows none. With `leaves_thoughts` the prompt ends as the template opens a turn, and the reply
    begins with its thought; without, thoughts are left out.
    """

    def __init__(
        self,
        render: RenderChat,
        escape: Callable[[str], str],
        turns: Turns,
        form: ReplySyntax,
        *,
        has_own_form: bool,
        leaves_thoughts: bool,
    ) -> None:
        self._render, self._escape, self._turns, self._form = render, escape, turns, form
        self._has_own_form, self._leaves_thoughts = has_own_form, leaves_thoughts

    def prompt(self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> str:
        """The escaped text up to where the assistant's turn starts. Raises `ChatTemplateError`."""
        text = self._text(messages, tools, generate=True)
        if self._leaves_thoughts:
            return text
        is_left_open = bool(tools) and bool(self._form.answer_opening) and not self._has_own_form
        return text.removesuffix(self._turns.withdrawn) + ("" if is_left_open else self._turns.lead)

    def turn(self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> AssistantTurn:
        """The last of `messages`, a turn of the assistant. Raises `ChatTemplateError` where it does not follow its own prompt."""
        prompt, whole = self.prompt(messages[:-1], tools), self._text(messages, tools, generate=False)
        start = next((text for text in (prompt, prompt.removesuffix(self._turns.withdrawn)) if whole.startswith(text)), None)
        if start is None:
            raise ChatTemplateError(
                f"the chat template opens the assistant's turn with {prompt[-40:]!r}, which the turn itself does not begin with;"
                " give another one in data.chat_template."
            )
        calls = self._form.calls
        own_end = calls.turn_end if calls is not None and messages[-1].get("tool_calls") else ""
        ends = tuple(dict.fromkeys(filter(None, [own_end, self._turns.end, self._turns.inner_end])))
        rest = whole[len(start) :]
        end = next((end for end in ends if end in rest), None)
        body = rest.rstrip() if end is None else rest[: rest.rfind(end)]
        reasoning = messages[-1].get("reasoning_content") if self._leaves_thoughts else None
        thought, body = self._split_thought(prompt, body, reasoning)
        return AssistantTurn(prompt, thought, body, ends)

    def turns(self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> list[AssistantTurn]:
        """All turns of the assistant."""
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return [self.turn(messages[: place + 1], tools) for place in places]

    @staticmethod
    def split(prompt: str, earlier: Sequence[AssistantTurn]) -> list[TurnPiece]:
        """A prompt in pieces: those `earlier` turns that stand in it as they were learnt, and the text between them."""
        pieces: list[TurnPiece] = []
        position = 0
        for turn in earlier:
            if (end := turn.end_in(prompt)) is not None:
                pieces += [prompt[position : len(turn.prompt)], (turn, end)]
                position = len(turn.prompt + turn.thought + turn.body + end)
        return [*pieces, prompt[position:]]

    def _split_thought(self, prompt: str, body: str, reasoning: str | None) -> tuple[str, str]:
        """A turn's thought with its tags, and the rest; the thought is empty where there is none."""
        form = self._form.thoughts
        if form is None:
            return "", body
        is_open = self._form.is_in_thought(prompt)
        if not form.is_rendered and (reasoning is not None or is_open):
            text = form.write(self._escape(reasoning or ""), "")
            return (text.removeprefix(form.opening) if is_open else text), body
        if reasoning is None and not is_open:
            empty = rf"\s*{re.escape(form.opening.strip())}\s*{re.escape(form.closing.strip())}\s*"
            return "", re.sub(rf"^{empty}", "", body)
        closings = [text for text in (form.closing, form.call_closing, form.closing.strip()) if text and text in body]
        if not closings:
            return "", body
        start, behind = min((body.index(text), -len(text)) for text in closings)
        return body[: start - behind], body[start - behind :]

    def _text(self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]], *, generate: bool) -> str:
        if self._has_own_form:
            messages, tools = write_in_own_form(messages, tools), ()
        shaped = self._shaped(messages)
        return self._render(shaped, tools=[self._escaped(tool) for tool in tools] or None, generate=generate)

    def _shaped(self, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
        """Messages as templates read them, escaped; calls are numbered in order, whatever ids they came with."""
        shaped: list[dict[str, Any]] = []
        names: dict[str, tuple[str, str]] = {}  # id of a call → our id, function
        waiting: list[tuple[str, str]] = []
        for message in messages:
            one: dict[str, Any] = {"role": message["role"], "content": self._escape(text_of_content(message.get("content")))}
            if calls := message.get("tool_calls"):
                one["tool_calls"] = [self._call(call, number) for number, call in enumerate(calls, len(names))]
                fresh = [(f"call{number:05}", call["function"]["name"]) for number, call in enumerate(calls, len(names))]
                names |= {str(call.get("id") or own[0]): own for call, own in zip(calls, fresh, strict=True)}
                waiting = list(fresh)
            if message["role"] == "tool":
                known = names.get(str(message.get("tool_call_id")))
                own = known or (waiting[0] if waiting else ("call00000", str(message.get("name") or "")))
                waiting = [one for one in waiting if one != own]
                one |= {"tool_call_id": own[0], "name": own[1]}
            reasoning = message.get("reasoning_content")
            if reasoning is not None and self._leaves_thoughts and self._form.thoughts is not None:
                is_last = message is messages[-1]
                if self._form.thoughts.is_rendered:
                    text = self._escape(reasoning)
                    one |= {"reasoning_content": text, "thinking": text}
                elif not is_last:
                    one["content"] = self._form.thoughts.write(self._escape(reasoning), one["content"])
            shaped.append(one)
        return shaped

    def _call(self, call: Mapping[str, Any], number: int) -> dict[str, Any]:
        function = call["function"]
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            values = ToolCall("", arguments).values
            arguments = arguments if values is None else values
        escaped = self._escaped(arguments)
        if self._form.calls is not None and self._form.calls.has_text_arguments and not isinstance(escaped, str):
            escaped = json.dumps(escaped, ensure_ascii=False)
        function = {"name": self._escape(function["name"]), "arguments": escaped}
        return {"type": "function", "id": f"call{number:05}", "function": function}

    def _escaped(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._escape(value)
        if isinstance(value, Mapping):
            return {self._escape(str(key)): self._escaped(inner) for key, inner in value.items()}
        return [self._escaped(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_in_own_form(messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with functions in the system text, calls in the assistant's and results in the user's, for any template."""
    plain: list[dict[str, Any]] = []
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        is_first = bool(messages) and messages[0]["role"] == "system"
        before = f"{text_of_content(messages[0].get('content'))}\n\n" if is_first else ""
        plain.append({"role": "system", "content": before + _OWN_HEAD.format(tools=listed)})
        messages = messages[1:] if is_first else messages
    for message in messages:
        one = {"role": message["role"], "content": text_of_content(message.get("content"))}
        if message.get("reasoning_content") is not None:
            one["reasoning_content"] = message["reasoning_content"]
        if calls := message.get("tool_calls"):
            text = OWN_CALLS.write([own_call(call) for call in calls])
            one["content"] = "\n".join(filter(None, [one["content"], text]))
        if message["role"] == "tool":
            one = {"role": "user", "content": f"<tool_response>\n{one['content']}\n</tool_response>"}
            if plain and plain[-1]["role"] == "user" and plain[-1]["content"].endswith("</tool_response>"):
                one["content"] = f"{plain.pop()['content']}\n{one['content']}"
        plain.append(one)
    return plain


def own_call(call: Mapping[str, Any]) -> ToolCall:
    """A call of a message in OpenAI's form."""
    arguments = call["function"].get("arguments") or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(str(call["function"]["name"]), text)


def text_of_content(content: Any) -> str:
    """A message's content as one text; that of a list of parts, joined by newlines."""
    if isinstance(content, list | tuple):
        return "\n".join(str(part["text"]) for part in content if part.get("text"))
    return "" if content is None else str(content)
