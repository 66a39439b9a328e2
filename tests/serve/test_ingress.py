"""The routes over an engine of our own making: statuses, streams, and a place that is always given back."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from apprentice.data.contract import layout_beside
from apprentice.data.layout import Layout
from apprentice.serve.engine import EngineFailed, NewToken, Overloaded, Request, Stats
from apprentice.serve.ingress import build_app

pytestmark = pytest.mark.asyncio


class Scripted:
    """Replies with the ids it was given; then it ends, or fails, or (with nothing to say) is overloaded."""

    def __init__(self, ids: list[int], *, fails: bool = False) -> None:
        self.ids = ids
        self.fails = fails
        self.asked: list[Request] = []
        self.open = 0
        self.closed = False

    context = 100

    async def generate(self, request: Request) -> AsyncGenerator[NewToken, None]:
        if not self.ids:
            raise Overloaded
        self.asked.append(request)
        self.open += 1
        try:
            for place, id in enumerate(self.ids):
                last = place + 1 == len(self.ids) and not self.fails
                yield NewToken(id, "stop" if last else None)
            raise EngineFailed("out of memory")
        finally:
            self.open -= 1

    def stats(self) -> Stats:
        return Stats(self.open, 0, len(self.asked), 0)

    def check(self) -> None:
        if self.fails:
            raise EngineFailed("out of memory")

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def layout(chat_model: Path) -> Layout:
    return layout_beside(chat_model)


def client(engine: Scripted, layout: Layout) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_app(engine, layout, "tiny"), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_whole_reply(layout: Layout) -> None:
    engine = Scripted([*layout.tokenizer.encode("Good day."), layout.stop_ids[0]])
    async with client(engine, layout) as http:
        asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 50, "return_token_ids": True}
        body = (await http.post("/v1/completions", json=asked)).json()
    assert body["choices"] == [
        {"index": 0, "text": "Good day.", "finish_reason": "stop", "logprobs": None, "token_ids": engine.ids}
    ]
    assert body["usage"]["completion_tokens"] == len(engine.ids)
    assert body["usage"]["prompt_tokens"] == len(engine.asked[0].prompt) == len(layout.tokenizer.encode("Hello"))
    assert engine.open == 0


async def test_a_streamed_reply(layout: Layout) -> None:
    engine = Scripted([*layout.tokenizer.encode("Good day."), layout.stop_ids[0]])
    asked = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "stream_options": {"include_usage": True}}
    async with client(engine, layout) as http:
        response = await http.post("/v1/chat/completions", json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Good day."
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], len(engine.ids), "[DONE]")
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_reply_and_frees_the_place(layout: Layout, stream: bool) -> None:
    engine = Scripted(layout.tokenizer.encode("one two three four"))
    asked = {"instruction": "Count.", "stop": ["thr"], "stream": stream}
    async with client(engine, layout) as http:
        response = await http.post("/v1/instruct", json=asked)
    choices = [chunk["choices"][0] for chunk in events(response.text)[:-1]] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "one two "
    assert (choices[-1]["finish_reason"], engine.open) == ("stop", 0)


async def test_an_overloaded_engine_is_status_429(layout: Layout) -> None:
    async with client(Scripted([]), layout) as http:
        for stream in (False, True):
            response = await http.post("/v1/completions", json={"prompt": "a", "stream": stream})
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            assert response.json()["error"]["code"] == "overloaded"


async def test_an_engine_that_fails_says_so(layout: Layout) -> None:
    engine = Scripted(layout.tokenizer.encode("abc def"), fails=True)
    async with client(engine, layout) as http:
        whole = await http.post("/v1/completions", json={"prompt": "a"})
        streamed = events((await http.post("/v1/completions", json={"prompt": "a", "stream": True})).text)
        health = await http.get("/health")
    assert (whole.status_code, whole.json()["error"]["message"]) == (503, "the engine has stopped: out of memory.")
    assert (streamed[-2]["error"]["code"], streamed[-1]) == ("engine_failed", "[DONE]")
    assert health.status_code == 503


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/completions", {"prompt": "a", "model": "tinny"}, 404, "model_not_found"),
        ("POST", "/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "unsupported_parameter"),
        ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 101}, 400, "context_length_exceeded"),
        ("POST", "/v1/chat/completions", {}, 400, "missing"),
        ("POST", "/v1/chat/completions", None, 400, "missing"),
        ("GET", "/v1/models/other", None, 404, "model_not_found"),
        ("GET", "/v1/completions", None, 405, None),
        ("GET", "/nowhere", None, 404, "unknown_url"),
    ],
)
async def test_errors_have_openais_shape(layout: Layout, method: str, path: str, body: Any, status: int, code: str | None) -> None:
    async with client(Scripted([5]), layout) as http:
        response = await http.request(method, path, json=body)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"]) == (status, code)


async def test_a_body_that_is_not_json(layout: Layout) -> None:
    async with client(Scripted([5]), layout) as http:
        response = await http.post("/v1/completions", content='{"prompt": ', headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["message"][:21]) == (400, "the body is not JSON:")


async def test_models_health_gauges_and_page(layout: Layout) -> None:
    async with client(Scripted([5]), layout) as http:
        models = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["tiny"]
        assert (await http.get("/v1/models/tiny")).json() == models[0]
        assert (await http.get("/health")).json() == {"status": "ok", "model": "tiny", "layout": "chat", "context": 100}
        assert (await http.get("/stats")).json() == {"running": 0, "queued": 0, "requests": 0, "tokens": 0}
        page = await http.get("/")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert 'src="playground/app.js"' in page.text
        for file, kind in (("style.css", "text/css"), ("app.js", "text/javascript")):
            assert (await http.get(f"/playground/{file}")).headers["content-type"].startswith(kind)
        assert "http" not in page.text.replace("http://www.w3.org/2000/svg", "")  # nothing from elsewhere


async def test_the_engine_ends_with_the_application(layout: Layout) -> None:
    engine = Scripted([5])
    app = build_app(engine, layout, "tiny")
    async with app.router.lifespan_context(app):
        assert not engine.closed
    assert engine.closed
