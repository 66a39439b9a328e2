"""What the API promises, on a real model under Ray Serve, through OpenAI's client: scores, forms, choices, tasks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel, Field

from apprentice import pipeline
from apprentice.models.loading import load_model
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.serve.deployment import Endpoint


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0)


def test_echoed_scores_are_the_models(client: openai.OpenAI, chat_model: Path) -> None:
    """The call that lm-evaluation-harness makes: token ids in, `echo`, one token more."""
    ids = Tokenizer(chat_model).encode("Is the review positive or negative?")
    (choice,) = client.completions.create(model="tiny", prompt=[ids], max_tokens=1, echo=True, logprobs=1).choices
    assert choice.logprobs is not None
    scores = choice.logprobs.token_logprobs
    assert scores is not None
    with torch.inference_mode():
        logits = load_model(chat_model, torch.float32)(input_ids=torch.tensor([ids])).logits[0]
    expected = torch.log_softmax(logits, dim=-1)[range(len(ids) - 1), ids[1:]].tolist()
    assert scores[0] is None
    assert scores[1:-1] == pytest.approx(expected, abs=1e-3)
    assert len(scores) == len(ids) + 1


def test_the_endpoint_keeps_its_contract_and_another_one_shows(endpoint: Endpoint, chat_model: Path, tmp_path: Path) -> None:
    result = pipeline.verify_contract(endpoint.url, str(chat_model), model="tiny")
    assert result["kind"] == "apprentice"
    unlike = {(finding["check"], finding["verdict"]) for finding in result["findings"] if finding["verdict"] != "same"}
    assert unlike == {("special tokens", "cannot be seen")}  # it encodes no text for others
    template = Tokenizer(chat_model).chat_template
    contract = json.loads((chat_model / "apprentice.json").read_text()) | {"chat_template": f"-{template}", "stop_ids": [2, 5]}
    contract["chat_template_sha256"] = hashlib.sha256(contract["chat_template"].encode()).hexdigest()
    contract["golden"][0]["ids"].insert(0, 5)
    (tmp_path / "apprentice.json").write_text(json.dumps(contract))
    result = pipeline.verify_contract(f"{endpoint.url}/v1", str(tmp_path), model="tiny")
    drifted = [finding for finding in result["findings"] if finding["verdict"] == "drifted"]
    assert [(one["check"], one["subject"]) for one in drifted] == [
        ("chat template", "sha256"),
        ("stops", "stop_ids"),
        ("token ids", "Is the review positive or negative?"),
        ("stops", "token 5"),
    ]


def test_a_request_has_one_id(endpoint: Endpoint) -> None:
    for headers in ({}, {"X-Request-Id": "mine-1"}):
        response = httpx.get(f"{endpoint.url}/health", headers=headers)
        (number,) = response.headers.get_list("x-request-id")
        assert number == headers.get("X-Request-Id", number)
        assert len(number) >= 6


def test_a_prompt_that_comes_again_is_in_memory(client: openai.OpenAI) -> None:
    words = " ".join(["Is this the film?"] * 20)
    usages = [client.completions.create(model="tiny", prompt=words, max_tokens=2).usage for _ in range(2)]
    first, second = [usage.prompt_tokens_details.cached_tokens for usage in usages if usage and usage.prompt_tokens_details]
    assert second is not None
    assert second >= 32  # what is worth copying
    assert (first or 0) <= second


def test_replies_of_a_given_form(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    completion = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Say it."}],
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        max_tokens=200,
        temperature=1.0,
        seed=1,
    )
    assert set(json.loads(completion.choices[0].message.content or "")) == {"ok"}
    replies = client.completions.create(
        model="tiny",
        prompt="Which?",
        n=6,
        seed=2,
        temperature=2.0,
        max_tokens=40,
        extra_body={"structured_outputs": {"choice": ["positive", "negative"]}},
    ).choices
    assert {choice.text for choice in replies} == {"positive", "negative"}
    assert [choice.index for choice in replies] == list(range(6))
    with pytest.raises(openai.BadRequestError, match="the form of the reply cannot be followed"):
        client.completions.create(model="tiny", prompt="a", extra_body={"structured_outputs": {"regex": "("}})


def test_the_stream_helper_gathers_the_same_reply(client: openai.OpenAI) -> None:
    request_body = {"model": "tiny", "messages": [{"role": "user", "content": "Which topic?"}], "max_completion_tokens": 8, "n": 2}
    whole = client.chat.completions.create(**request_body, temperature=1.0, seed=5)  # type: ignore[call-overload]
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    gathered = ["", ""]
    with client.chat.completions.stream(**request_body, temperature=1.0, seed=5) as stream:  # type: ignore[arg-type]
        for event in stream:  # the helper's whole completion would be refused: these replies were cut off
            if event.type == "chunk":
                for choice in event.chunk.choices:
                    gathered[choice.index] += choice.delta.content or ""
    assert gathered == texts
    assert len(set(texts)) == 2


def test_a_task_ranks_its_choices(endpoint: Endpoint) -> None:
    with httpx.Client(base_url=endpoint.url, timeout=60) as http:
        listed = {task["id"]: task for task in http.get("/v1/tasks").json()["data"]}
        assert listed["sst2"]["fields"] == ["sentence"]
        answer = http.post("/v1/tasks/sst2", json={"fields": {"sentence": "A warm, funny film."}}).json()
        assert sum(choice["probability"] for choice in answer["choices"]) == pytest.approx(1.0)
        best = max(answer["choices"], key=lambda choice: choice["logprob"])
        assert answer["answer"] == best["choice"]
        assert "A warm, funny film." in answer["prompt"]
        missing = http.post("/v1/tasks/sst2", json={"fields": {}})
        assert (missing.status_code, "'sentence' is missing" in missing.text) == (400, True)
        unknown = http.post("/v1/tasks/../sst", json={"fields": {}})
        assert unknown.status_code in (404, 405)
        reply = http.post("/v1/tasks/squad", json={"fields": {"context": "A. B.", "question": "Who?"}, "max_tokens": 4}).json()
        assert isinstance(reply["answer"], str)


def test_the_openai_packages_tool_helpers(client: openai.OpenAI) -> None:
    """A loop of an agent over a model of random weights: the grammar alone makes the calls right."""

    class Weather(BaseModel):
        """The weather of a city."""

        city: Literal["Oslo", "Rome"]
        days: Annotated[int, Field(ge=1, le=9)]

    tool = openai.pydantic_function_tool(Weather, name="weather")
    messages: list[Any] = [{"role": "user", "content": "Will it rain?"}]
    more: dict[str, Any] = {"model": "tiny", "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
    for _ in range(2):
        (choice,) = client.chat.completions.parse(messages=messages, temperature=1.0, **more).choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Weather)
        turn = choice.message.model_dump(include={"role", "content"}) | {
            "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})]
        }
        messages += [turn, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    with client.chat.completions.stream(messages=messages, temperature=1.0, **more) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        streamed = stream.get_final_completion().choices[0].message.tool_calls or []
    whole = client.chat.completions.parse(messages=messages, temperature=1.0, **more).choices[0].message.tool_calls or []
    assert [event.name for event in done] == ["weather"]
    assert [one.function.parsed_arguments for one in streamed] == [one.function.parsed_arguments for one in whole]
