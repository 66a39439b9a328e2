"""Functions in chats over an engine of our own making: what is read, streamed, forced and refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.data.encoding.prompt_format import Layout
from apprentice.pretrained.replies.reply_parser import parse_reply
from apprentice.serve.api.application import build_app
from apprentice.serve.api.schemas.requests import ChatRequest
from apprentice.serve.generation.grammar import GrammarCompiler
from apprentice.serve.generation.replies.reply_parts import PartReader
from apprentice.serve.generation.served_models import Catalogue, ServedModel
from tests.serve.scripted import ScriptedEngine

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time"}}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Oslo?"}], "tools": [WEATHER, TIME]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
ARGUMENTS = {"city": "Oslo", "days": 3}


@pytest.fixture(scope="module")
def layout(chat_model: Path) -> Layout:
    return layout_beside(chat_model)


async def post(layout: Layout, text: str, body: dict[str, Any]) -> tuple[httpx.Response, ScriptedEngine]:
    engine = ScriptedEngine([*layout.tokenizer.encode(text), layout.stop_ids[0]])
    engine.context = 2000
    transport = httpx.ASGITransport(build_app(Catalogue([ServedModel("tiny", engine, layout)])), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.post("/v1/chat/completions", json=body), engine


@pytest.mark.asyncio
async def test_calls_are_read_from_a_reply(layout: Layout) -> None:
    response, engine = await post(layout, f"Let me look. {CALL}", ASK)
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"], call["id"][:5]) == ("function", "weather", "call_")
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    assert '"The weather."' in layout.tokenizer.decode(engine.requests[0].prompt, skip_special=False)
    response, _ = await post(layout, "Hello!", ASK)
    assert response.json()["choices"][0]["message"] == {"role": "assistant", "content": "Hello!"}
    assert response.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "finish"), [('"days"', "stop"), ("</tool", "tool_calls")])
async def test_a_call_that_a_stop_string_cuts_is_no_finished_call(layout: Layout, stop: str, finish: str, stream: bool) -> None:
    response, _ = await post(layout, CALL, ASK | {"stop": stop, "stream": stream})
    last = json.loads(response.text.split("\n\n")[-3].removeprefix("data: ")) if stream else response.json()
    assert last["choices"][0]["finish_reason"] == finish


@pytest.mark.asyncio
async def test_each_of_several_replies_has_a_constraint_of_its_own(layout: Layout) -> None:
    _, engine = await post(layout, CALL, ASK | {"n": 3, "tool_choice": "required"})
    one, other, third = (request.constraint for request in engine.requests)
    for id in layout.tokenizer.encode(CALL):
        assert one.allowed()[id]
        one.accept(id)
    assert one.allowed()[list(layout.call_stop_ids)].any()
    for untouched in (other, third):
        assert untouched.allowed()[layout.tokenizer.encode(CALL)[0]]
        assert not untouched.allowed()[list(layout.call_stop_ids)].any()
    assert other.grammar == one.grammar


@pytest.mark.asyncio
async def test_none_shows_no_functions_and_reads_no_calls(layout: Layout) -> None:
    response, engine = await post(layout, CALL, ASK | {"tool_choice": "none"})
    assert response.json()["choices"][0]["message"] == {"role": "assistant", "content": CALL}
    assert "weather" not in layout.tokenizer.decode(engine.requests[0].prompt)
    assert engine.requests[0].constraint is None


@pytest.mark.asyncio
async def test_a_stream_names_a_call_once_and_then_sends_its_arguments(layout: Layout) -> None:
    two = CALL.removesuffix("\n</tool_call>") + '\n</tool_call>\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    response, _ = await post(layout, f"So: {two}", ASK | {"stream": True, "return_token_ids": True})
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line and "[DONE]" not in line]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "So:"
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    for index, (name, arguments) in enumerate([("weather", ARGUMENTS), ("time", {})]):
        first, *rest = [delta for delta in deltas if delta["index"] == index]
        assert (first["function"]["name"], first["type"], first["id"][:5]) == (name, "function", "call_")
        assert all(set(delta) == {"index", "function"} and set(delta["function"]) == {"arguments"} for delta in rest)
        assert json.loads("".join(delta["function"]["arguments"] for delta in [first, *rest])) == arguments
    assert len(deltas) > 4
    ids = [id for choice in choices for id in choice.get("token_ids", [])]
    assert ids == [*layout.tokenizer.encode(f"So: {two}"), layout.stop_ids[0]]


@pytest.mark.asyncio
async def test_results_go_back_to_the_model(layout: Layout) -> None:
    called = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
    turns = [*ASK["messages"], {"role": "assistant", "content": None, "tool_calls": [called]}]
    result = {"role": "tool", "tool_call_id": "a1", "content": "snow"}
    response, engine = await post(layout, "It snows.", ASK | {"messages": [*turns, result]})
    assert response.json()["choices"][0]["message"]["content"] == "It snows."
    prompt = layout.tokenizer.decode(engine.requests[0].prompt, skip_special=False)
    assert CALL in prompt
    assert prompt.index(CALL) < prompt.index("snow")


def bodies(**more: Any) -> dict[str, Any]:
    return ASK | more


def called(arguments: str, id: str = "a1") -> list[dict[str, Any]]:
    call = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [*ASK["messages"], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": id, "content": "7"}]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            bodies(tool_choice={"type": "function", "function": {"name": "wether"}}),
            "names the function 'wether', and `tools` has weather",
        ),
        (bodies(tools=[], tool_choice="required"), "`tool_choice` asks for a call, and there are no `tools`"),
        (bodies(tools=[WEATHER, WEATHER]), "two functions in `tools` have the same name"),
        (bodies(tools=[{"type": "web_search"}]), "web_search|function"),
        (bodies(tools=[WEATHER | {"colour": "red"}]), "colour"),
        (
            bodies(
                tools=[
                    {"type": "function", "function": {"name": f"f{number}", "parameters": {"title": "x" * 99_000}}}
                    for number in range(5)
                ]
            ),
            "the schemas of `tools` have more than 400000 characters together",
        ),
        (
            bodies(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]),
            "the arguments of a call are a JSON object, and this schema's type is 'array'",
        ),
        (bodies(messages=called("{}", "b2")), "is the result of the call 'b2', which no turn before it made"),
        (bodies(messages=called('{"city"')), "the arguments of a call are the text of a JSON object"),
        (bodies(messages=called("[1]")), "the arguments of a call are the text of a JSON object"),
        (
            bodies(response_format={"type": "json_object"}),
            "`response_format` and functions that may be called contradict each other",
        ),
        (bodies(ignore_eos=True), "`ignore_eos` and functions that may be called contradict"),
        (bodies(tool_choice="required", stop="x"), "`stop` could cut a call that `tool_choice` asks for"),
        (
            bodies(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "oneOf": 3}}}]),
            "the form of the reply cannot be followed",
        ),
    ],
)
async def test_bad_functions_are_refused(layout: Layout, body: dict[str, Any], message: str) -> None:
    response, engine = await post(layout, CALL, body)
    assert response.status_code == 400
    assert re_search(message, response.json()["error"]["message"])
    assert response.json()["error"]["message"].count("\n") == 0
    assert engine.open == 0


def re_search(pattern: str, text: str) -> bool:
    return any(part in text for part in pattern.split("|"))


@pytest.mark.asyncio
async def test_a_layout_without_functions_and_a_template_that_drops_them_are_refused(plain_model: Path, chat_model: Path) -> None:
    response, _ = await post(layout_beside(plain_model), "x", ASK)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "tools_not_supported")
    assert "which has no functions; leave them out" in response.json()["error"]["message"]
    kept = layout_beside(chat_model)
    template = "{% for tool in tools or [] %}{{ tool.function.description }}{% endfor %}" + (kept.tokenizer.chat_template or "")
    response, _ = await post(Layout("chat", kept.tokenizer.with_template(template)), "x", ASK)
    assert response.status_code == 400
    assert "drops calls" in response.json()["error"]["message"]


def written(layout: Layout, body: ChatRequest, seed: int, start: str = "") -> str:
    """A reply of a model that knows nothing: tokens drawn at random from those that are allowed."""
    compiler, draw = GrammarCompiler(layout), random.Random(seed)
    grammar = compiler.tool_grammar_of(body, PartReader(layout, tuple(body.offered_tools)))
    assert grammar is not None
    form = compiler.compile(grammar, tuple(layout.call_stop_ids))
    ids = layout.tokenizer.encode(start)
    for id in ids:
        assert form.allowed()[id]
        form.accept(id)
    while len(ids) < 400:
        id = draw.choice(np.flatnonzero(form.allowed()).tolist())
        if id in layout.call_stop_ids:
            return layout.tokenizer.decode(ids)
        ids.append(id)
        form.accept(id)
    raise AssertionError(layout.tokenizer.decode(ids))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}, "auto"])
def test_calls_follow_their_schemas_whatever_the_model_would_write(layout: Layout, choice: Any) -> None:
    none = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [WEATHER, {"type": "function", "function": {"name": "time", "parameters": none}}]
    body = ChatRequest.model_validate(ASK | {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False})
    names = set()
    for seed in range(8):
        text = written(layout, body, seed, "Well. <tool_call>" if choice == "auto" else "")
        reply = parse_reply(layout.reply_syntax, text, body.offered_tools)
        (call,) = reply.tool_calls
        assert reply.content == ("Well." if choice == "auto" else "")
        values = call.values
        assert values is not None
        if call.name == "weather":
            assert values.keys() == {"city", "days"}
            assert values["city"] in ("Oslo", "Rome")
            assert 1 <= values["days"] <= 9
        else:
            assert values == {}
        names.add(call.name)
    assert names == ({"weather"} if isinstance(choice, dict) else {"weather", "time"})


def test_several_calls_are_forced_too(layout: Layout) -> None:
    body = ChatRequest.model_validate(ASK | {"tools": [WEATHER], "tool_choice": "required"})
    counts = {
        len(parse_reply(layout.reply_syntax, written(layout, body, seed), body.offered_tools).tool_calls) for seed in range(6)
    }
    assert max(counts) > 1


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.reasoning_content and loop.last %}<think>\n"
    "{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.asyncio
async def test_thoughts_come_apart_from_the_answer(layout: Layout) -> None:
    trained = Layout("chat", layout.tokenizer.with_template(THINKING), reasoning="train")
    text, ask = "<think>\nIt is far north.\n</think>\n\nCold.", {"messages": ASK["messages"]}
    response, _ = await post(trained, text, ask)
    assert response.json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Cold.",
        "reasoning_content": "It is far north.",
    }
    response, _ = await post(trained, text, ask | {"stream": True})
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line and "[DONE]" not in line]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "It is far north."
    assert "".join(delta.get("content", "") for delta in deltas) == "Cold."
    off, on = ({"chat_template_kwargs": {"enable_thinking": is_on}} for is_on in (False, True))
    response, _ = await post(trained, text, ask | off)
    assert "reasoning_content" not in response.json()["choices"][0]["message"]
    untrained = Layout("chat", layout.tokenizer.with_template(THINKING))
    response, _ = await post(untrained, text, ask | on)
    assert response.json()["choices"][0]["message"]["reasoning_content"] == "It is far north."
    response, _ = await post(layout, text, ask | on)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs.enable_thinking")
    assert "this model's chat template has no thoughts; leave it out" in response.json()["error"]["message"]
    response, _ = await post(layout, text, ask | {"chat_template_kwargs": {"colour": 1}})
    assert response.status_code == 400


OPENED = THINKING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # prompts end within a thought


@pytest.mark.asyncio
@pytest.mark.parametrize("form", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"choice": ["yes", "a/b"]}}])
@pytest.mark.parametrize("template", [THINKING, OPENED])
async def test_a_form_is_that_of_the_answer_behind_the_thought(layout: Layout, template: str, form: dict[str, Any]) -> None:
    trained = Layout("chat", layout.tokenizer.with_template(template), reasoning="train")
    thought = "It {is} far.\n</think>\n\n"
    answer = '{"a": 1}' if "response_format" in form else "a/b"
    text = ("" if template == OPENED else "<think>\n") + thought + answer
    response, engine = await post(trained, text, {"messages": ASK["messages"]} | form)
    assert response.json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": answer,
        "reasoning_content": "It {is} far.",
    }
    (request,) = engine.requests
    for id in [*layout.tokenizer.encode(text), layout.stop_ids[0]]:
        assert request.constraint.allowed()[id]
        request.constraint.accept(id)


@pytest.mark.asyncio
@pytest.mark.parametrize("template", [THINKING, OPENED])
async def test_a_thought_that_mentions_a_call_forces_none(layout: Layout, template: str) -> None:
    trained = Layout("chat", layout.tokenizer.with_template(template), reasoning="train")
    for answer in ("Hello.", CALL):
        text = ("" if template == OPENED else "<think>\n") + "A <tool_call> is\nnot due.\n</think>\n\n" + answer
        response, engine = await post(trained, text, ASK)
        message = response.json()["choices"][0]["message"]
        assert message["reasoning_content"] == "A <tool_call> is\nnot due."
        assert len(message.get("tool_calls", [])) == (answer == CALL)
        (request,) = engine.requests
        for id in [*layout.tokenizer.encode(text), layout.stop_ids[0]]:
            assert request.constraint.allowed()[id]
            request.constraint.accept(id)
