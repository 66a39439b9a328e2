"""Reading of a reply by its format: thought, content and function calls, whole (`parse_reply`) or as it comes (`ReplyParser`).

A call counts from its name on, when the arguments begin: what follows is streamed as arguments, whole or not. Text that begins like
a call and is none stays content. Both ways give the same parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apprentice.pretrained.replies.call_reading import JsonScanner, field_call, object_call, python_call, python_end
from apprentice.pretrained.replies.reply_syntax import ReplySyntax, tool_schemas
from apprentice.tasks.dialogue import ToolCall


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """The parts of a reply; `reasoning_content` is None for a reply without a thought."""

    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplyDelta:
    """A piece of a reply: of its content, of its thought, or of the call number `call` (its `name`, then its `arguments`)."""

    content: str = ""
    reasoning: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


def parse_reply(
    form: ReplySyntax, text: str, tools: Sequence[Mapping[str, Any]] | None = None, *, is_in_thought: bool = False
) -> ParsedReply:
    """The parts of the complete reply `text`; see `ReplyParser` for the arguments."""
    parser = ReplyParser(form, tools, is_in_thought=is_in_thought)
    deltas = [*parser.feed(text), *parser.finish()]
    calls: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        if delta.call is not None:
            name, arguments = calls.get(delta.call, ("", ""))
            calls[delta.call] = (name + (delta.name or ""), arguments + delta.arguments)
    reasoning = "".join(delta.reasoning for delta in deltas)
    content = "".join(delta.content for delta in deltas)
    return ParsedReply(
        content, reasoning if parser.has_thought else None, tuple(ToolCall(name, arguments) for name, arguments in calls.values())
    )


class ReplyParser:
    """Incremental parser of one reply in the format `form`.

    Calls are looked for only where `tools` (OpenAI's form) were offered; their schemas give arguments without quotes their types.
    `is_in_thought` says that the prompt ended within a thought (`ReplySyntax.is_in_thought`).
    """

    def __init__(self, form: ReplySyntax, tools: Sequence[Mapping[str, Any]] | None = None, *, is_in_thought: bool = False) -> None:
        self._calls = form.calls if tools else None
        self._thoughts = form.thoughts
        self._schemas = tool_schemas(tools or ())
        self._answer_opening = form.answer_opening.strip()
        self.has_thought = is_in_thought
        self._state = self._read_thought if is_in_thought and form.thoughts else self._read_start
        self._buffer = ""
        self._is_finished = False
        self._has_content = self._has_thought_text = False
        self._space = ""  # white space before what may be a call
        self._number = -1
        self._scanner, self._scanned = JsonScanner(), 0  # characters of an object whose end is looked for
        self._deltas: list[ReplyDelta] = []

    def feed(self, text: str) -> list[ReplyDelta]:
        """The pieces that `text`, the next of the reply, completes."""
        self._buffer += text
        while self._state():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    @property
    def is_in_arguments(self) -> bool:
        """True if a call's arguments have begun and are not complete."""
        return self._state == self._read_arguments

    def finish(self) -> list[ReplyDelta]:
        """The pieces that were kept back until the reply's end."""
        self._is_finished = True
        return self.feed("")

    # Each state reads from the buffer, and returns True if another step may read more.

    def _read_start(self) -> bool:
        """The reply's beginning: a thought, or what the template writes before an answer."""
        text = self._buffer.lstrip()
        opening = self._thoughts.opening.strip() if self._thoughts else ""
        for marker in (opening, self._answer_opening):
            if not marker:
                continue
            if text.startswith(marker):
                self._buffer = text[len(marker) :]
                if marker == opening:
                    self.has_thought, self._state = True, self._read_thought
                else:
                    self._state = self._read_text
                return True
            if not self._is_finished and marker.startswith(text):
                return False
        self._state = self._read_text
        return True

    def _read_thought(self) -> bool:
        assert self._thoughts is not None
        closings = [text.strip() for text in (self._thoughts.closing, self._thoughts.call_closing) if text.strip()]
        if not self._has_thought_text:
            self._buffer = self._buffer.lstrip("\n")
        places = [(place, -len(closing)) for closing in closings if (place := self._buffer.find(closing)) >= 0]
        if places:
            place, size = min(places)
            self._emit_thought(self._buffer[:place].rstrip())
            self._buffer = self._buffer[place - size :].lstrip()
            self._state = self._read_text_start
            return True
        kept = 0 if self._is_finished else _held_back(self._buffer, closings)
        stop = len(self._buffer[: len(self._buffer) - kept].rstrip())
        self._emit_thought(self._buffer[:stop])
        self._buffer = self._buffer[stop:]
        return False

    def _emit_thought(self, text: str) -> None:
        if text:
            self._has_thought_text = True
            self._deltas.append(ReplyDelta(reasoning=text))

    def _read_text_start(self) -> bool:
        """White space behind a thought or a call, which belongs to neither."""
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        self._state = self._read_text
        return True

    def _read_text(self) -> bool:
        begin = self._calls.begin.strip() if self._calls else ""
        if self._calls and not begin and not self._has_content and self._number < 0:
            start = self._buffer.lstrip()
            if not start and not self._is_finished:
                return False
            if start.startswith("{") or self._calls.kind != "object":
                self._state = self._read_head
                return True
        if begin and (place := self._buffer.find(begin)) >= 0:
            text = self._buffer[:place].rstrip()
            self._space = self._buffer[len(text) : place]
            self._emit_text(text)
            self._buffer = self._buffer[place + len(begin) :]
            self._state = self._read_head
            return True
        if self._is_finished:
            self._emit_text(self._buffer if self._number < 0 or self._buffer.strip() else "")
            self._buffer = ""
            return False
        stop = len(self._buffer) - _held_back(self._buffer, [begin] if begin else [])
        stop = len(self._buffer[:stop].rstrip()) if self._calls else stop
        self._emit_text(self._buffer[:stop])
        self._buffer = self._buffer[stop:]
        return False

    def _emit_text(self, text: str) -> None:
        if text:
            self._has_content = True
            self._deltas.append(ReplyDelta(content=text))

    def _refuse(self) -> bool:
        """What looked like a call is content."""
        assert self._calls is not None
        self._emit_text(self._space + self._calls.begin.strip())
        self._has_content = True
        self._state = self._read_text
        self._forget_object()
        return True

    def _forget_object(self) -> None:
        """Begins anew to look for an object's end."""
        self._scanner, self._scanned = JsonScanner(), 0

    def _read_head(self) -> bool:
        """A call up to its arguments, or all of it where its arguments are not JSON."""
        calls = self._calls
        assert calls is not None
        if calls.kind == "object":
            return self._read_object_head()
        if calls.kind == "named":
            head = re.match(rf"\s*([\w.\-/:]+?)\s*{re.escape(calls.middle.strip())}\s*(?=\{{)", self._buffer)
            if head:
                return self._begin_call(head[1], head.end())
            return self._refuse() if self._is_finished or not _may_be_name(self._buffer, calls.middle) else False
        if calls.kind == "python":
            stop = python_end(self._buffer)
            call = python_call(self._buffer[:stop]) if stop else None
        else:
            terminator = (calls.closing + calls.end).split()[0]
            place = self._buffer.find(terminator)
            stop = place
            call = field_call(calls, self._buffer[:place], self._schemas) if place >= 0 else None
        if call is not None:
            self._whole_call(call, stop)
            return True
        return self._refuse() if self._is_finished or stop > 0 else False

    def _read_object_head(self) -> bool:
        assert self._calls is not None
        name, key = re.escape(self._calls.name_key), re.escape(self._calls.arguments_key)
        head = re.match(rf'\s*\{{\s*"{name}"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{key}"\s*:\s*(?=\{{)', self._buffer)
        if head:
            try:
                called = json.loads(head[1])
            except ValueError:  # a bare line break, or an escape that JSON has not
                return self._refuse()
            return self._begin_call(called, head.end())
        start = self._buffer.lstrip()
        if start and not start.startswith("{"):
            return self._refuse()
        seen, self._scanned = self._scanned, len(start)
        if (end := self._scanner.end_of(start[seen:])) is not None:
            stop = seen + end
            call = object_call(self._calls, start[:stop])
            if call is None:
                return self._refuse()
            self._whole_call(call, len(self._buffer) - len(start) + stop)
            return True
        return self._refuse() if self._is_finished else False

    def _begin_call(self, name: str, start: int) -> bool:
        self._number += 1
        self._deltas.append(ReplyDelta(call=self._number, name=name))
        self._buffer = self._buffer[start:]
        self._forget_object()
        self._state = self._read_arguments
        return True

    def _whole_call(self, call: ToolCall, stop: int) -> None:
        self._number += 1
        self._deltas.append(ReplyDelta(call=self._number, name=call.name))
        self._deltas.append(ReplyDelta(call=self._number, arguments=call.arguments))
        self._buffer = self._buffer[stop:]
        self._forget_object()
        self._state = self._read_behind_call

    def _read_arguments(self) -> bool:
        stop = self._scanner.end_of(self._buffer)
        text = self._buffer if stop is None else self._buffer[:stop]
        if text:
            self._deltas.append(ReplyDelta(call=self._number, arguments=text))
        self._buffer = self._buffer[len(text) :]
        if stop is None:
            return False
        if self._calls is not None and self._calls.kind == "object":
            self._scanner = JsonScanner(depth=1)  # the rest of the object around the arguments
            self._state = self._read_rest_of_object
        else:
            self._state = self._read_behind_call
        return True

    def _read_rest_of_object(self) -> bool:
        stop = self._scanner.end_of(self._buffer)
        self._buffer = "" if stop is None else self._buffer[stop:]
        if stop is None:
            return False
        self._forget_object()
        self._state = self._read_behind_call
        return True

    def _read_behind_call(self) -> bool:
        """Behind a call: the text between two calls, or the end of all."""
        assert self._calls is not None
        end, between = self._calls.end.strip(), self._calls.between.strip()
        self._space = ""
        self._buffer = self._buffer.lstrip()
        markers = [end] if end and between.startswith(end) else [between, end]
        for marker in filter(None, markers):
            if self._buffer.startswith(marker):
                self._buffer = self._buffer[len(marker) :]
                self._state = self._read_head if marker == between != end else self._read_text_start
                return True
            if not self._is_finished and marker.startswith(self._buffer):
                return False
        self._state = self._read_text_start
        return True


def _held_back(text: str, markers: Sequence[str]) -> int:
    """Number of characters at the end of `text` that may be the beginning of a marker."""
    longest = max(map(len, markers), default=1) - 1
    return next(
        (size for size in range(min(longest, len(text)), 0, -1) if any(marker.startswith(text[-size:]) for marker in markers)), 0
    )


def _may_be_name(text: str, middle: str) -> bool:
    """True if `text` can go on to be a function's name and what stands behind it."""
    rest = re.sub(r"^\s*[\w.\-/:]*\s*", "", text)
    return not rest or middle.strip().startswith(rest) or rest.startswith(middle.strip())
