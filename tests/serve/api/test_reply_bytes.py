"""The bytes of replies: bodies, headers and server-sent events stay as clients have read them, key for key.

`reply_bytes.json` beside this file holds them. A change that is meant is written with `WRITE_REPLY_BYTES=1`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.data.encoding.prompt_format import Layout
from apprentice.serve.api.application import build_app
from apprentice.serve.engines.base import EngineFailed
from apprentice.serve.generation.served_models import Catalogue, ServedModel
from apprentice.tasks.registry import library, load_task
from tests.serve.scripted import ScriptedEngine

pytestmark = pytest.mark.asyncio
GOLDEN = Path(__file__).with_name("reply_bytes.json")
TEXT = "Größe 🚀 café: done"
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
REQUESTS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/completions", {"prompt": "Hello"}),
    ("POST", "/v1/completions", {"prompt": ["one", "two three"], "n": 2, "echo": True, "logprobs": 2, "return_token_ids": True}),
    ("POST", "/v1/completions", {"prompt": [5, 6, 7], "echo": True, "max_tokens": 0, "logprobs": 0}),
    ("POST", "/v1/completions", {"prompt": "Hello", "stop": ["caf"], "logprobs": 1}),
    ("POST", "/v1/completions", {"prompt": "Hello", "stream": True}),
    ("POST", "/v1/completions", {"prompt": ["a", "b"], "echo": True, "logprobs": 1, "return_token_ids": True, "n": 2} | USAGE),
    ("POST", "/v1/completions", {"prompt": "Hello", "stop": ["caf"], "logprobs": 1, "return_token_ids": True} | USAGE),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", CHAT | {"n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
    ("POST", "/v1/chat/completions", CHAT | {"stream": True}),
    ("POST", "/v1/chat/completions", CHAT | {"n": 2, "logprobs": True, "top_logprobs": 1, "return_token_ids": True} | USAGE),
    ("POST", "/v1/chat/completions", CHAT | {"logprobs": True, "stop": "café"} | USAGE),
    ("POST", "/v1/instruct", {"instruction": "Say it.", "input": "now", "logprobs": 1}),
    ("POST", "/v1/instruct", {"instruction": "Say it.", "input": "now", "logprobs": 1} | USAGE),
    ("POST", "/v1/render", {"instruction": "Say it.", "input": "now"}),
    ("POST", "/v1/render", {"task": "ag_news", "fields": {"text": "a goal"}}),
    ("POST", "/v1/tasks/ag_news", {"fields": {"text": "a goal"}}),
    ("POST", "/v1/tasks/multi30k_en_de", {"fields": {"translation": {"en": "A dog.", "de": "Ein Hund."}}}),
    ("POST", "/v1/completions", {"prompt": "a", "suffix": "b"}),
    ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 4000}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}),
    ("POST", "/v1/completions", {"prompt": "a", "model": "tinny"}),
    ("POST", "/v1/tasks/ag_new", {"fields": {}}),
    ("POST", "/v1/tasks/ag_news", {"fields": {}}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/v1/contract", None),
    ("GET", "/v1/tasks", None),
    ("GET", "/stats", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/nowhere", None),
    ("GET", "/v1/completions", None),
]


async def reply(engine: ScriptedEngine, layout: Layout, method: str, path: str, body: Any) -> dict[str, Any]:
    tasks = [load_task(library()[name]) for name in ("ag_news", "multi30k_en_de")]
    app = build_app(Catalogue([ServedModel("tiny", engine, layout)]), tasks=tasks)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        response = await http.request(method, path, json=body, headers={"X-Request-Id": "one"})
    headers = [f"{name}: {value}" for name, value in response.headers.multi_items() if name != "content-length"]
    text = re.sub(r"cmpl-[0-9a-f]{32}", "cmpl-ID", response.text)
    return {"status": response.status_code, "headers": headers, "body": re.sub(r'"created":\d+', '"created":0', text)}


async def replies(layout: Layout, requests: list[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    ids = [*layout.tokenizer.encode(TEXT), layout.stop_ids[0]]
    all_replies: dict[str, dict[str, Any]] = {}
    for method, path, body in requests:
        engine = ScriptedEngine(ids, prompt_scores=True, cached=1)
        engine.context = 1000
        all_replies[f"{method} {path} {json.dumps(body)}"] = await reply(engine, layout, method, path, body)
    for name, engine in (
        ("failed", ScriptedEngine(ids, fails=True, failure=EngineFailed("out of memory"))),
        ("faulty", ScriptedEngine(ids, fails=True, failure=ValueError("a fault"))),
        ("overloaded", ScriptedEngine([])),
    ):
        for more in ({}, USAGE):
            request_body = {"prompt": "a"} | more
            all_replies[f"{name} {json.dumps(request_body)}"] = await reply(engine, layout, "POST", "/v1/completions", request_body)
    return all_replies


@pytest.mark.parametrize("kind", ["chat", "plain"])
async def test_replies_have_the_bytes_that_they_had(kind: str, chat_model: Path, plain_model: Path) -> None:
    requests = REQUESTS if kind == "chat" else REQUESTS[:3] + REQUESTS[12:18]
    all_replies = await replies(layout_beside(chat_model if kind == "chat" else plain_model), requests)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    if os.environ.get("WRITE_REPLY_BYTES"):
        GOLDEN.write_text(json.dumps(golden | {kind: all_replies}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    assert all_replies == golden[kind]
