"""Probe of a chat template for its reply syntax: short conversations with calls and thoughts are rendered and looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, Protocol

from apprentice.errors import ChatTemplateError
from apprentice.pretrained.replies.reply_syntax import CallSyntax, ReplySyntax, ThoughtSyntax

_QUESTION = {"role": "user", "content": "\u2402question\u2403"}
_NAMES = ("probe_alpha", "probe_beta")
_KEYS = ("probe_key", "probe_count")
_VALUES: dict[str, Any] = {_KEYS[0]: "probe-value", _KEYS[1]: 73019}
_SHOWN, _RESULT, _THOUGHT, _ANSWER = "probe-description", "probe-result", "probe-thought", "probe-answer"
TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": _SHOWN,
            "parameters": {
                "type": "object",
                "properties": {
                    _KEYS[0]: {"type": "string", "description": "a"},
                    _KEYS[1]: {"type": "integer", "description": "b"},
                },
                "required": list(_KEYS),
            },
        },
    }
    for name in _NAMES
)


class RenderChat(Protocol):
    """Renders messages by a chat template; `generate` opens the assistant's turn. Raises `ChatTemplateError`."""

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None, generate: bool
    ) -> str: ...


class ToolSupport:
    """What a chat template shows of a conversation with functions: the list of functions, calls, and results."""

    def __init__(self, render: RenderChat) -> None:
        self.has_text_arguments = False
        self._render = render
        self.shows_tools = _SHOWN in self._text([_QUESTION], TOOLS, generate=True)
        self.one = self._calls(1)
        two = self._calls(2)
        self.two = two if _NAMES[1] in two else ""  # gpt-oss shows the first of several calls only
        answer = {"role": "assistant", "content": _ANSWER}
        self.shows_calls = bool(self.one)
        self.shows_results = _RESULT in self._text([_QUESTION, *_turn(1, self.has_text_arguments), answer], TOOLS)

    @property
    def is_whole(self) -> bool:
        """True if the template shows all three."""
        return self.shows_tools and self.shows_calls and self.shows_results

    @property
    def lacks(self) -> tuple[str, ...]:
        """What it drops without a word."""
        parts = {"the list of tools": self.shows_tools, "calls": self.shows_calls, "results of calls": self.shows_results}
        return tuple(part for part, is_shown in parts.items() if not is_shown)

    def _calls(self, count: int) -> str:
        """The text of a turn with `count` calls behind its opening; empty where the template refuses it, or it cannot be read."""
        for as_text in (False, True):
            messages = [_QUESTION, _turn(count, as_text)[0]]
            opened = self._text([_QUESTION], TOOLS, generate=True)
            text = self._text(messages, TOOLS)
            body = text[len(_common_start(opened, text)) :]
            if any(read(body) is not None for read in _READERS):
                self.has_text_arguments = as_text
                return body
        return ""

    def behind_calls(self) -> str:
        """The text that follows a turn with one call and its result, for the end of the turn."""
        text = self._text([_QUESTION, *_turn(1, self.has_text_arguments)], TOOLS)
        return text.rpartition(str(_VALUES[_KEYS[1]]))[2]

    def behind_thought(self) -> str:
        """The text that follows a thought which a call follows at once."""
        turn = _turn(1, self.has_text_arguments)[0] | {"reasoning_content": _THOUGHT, "thinking": _THOUGHT}
        return self._text([_QUESTION, turn], TOOLS).partition(_THOUGHT)[2]

    def _text(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, generate: bool = False) -> str:
        try:
            return self._render(messages, tools=tools, generate=generate)
        except ChatTemplateError:
            return ""


def read_reply_syntax(render: RenderChat, source: str, control: re.Pattern[str]) -> ReplySyntax:
    """The reply syntax of the template that `render` renders and `source` is the text of; `control` matches its control tokens.

    `calls` is None where the template does not show functions, their calls and their results, all three.
    """
    support = ToolSupport(render)
    thoughts = read_thought_syntax(render, source)
    calls = read_call_syntax(support, thoughts, control) if support.is_whole else None
    if calls is None or thoughts is None or not thoughts.is_rendered:
        return ReplySyntax(calls, thoughts)
    behind = support.behind_thought()
    call_closing = behind[: behind.index(calls.begin)] if calls.begin and calls.begin in behind else ""
    differs = bool(call_closing.strip()) and not call_closing.strip().startswith(thoughts.closing.strip())
    return ReplySyntax(calls, replace(thoughts, call_closing=call_closing) if differs else thoughts)


def read_call_syntax(support: ToolSupport, thoughts: ThoughtSyntax | None, control: re.Pattern[str]) -> CallSyntax | None:
    """The form of calls; None where calls are written in a way that is not known."""
    body = support.one
    for read in _READERS:
        if (parts := read(body)) is None:
            continue
        start, stop, texts = parts
        rest = body[stop:]
        turn_end = _turn_end(rest, support.behind_calls(), control)
        end = rest[: rest.rfind(turn_end)] if turn_end and turn_end in rest else rest.rstrip()
        begin = body[:start]
        if thoughts is not None and thoughts.closing.strip() in begin:  # an empty thought before the calls
            begin = begin.rpartition(thoughts.closing.strip())[2].lstrip()
        return CallSyntax(
            begin=begin,
            between=_between(support.two, stop, texts["opening"]) if support.two else end + begin,
            end=end,
            turn_end=turn_end,
            is_parallel=bool(support.two),
            has_text_arguments=support.has_text_arguments,
            **texts,
        )
    return None


def read_thought_syntax(render: RenderChat, source: str) -> ThoughtSyntax | None:
    """The form of thoughts; None for a template that has none."""
    thought = {"role": "assistant", "content": _ANSWER, "reasoning_content": _THOUGHT, "thinking": _THOUGHT}
    try:
        opened = render([_QUESTION], tools=None, generate=True)
        text = render([_QUESTION, thought], tools=None, generate=False)
    except ChatTemplateError:
        opened = text = ""
    before, is_shown, behind = text.partition(_THOUGHT)
    if is_shown and _ANSWER in behind:
        lead = before[len(_common_start(opened, before)) :]
        tag = re.search(r"<[\w|]*think[\w|]*>\s*$", before)  # the opened turn may hold the tag already
        return ThoughtSyntax(tag[0] if tag else lead, behind.partition(_ANSWER)[0])
    return ThoughtSyntax("<think>\n", "\n</think>\n\n", is_rendered=False) if "</think>" in source else None


def _turn(count: int, as_text: bool) -> list[dict[str, Any]]:
    """A turn of the assistant with `count` calls, and their results."""
    arguments = json.dumps(_VALUES) if as_text else _VALUES
    calls = [
        {"type": "function", "id": f"probe{number}abc", "function": {"name": name, "arguments": arguments}}
        for number, name in enumerate(_NAMES[:count])
    ]
    results = [
        {"role": "tool", "name": name, "tool_call_id": f"probe{number}abc", "content": _RESULT}
        for number, name in enumerate(_NAMES[:count])
    ]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *results]


_CallParts = tuple[int, int, dict[str, Any]]  # start and stop of the first call in a text, and its texts


def _read_object(body: str) -> _CallParts | None:
    """A JSON object with the function's name and the arguments as two of its values."""
    for match in re.finditer(r"\{", body):
        value, length = _decode(body[match.start() :])
        if not isinstance(value, dict) or _NAMES[0] not in value.values():
            continue
        name_key = next(key for key, part in value.items() if part == _NAMES[0])
        arguments_key = next((key for key, part in value.items() if part in (_VALUES, json.dumps(_VALUES))), None)
        if arguments_key is None:
            continue
        text = body[match.start() : match.start() + length]
        opening, _, rest = text.partition(_NAMES[0])
        middle = rest.partition("{")[0]
        keys = {"name_key": name_key, "arguments_key": arguments_key}
        texts = {"kind": "object", "opening": opening, "middle": middle, "closing": "}", **keys}
        return match.start(), match.start() + length, texts
    return None


def _read_named(body: str) -> _CallParts | None:
    """The function's name, and behind it the arguments as a JSON object."""
    start = body.find(_NAMES[0])
    position = body.find("{", start)
    if start < 0 or position < 0:
        return None
    value, length = _decode(body[position:])
    if value != _VALUES:
        return None
    middle = body[start + len(_NAMES[0]) : position]
    return start, position + length, {"kind": "named", "opening": "", "middle": middle, "closing": ""}


def _read_fields(body: str) -> _CallParts | None:
    """Each argument in tags of its own."""
    pattern = (
        rf"{_NAMES[0]}(?P<head>.*?){_KEYS[0]}(?P<eq>[^\w\"']+?|.*?>)probe-value(?P<gap>.*?){_KEYS[1]}(?P=eq){_VALUES[_KEYS[1]]}"
    )
    match = re.search(pattern, body, re.DOTALL)
    if match is None or "<" not in match["gap"] or '"' in match["eq"]:
        return None
    rest = body[match.end() :]
    value_closing = re.sub(r"<[^>]*$", "", _common_start(match["gap"], rest))  # whole tags alone
    key_opening = match["gap"][len(value_closing) :]
    if not value_closing or not match["head"].endswith(key_opening):
        return None
    texts = {
        "kind": "fields",
        "opening": "",
        "middle": match["head"].removesuffix(key_opening),
        "closing": "",
        "key_opening": key_opening,
        "key_closing": match["eq"],
        "value_closing": value_closing,
    }
    return match.start(), match.end() + len(value_closing), texts


def _read_python(body: str) -> _CallParts | None:
    """A call as Python writes it."""
    match = re.search(rf"{_NAMES[0]}\({_KEYS[0]}=[\"']probe-value[\"'], ?{_KEYS[1]}={_VALUES[_KEYS[1]]}\)", body)
    return match and (match.start(), match.end(), {"kind": "python", "opening": "", "middle": "(", "closing": ")"})


_READERS = (_read_object, _read_fields, _read_python, _read_named)


def _between(two: str, stop: int, opening: str) -> str:
    """The text between the calls of `two`, the first of which ends at `stop`."""
    return two[stop : two.index(_NAMES[1], stop) - len(opening)]


def _turn_end(rest: str, behind: str, control: re.Pattern[str]) -> str:
    """The end of a turn whose calls are followed by `rest`: from its last control token's start; else the next turn's first one."""
    if matches := list(control.finditer(rest)):
        return matches[-1][0]
    following = behind[behind.find(rest.rstrip()) + len(rest.rstrip()) :] if rest.strip() else behind
    first = control.search(following)
    return first[0] if first else ""


def _decode(text: str) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0


def _common_start(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
