"""Replies are read by the format that was found in the chat template: whole, in pieces of any size, and where they are broken."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import pytest

from apprentice.pretrained.chat_template import ChatTemplate
from apprentice.pretrained.replies.call_reading import JsonScanner
from apprentice.pretrained.replies.reply_parser import ParsedReply, ReplyDelta, ReplyParser, parse_reply
from apprentice.pretrained.replies.reply_syntax import OWN_CALLS, CallSyntax, ReplySyntax, ThoughtSyntax
from apprentice.pretrained.replies.template_probe import TOOLS, ToolSupport, read_reply_syntax
from apprentice.tasks.dialogue import ToolCall
from tests.support.chat_templates import sources

KINDS = {
    "glm4moe": "fields",
    "gptoss": "named",
    "lfm2_2_5": "python",
    "llama3_1": "object",
    "nemotron_3_nano": "fields",
    "qwen2_5": "object",
    "qwen3": "object",
    "qwen3_5_think": "fields",
    "qwen3_6": "fields",
    "qwen3_instruct_2507": "object",
}
CONTROL = re.compile(r"<\|(?:im_end|eot_id|observation|call|end)\|>")
CALLS = (
    ToolCall("probe_alpha", json.dumps({"probe_key": "a \"b\" {c} 'd'", "probe_count": 3})),
    ToolCall("probe_beta", json.dumps({"probe_key": "é, ]", "probe_count": -1})),
)
HERMES = ReplySyntax(OWN_CALLS, ThoughtSyntax("<think>\n", "\n</think>\n\n"))


@cache
def form_of(name: str) -> ReplySyntax:
    source = sources()[name].read_text()
    template = ChatTemplate(source, name)

    def render(messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None, generate: bool) -> str:
        shown = [dict(message) for message in messages]
        return template.render(shown, generate=generate, tools=tools, now=datetime(2025, 1, 1), bos_token="<s>", eos_token="</s>")

    return read_reply_syntax(render, source, CONTROL)


def in_pieces(form: ReplySyntax, text: str, size: int, tools: Any = TOOLS) -> list[ReplyDelta]:
    parser = ReplyParser(form, tools)
    deltas = [delta for start in range(0, len(text), size) for delta in parser.feed(text[start : start + size])]
    return deltas + parser.finish()


def joined(deltas: Sequence[ReplyDelta]) -> tuple[str, str, list[tuple[str, str]]]:
    numbers = sorted({delta.call for delta in deltas if delta.call is not None})
    calls = [
        (
            "".join(delta.name or "" for delta in deltas if delta.call == number),
            "".join(delta.arguments for delta in deltas if delta.call == number),
        )
        for number in numbers
    ]
    return "".join(delta.content for delta in deltas), "".join(delta.reasoning for delta in deltas), calls


@pytest.mark.parametrize("name", KINDS)
def test_calls_are_read_back_in_every_kind_of_format(name: str) -> None:
    form = form_of(name)
    assert form.calls is not None
    assert form.calls.kind == KINDS[name]
    calls = CALLS if form.calls.is_parallel else CALLS[:1]
    text = form.calls.write(calls)
    reply = parse_reply(form, text, TOOLS)
    assert [call.as_dict() for call in reply.tool_calls] == [call.as_dict() for call in calls], text
    assert (reply.content, reply.reasoning_content) == ("", None)
    for size in (1, 3, 7):
        content, _, parts = joined(in_pieces(form, text, size))
        assert (content, [ToolCall(*part).as_dict() for part in parts]) == ("", [call.as_dict() for call in calls])


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("llama3_1", "gptoss")])
def test_content_and_thought_stand_before_the_calls(name: str) -> None:
    form = form_of(name)
    assert form.calls is not None
    text = "Let me see." + "\n" + form.calls.write(CALLS[:1])
    if form.thoughts is not None:
        text = form.thoughts.write("It is < 3 <th", text)
    thought = "It is < 3 <th" if form.thoughts else None
    reply = parse_reply(form, text, TOOLS)
    assert (reply.content, reply.reasoning_content, len(reply.tool_calls)) == ("Let me see.", thought, 1)
    for size in (1, 5):
        content, reasoning, calls = joined(in_pieces(form, text, size))
        assert (content, reasoning or None, len(calls)) == ("Let me see.", thought, 1)


def test_gpt_oss_thinks_before_a_call_in_another_channel() -> None:
    form = form_of("gptoss")
    assert form.calls is not None
    assert form.thoughts is not None
    text = form.thoughts.opening + "Hm." + form.thoughts.call_closing + form.calls.write(CALLS[:1])
    assert parse_reply(form, text, TOOLS) == ParsedReply(
        "", "Hm.", parse_reply(form, form.calls.write(CALLS[:1]), TOOLS).tool_calls
    )
    assert parse_reply(form, form.thoughts.write("Hm.", "Yes."), TOOLS) == ParsedReply("Yes.", "Hm.")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("No call at all.", "No call at all.", []),
        ('<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>', "", [("f", '{"a": 1}')]),
        (
            '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}"}]}, "id": 3}\n</tool_call>',
            "",
            [("f", '{"a": [1, {"b": "}"}]}')],
        ),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ("<tool_call>\nf(a)\n</tool_call>", "<tool_call>\nf(a)\n</tool_call>", []),
        ('<tool_call>\n{"nam', '<tool_call>\n{"nam', []),
        ("a <tool_cal b", "a <tool_cal b", []),
        ("Then <tool_", "Then <tool_", []),
        ("A <tool_call> b\n\n<tool_call> c", "A <tool_call> b\n\n<tool_call> c", []),
        ('A <tool_call>{"name": "f"}</tool_call> <tool_call> c', "A<tool_call> c", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>\n Done.', "Done.", [("f", "{}")]),
    ],
)
def test_replies_that_differ_from_the_template(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    reply = parse_reply(HERMES, text, TOOLS)
    assert (reply.content, [(call.name, call.arguments) for call in reply.tool_calls]) == (content, calls)
    for size in (1, 4):
        assert joined(in_pieces(HERMES, text, size)) == (content, "", calls)


@pytest.mark.parametrize("name", ["a\nb", "a\\q", "a\\u12"])
def test_a_name_that_is_no_json_makes_no_call(name: str) -> None:
    text = f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>'
    reply = parse_reply(ReplySyntax(OWN_CALLS), text, TOOLS)
    assert (reply.content, reply.tool_calls) == (text, ())


def test_arguments_stream_as_they_come_and_content_is_not_kept_back() -> None:
    parser = ReplyParser(HERMES, TOOLS)
    assert parser.feed("Well, ") == [ReplyDelta(content="Well,")]
    assert parser.feed('then.<tool_call>\n{"name": "f", "argu') == [ReplyDelta(content=" then.")]
    assert parser.feed('ments": {"a"') == [ReplyDelta(call=0, name="f"), ReplyDelta(call=0, arguments='{"a"')]
    assert parser.feed(": 1}}") == [ReplyDelta(call=0, arguments=": 1}")]
    assert parser.feed("\n</tool_call>") + parser.finish() == []


def test_an_answer_in_json_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where calls have no opening tag, each JSON object may be one until it ends."""
    seen: list[int] = []
    plain = JsonScanner.end_of
    monkeypatch.setattr(JsonScanner, "end_of", lambda scanner, piece: seen.append(len(piece)) or plain(scanner, piece))
    bare = ReplySyntax(CallSyntax("object", "", '{"name": "', '", "arguments": ', "}", "\n", ""))
    for text, calls in (('{"answer": "' + "x" * 2000 + '"}', 0), ('{"arguments": {"a": "' + "x" * 2000 + '"}, "name": "f"}', 1)):
        seen.clear()
        parser = ReplyParser(bare, [{"name": "f"}])
        deltas = [delta for place in range(0, len(text), 4) for delta in parser.feed(text[place : place + 4])]
        deltas += parser.finish()
        assert len({delta.call for delta in deltas if delta.call is not None}) == calls
        assert "".join(delta.content for delta in deltas) == ("" if calls else text)
        assert sum(seen) <= 2 * len(text)


def test_without_tools_a_call_is_text_and_a_thought_is_a_thought() -> None:
    text = '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert parse_reply(HERMES, text) == ParsedReply(text.partition("\n\n")[2], "Hm.")
    assert parse_reply(ReplySyntax(), text) == ParsedReply(text)


def test_a_reply_may_begin_within_a_thought_and_may_end_there() -> None:
    assert HERMES.is_in_thought("<|im_start|>assistant\n<think>\n")
    assert not HERMES.is_in_thought("<think>\n\n</think>\n\n")
    assert parse_reply(HERMES, "Hm.\n</think>\n\nYes.", is_in_thought=True) == ParsedReply("Yes.", "Hm.")
    assert parse_reply(HERMES, "<think>\nHm, so") == ParsedReply("", "Hm, so")
    assert parse_reply(HERMES, "<think>\n\n</think>\n\nYes.") == ParsedReply("Yes.", "")


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("deepseekv3", ("the list of tools",)),
        ("lfm2", ("calls",)),
        ("gemma3", ("the list of tools", "calls", "results of calls")),
        ("qwen3", ()),
    ],
)
def test_what_a_template_drops_is_found_by_rendering(name: str, lacks: tuple[str, ...]) -> None:
    template = ChatTemplate(sources()[name].read_text(), name)

    def render(messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None, generate: bool) -> str:
        return template.render([dict(one) for one in messages], generate=generate, tools=tools, bos_token="", eos_token="</s>")

    assert ToolSupport(render).lacks == lacks
