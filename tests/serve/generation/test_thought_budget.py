"""Budgets of thoughts, over the constraint alone and through the endpoint with a model that would think for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.data.encoding.prompt_format import Layout
from apprentice.serve.api.application import build_app
from apprentice.serve.engines.transformers import TransformersEngine
from apprentice.serve.generation.replies.reply_parts import PartReader
from apprentice.serve.generation.served_models import Catalogue, ServedModel
from apprentice.serve.generation.thought_budget import ThoughtBudget
from tests.serve.api.routes.test_tools import ASK, OPENED, THINKING, post

MESSAGES = ASK["messages"]
EFFORT = OPENED.replace(
    "{% for message in messages %}", "Effort: {{ reasoning_effort or 'medium' }}.{% for message in messages %}", 1
)


@pytest.fixture(scope="module")
def layout(chat_model: Path) -> Layout:
    return layout_beside(chat_model)


def thinking(layout: Layout, template: str = OPENED) -> Layout:
    return Layout("chat", layout.tokenizer.with_template(template), reasoning="train")


def forced_ids(budget: ThoughtBudget, ids: list[int]) -> list[int | None]:
    """The id that is forced at each of `ids` and behind them; None where more than one may come."""
    forced: list[int | None] = []
    for id in [*ids, None]:
        allowed = np.flatnonzero(budget.allowed())
        forced.append(int(allowed[0]) if len(allowed) == 1 else None)
        if id is not None:
            budget.accept(id)
    return forced


@pytest.mark.parametrize("template", [THINKING, OPENED])
def test_a_thought_is_closed_at_its_budget_and_the_answer_is_free(layout: Layout, template: str) -> None:
    trained = thinking(layout, template)
    encode, is_in_thought = trained.tokenizer.encode, template == OPENED
    opening = [] if is_in_thought else encode("<think>")
    closing, thought, answer = encode("\n</think>\n\n"), encode("a b c d e f g h"), encode("Cold, and far north.")
    reader = PartReader(trained, (), is_in_thought)
    budget = ThoughtBudget(reader, len(thought), len(trained.tokenizer))
    free: list[None] = [None] * (len(opening) + len(thought))
    assert forced_ids(budget, [*opening, *thought, *closing, *answer]) == [*free, *closing, *[None] * (len(answer) + 1)]
    ended_early = [*opening, *thought[:3], *closing, *answer]
    assert set(forced_ids(ThoughtBudget(reader, len(thought) + len(answer), len(trained.tokenizer)), ended_early)) == {None}
    none = ThoughtBudget(reader, 0, len(trained.tokenizer))
    assert forced_ids(none, [*opening, *closing]) == [*[None] * len(opening), *closing, None]
    if not is_in_thought:
        long = [*answer, *answer]
        assert set(forced_ids(ThoughtBudget(reader, 1, len(trained.tokenizer)), long)) == {None}


@pytest.mark.asyncio
@pytest.mark.parametrize("budget", [0, 5])
async def test_a_model_that_thinks_for_ever_answers_within_its_budget(layout: Layout, chat_model: Path, budget: int) -> None:
    trained = thinking(layout)
    engine = TransformersEngine(chat_model, dtype="float32", max_running=4, max_queued=4, context=400, threads=1, device="cpu")
    try:
        app = build_app(Catalogue([ServedModel("tiny", engine, trained)]))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test/v1") as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
            settings: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "seed": 3, "temperature": 1.0}
            free = await client.chat.completions.create(**settings)
            assert free.choices[0].message.content == ""  # a model that knows nothing closes no thought
            assert free.usage.completion_tokens_details.reasoning_tokens == free.usage.completion_tokens
            within = {"extra_body": {"thinking_token_budget": budget, "return_token_ids": True}}
            reply = await client.chat.completions.create(**settings, **within)
            closing = trained.tokenizer.encode("\n</think>\n\n")
            (choice,) = reply.choices
            ids = choice.token_ids
            assert ids[budget : budget + len(closing)] == closing
            assert (
                ids[:budget]
                == (await client.chat.completions.create(**settings, extra_body={"return_token_ids": True}))
                .choices[0]
                .token_ids[:budget]
            )
            assert choice.message.content
            assert budget < reply.usage.completion_tokens_details.reasoning_tokens <= budget + len(closing)
            stream = await client.chat.completions.create(**settings, **within, stream=True, stream_options={"include_usage": True})
            deltas = [chunk async for chunk in stream]
            content = "".join(chunk.choices[0].delta.content or "" for chunk in deltas if chunk.choices)
            assert content == choice.message.content
            assert deltas[-1].usage == reply.usage
    finally:
        engine.close()


@pytest.mark.asyncio
async def test_a_budget_without_thoughts_and_an_engine_that_cannot_are_refused(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"messages": MESSAGES, "thinking_token_budget": 3}
    response, _ = await post(layout, "Cold.", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "thinking_token_budget")
    assert "replies of this model begin with no thought; leave it out" in response.json()["error"]["message"]
    monkeypatch.setattr("tests.serve.scripted.ScriptedEngine.follows_any_constraint", False)
    response, _ = await post(thinking(layout), "Cold.", body)
    assert "the engine of this endpoint cannot bound thoughts" in response.json()["error"]["message"]


@pytest.mark.asyncio
async def test_effort_reaches_templates_that_read_it_and_none_switches_thoughts_off(layout: Layout) -> None:
    trained = thinking(layout, EFFORT)
    for body in ({"reasoning_effort": "high"}, {"chat_template_kwargs": {"reasoning_effort": "high"}}):
        _, engine = await post(trained, "a", {"messages": MESSAGES} | body)
        assert "Effort: high." in layout.tokenizer.decode(engine.requests[0].prompt)
    response, engine = await post(trained, "Cold.", {"messages": MESSAGES, "reasoning_effort": "none"})
    assert response.json()["choices"][0]["message"] == {"role": "assistant", "content": "Cold."}
    assert "Effort: medium." in layout.tokenizer.decode(engine.requests[0].prompt)
    for body, reason in (
        ({"reasoning_effort": "low"}, "this model's chat template reads none; leave it out"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "contradict each other"),
        ({"reasoning_effort": "lots"}, "reasoning_effort"),
    ):
        response, _ = await post(thinking(layout), "a", {"messages": MESSAGES} | body)
        assert response.status_code == 400
        assert reason in json.dumps(response.json())
    response, _ = await post(layout, "a", {"messages": MESSAGES, "reasoning_effort": "none"})
    assert response.status_code == 200
