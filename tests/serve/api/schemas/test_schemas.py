"""What a request may say, and what a refusal says."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from apprentice.serve.api.schemas.problems import problem_of_fields
from apprentice.serve.api.schemas.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    InstructRequest,
    RenderRequest,
    TaskRequest,
)


def refusal(kind: type[GenerationFields], body: dict[str, Any]) -> dict[str, Any]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return dict(problem_of_fields(caught.value.errors(), list(kind.model_fields)).body.error.to_dict())


def test_what_asks_for_nothing_is_let_through() -> None:
    request_body = ChatRequest.model_validate(
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "n": 1,
            "frequency_penalty": 0,
            "tools": [],
            "temperature": None,
            "logprobs": False,
            "stop": "x",
        }
    )
    assert request_body.messages[0].text == "ab"
    assert (request_body.temperature, request_body.stops, request_body.max_tokens) == (0.0, ["x"], None)
    assert CompletionRequest(prompt="a").max_tokens == 16
    assert InstructRequest(instruction="a").input == ""


@pytest.mark.parametrize(
    "extra",
    [
        {"service_tier": "auto"},
        {"modalities": ["text"]},
        {"metadata": {"run": "7"}},
        {"safety_identifier": "someone"},
        {"prompt_cache_key": "system-1", "prompt_cache_retention": "24h"},
        {"functions": [], "function_call": "none"},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"user": "someone", "verbosity": "medium", "reasoning_effort": None, "prediction": None, "audio": None},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"top_k": -1, "min_p": 0, "repetition_penalty": 1},
    ],
)
def test_what_clients_send_besides_is_no_reason_to_refuse(extra: dict[str, Any]) -> None:
    turns = {"messages": [{"role": "user", "content": "a", "name": "anna"}]}
    plain, request_body = ChatRequest.model_validate(turns), ChatRequest.model_validate(turns | extra)
    unused = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    streaming = {"stream", "stream_options"}
    assert request_body.model_dump(exclude=unused | streaming) == plain.model_dump(exclude=unused | streaming)


def test_answers_come_back_as_clients_keep_them() -> None:
    """The openai package gives an answer with all its fields, most of them empty."""
    kept = {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "a"},
        kept,
        {"role": "user", "content": "c"},
    ]
    request_body = ChatRequest.model_validate({"messages": turns})
    assert [turn.speaker for turn in request_body.messages] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "function", "name": "add", "content": "7"},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": ""}},
    ],
)
def test_openais_old_form_of_calls_is_refused_by_its_name(turn: dict[str, Any]) -> None:
    error = refusal(ChatRequest, {"messages": [{"role": "user", "content": "a"}, turn]})
    assert error["message"].startswith("`messages.1`: `function_call` and the role `function` are OpenAI's old form")


@pytest.mark.parametrize(
    ("kind", "extra", "param", "message"),
    [
        (CompletionRequest, {"tools": [{}]}, "tools", "`tools` is not supported here. Supported: model,"),
        (CompletionRequest, {"n": 0}, "n", "`n`: Input should be greater than or equal to 1."),
        (CompletionRequest, {"best_of": 2}, "best_of", "`best_of` is not supported here."),
        (CompletionRequest, {"max_tokens": 0}, None, "asks for nothing but the prompt; set `echo`"),
        (CompletionRequest, {"logit_bias": {"a": 1}}, "logit_bias", "valid integer"),
        (CompletionRequest, {"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
        (CompletionRequest, {"structured_outputs": {"choice": ["a"], "regex": "b"}}, "structured_outputs", "exactly one of"),
        (
            CompletionRequest,
            {"response_format": {"type": "json_schema"}},
            "response_format",
            "`json_schema` is given exactly where",
        ),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, None, "`top_logprobs` needs `logprobs`"),
        (CompletionRequest, {"max_token": 2}, "max_token", "Did you mean 'max_tokens'?"),
        (CompletionRequest, {"temperature": 3}, "temperature", "`temperature`: Input should be less than or equal to 2."),
        (CompletionRequest, {"prompt": ["a", 5]}, "prompt", "`prompt"),
        (
            CompletionRequest,
            {"stream": True, "stream_options": {"usage": True}},
            "stream_options.usage",
            "Extra inputs are not permitted",
        ),
        (CompletionRequest, {"stream_options": {"include_usage": True}}, None, "`stream_options` are those of a stream"),
        (CompletionRequest, {"stream_options": {}, "stream": False}, None, "`stream_options` are those of a stream"),
        (ChatRequest, {"messages": []}, "messages", "at least 1 item"),
        (ChatRequest, {"messages": [{"role": "owner", "content": "a"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "functions": [{}]}, "functions", "`functions` is not supp"),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}], "modalities": ["audio"]}, "modalities", "is not supported"),
        (CompletionRequest, {"str": 1}, "str", "`str` is not supported here."),
        (CompletionRequest, {"list[str]": 1}, "list[str]", "`list[str]` is not supported here."),
        (ChatRequest, {}, "messages", "`messages`: Field required."),
    ],
)
def test_refusals_name_the_field(kind: type[GenerationFields], extra: dict[str, Any], param: str | None, message: str) -> None:
    error = refusal(kind, ({"prompt": "a"} if kind is CompletionRequest else {}) | extra)
    assert message in error["message"]
    assert (error["type"], (error["param"] or "").startswith(param or "")) == ("invalid_request_error", True)


MANY = 100_000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": "a"} | {f"k{number}": 1 for number in range(MANY)}),
        (CompletionRequest, {"prompt": [[]] * MANY}),
        (CompletionRequest, {"prompt": ["a", 5] * MANY}),
        (CompletionRequest, {"prompt": [[5, "a"] * MANY]}),
        (CompletionRequest, {"prompt": "a", "stop": [5] * MANY}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {f"a{number}": 1 for number in range(MANY)}}),
        (CompletionRequest, {"prompt": "a", "structured_outputs": {"choice": [5] * MANY}}),
        (CompletionRequest, {"prompt": "a", "stream_options": {f"k{number}": 1 for number in range(MANY)}}),
        (ChatRequest, {"messages": [{}] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (TaskRequest, {"fields": {f"k{number}": 1 for number in range(MANY)}}),
    ],
)
def test_a_refusal_costs_no_more_for_many_faults(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """Pydantic makes an error for each fault, and FastAPI copies them all; that took seconds."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 12


def unbounded(schema: Any, path: str) -> list[str]:
    """The places of a JSON schema that take a text, a list or a number without an end."""
    places: list[str] = []
    if isinstance(schema, list):
        return [place for item in schema for place in unbounded(item, path)]
    if not isinstance(schema, dict):
        return []
    ends = {
        "string": ("maxLength", "enum", "const"),
        "array": ("maxItems",),
        "integer": ("maximum", "exclusiveMaximum"),
        "number": ("maximum",),
    }
    kind = schema.get("type")
    if isinstance(kind, str) and kind in ends and not any(end in schema for end in ends[kind]):
        places.append(path)
    for key, inner in schema.items():
        if key in ("properties", "$defs"):
            places += [place for name, each in inner.items() for place in unbounded(each, f"{path}.{name}")]
        elif key not in ("default", "enum", "const"):
            places += unbounded(inner, path)
    return places


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, InstructRequest, RenderRequest, TaskRequest])
def test_every_field_of_a_request_has_a_bound(kind: type[BaseModel]) -> None:
    assert unbounded(kind.model_json_schema(), kind.__name__) == []
