"""Reply syntax: the texts that a chat template writes around function calls and around thoughts.

    <tool_call>⏎{"name": "weather", "arguments": {"city": "Oslo"}}⏎</tool_call>      kind `object`
    [TOOL_CALLS]weather[ARGS]{"city": "Oslo"}                                         kind `named`
    <function=weather>⏎<parameter=city>⏎Oslo⏎</parameter>⏎</function>                 kind `fields`
    <|tool_call_start|>[weather(city="Oslo")]<|tool_call_end|>                        kind `python`

`template_probe.read_reply_syntax` finds it by rendering; no model's name is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from apprentice.tasks.dialogue import ToolCall

CallKind = Literal["object", "named", "fields", "python"]


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """Texts around function calls.

    One call is `begin` + `opening` + name + `middle` + arguments + `closing` + `end`; several calls have `between` in place of
    `end` and `begin` between them, or are refused by the template (`is_parallel` is false).
    """

    kind: CallKind
    begin: str
    opening: str
    middle: str
    closing: str
    between: str
    end: str
    turn_end: str = ""  # behind the last call, up to the control token that ends the turn
    is_parallel: bool = True
    name_key: str = "name"  # of an `object`
    arguments_key: str = "arguments"
    key_opening: str = ""  # of `fields`: before each argument's name
    key_closing: str = ""  # between an argument's name and its value
    value_closing: str = ""  # behind its value, before `key_opening` or `closing`
    has_text_arguments: bool = False  # the template takes the arguments as a text, and fails over a mapping

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The text of these calls, without `turn_end`."""
        return self.begin + self.between.join(self._one(call) for call in calls) + self.end if calls else ""

    def _one(self, call: ToolCall) -> str:
        if self.kind == "fields":
            fields = self.value_closing.join(
                f"{self.key_opening}{key}{self.key_closing}{value if isinstance(value, str) else _json(value)}"
                for key, value in (call.values or {}).items()
            )
            return self.opening + call.name + self.middle + fields + (self.value_closing if fields else "") + self.closing
        if self.kind == "python":
            pairs = ", ".join(f"{key}={value!r}" for key, value in (call.values or {}).items())
            return self.opening + call.name + self.middle + pairs + self.closing
        values = call.values
        text = call.arguments if values is None else _json(values)
        return self.opening + call.name + self.middle + text + self.closing


@dataclass(frozen=True, slots=True)
class ThoughtSyntax:
    """Texts around a thought: `opening` (`<think>⏎`), the thought, `closing` (`⏎</think>⏎⏎`), then the answer.

    `is_rendered` is true where the template itself writes a message's `reasoning_content`; elsewhere the tags stand in the answer's
    text, as the template takes thoughts out of earlier turns.
    """

    opening: str
    closing: str
    is_rendered: bool = True
    call_closing: str = ""  # in place of `closing` where a call follows at once and the two differ (gpt-oss)

    def write(self, thought: str, answer: str) -> str:
        """Thought and answer as one text."""
        return self.opening + thought.strip("\n") + self.closing + answer


@dataclass(frozen=True, slots=True)
class ReplySyntax:
    """How a template's replies write calls and thoughts; None for what the template has no form for."""

    calls: CallSyntax | None = None
    thoughts: ThoughtSyntax | None = None
    answer_opening: str = (
        ""  # before an answer in words, where a prompt with functions leaves that to the reply (gpt-oss's channel)
    )

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that a decoded reply must still hold, control tokens or not, so that it can be read."""
        texts = [] if self.calls is None else [self.calls.begin, self.calls.between, self.calls.end, self.calls.middle]
        texts += [] if self.thoughts is None else [self.thoughts.opening, self.thoughts.closing, self.thoughts.call_closing]
        texts.append(self.answer_opening)
        return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))

    def is_in_thought(self, prompt: str) -> bool:
        """True if a prompt ends within a thought, so that its reply begins with one."""
        opening = self.thoughts.opening.strip() if self.thoughts is not None else ""
        return bool(opening) and prompt.rstrip().endswith(opening)


# Our own form for templates that know no functions: that of Hermes (NousResearch) and Qwen.
OWN_CALLS = CallSyntax(
    "object",
    begin="<tool_call>\n",
    opening='{"name": "',
    middle='", "arguments": ',
    closing="}",
    between="\n</tool_call>\n<tool_call>\n",
    end="\n</tool_call>",
)


def tool_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Function name → JSON Schema of its arguments, for tools in OpenAI's form or bare functions."""
    functions = [tool.get("function", tool) for tool in tools]
    return {str(function["name"]): function.get("parameters") or {} for function in functions}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
