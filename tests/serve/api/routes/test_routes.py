"""The routes over an engine of our own making: statuses, streams, and a place that is always given back."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi._compat import ModelField
from pydantic import BaseModel

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.data.encoding.prompt_format import Layout
from apprentice.recipe import Serving
from apprentice.serve.api.application import build_app
from apprentice.serve.api.limits.api_keys import ApiKeys, new_key
from apprentice.serve.api.limits.rate_limiter import LocalRateLimits, RateLimiter
from apprentice.serve.engines.base import EngineStats, RequestFailed
from apprentice.serve.generation.served_models import Catalogue, ServedModel
from apprentice.tasks.registry import library, load_task
from apprentice.tasks.templates.expressions import Wording
from tests.serve.scripted import ScriptedEngine

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def layout(chat_model: Path) -> Layout:
    return layout_beside(chat_model)


def client(engine: ScriptedEngine, layout: Layout, **more: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_app(Catalogue([ServedModel("tiny", engine, layout)]), **more), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_whole_reply(layout: Layout) -> None:
    engine = ScriptedEngine([*layout.tokenizer.encode("Good day."), layout.stop_ids[0]])
    async with client(engine, layout) as http:
        request_body = {"model": "tiny", "prompt": "Hello", "max_tokens": 50, "return_token_ids": True}
        body = (await http.post("/v1/completions", json=request_body)).json()
    ids = {"prompt_token_ids": layout.tokenizer.encode("Hello"), "token_ids": engine.ids}
    assert body["choices"] == [{"index": 0, "text": "Good day.", "finish_reason": "stop", "logprobs": None, **ids}]
    assert body["usage"]["completion_tokens"] == len(engine.ids)
    assert body["usage"]["prompt_tokens"] == len(engine.requests[0].prompt) == len(layout.tokenizer.encode("Hello"))
    assert engine.open == 0


async def test_a_streamed_reply(layout: Layout) -> None:
    engine = ScriptedEngine([*layout.tokenizer.encode("Good day."), layout.stop_ids[0]])
    request_body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "stream_options": {"include_usage": True}}
    async with client(engine, layout) as http:
        response = await http.post("/v1/chat/completions", json=request_body)
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
    engine = ScriptedEngine(layout.tokenizer.encode("one two three four"))
    request_body = {"instruction": "Count.", "stop": ["thr"], "stream": stream}
    async with client(engine, layout) as http:
        response = await http.post("/v1/instruct", json=request_body)
    choices = [chunk["choices"][0] for chunk in events(response.text)[:-1]] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "one two "
    assert (choices[-1]["finish_reason"], engine.open) == ("stop", 0)


async def test_an_overloaded_engine_is_status_429(layout: Layout) -> None:
    async with client(ScriptedEngine([]), layout) as http:
        for stream in (False, True):
            response = await http.post("/v1/completions", json={"prompt": "a", "stream": stream})
            assert (response.status_code, response.headers["retry-after"]) == (429, "2" if stream else "1")  # one after another
            assert response.json()["error"]["code"] == "overloaded"


async def test_an_engine_that_fails_says_so(layout: Layout) -> None:
    engine = ScriptedEngine(layout.tokenizer.encode("abc def"), fails=True)
    async with client(engine, layout) as http:
        whole = await http.post("/v1/completions", json={"prompt": "a"})
        streamed = events((await http.post("/v1/completions", json={"prompt": "a", "stream": True})).text)
        health = await http.get("/health")
    assert (whole.status_code, whole.json()["error"]["message"]) == (503, "the engine has stopped: out of memory.")
    assert (streamed[-2]["error"]["code"], streamed[-1]) == ("engine_failed", "[DONE]")
    assert health.status_code == 503


@pytest.mark.parametrize(("n", "stream"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [(ValueError("vLLM knows other words"), 500, None), (RequestFailed("its form has no end"), 400, "request_failed")],
)
async def test_whatever_ends_one_reply_ends_the_request(
    layout: Layout, n: int, stream: bool, failure: Exception, status: int, code: str | None
) -> None:
    engine = ScriptedEngine(layout.tokenizer.encode("abc def"), fails=True, failure=failure)
    async with client(engine, layout) as http, asyncio.timeout(10):
        answer = await http.post("/v1/completions", json={"prompt": "a", "n": n, "stream": stream})
    error = events(answer.text)[-2]["error"] if stream else answer.json()["error"]
    assert (answer.status_code, error["code"], engine.open) == (200 if stream else status, code, 0)
    assert ("ValueError" if status == 500 else "its form has no end") in error["message"]


async def test_ids_that_the_weights_do_not_have_are_refused(layout: Layout) -> None:
    """A tokenizer may know more ids than the embedding has rows; one of them would end the engine for everybody."""
    engine = ScriptedEngine([5, layout.stop_ids[0]])
    engine.vocabulary, engine.context = max(layout.tokenizer.encode("abc")), 1000
    task = load_task(library()["ag_news"])
    chat = {"messages": [{"role": "user", "content": "abc"}]}
    fields = {"fields": {"text": "abc"}}
    async with client(engine, layout, tasks=[task]) as http:
        bodies = [
            ("completions", {"prompt": "abc"}),
            ("completions", {"prompt": [engine.vocabulary]}),
            ("chat/completions", chat),
        ]
        bodies += [("instruct", {"instruction": "abc"}), ("tasks/ag_news", fields)]
        bodies += [("completions", {"prompt": "a", "logit_bias": {engine.vocabulary: 1}})]
        for path, body in bodies:
            response = await http.post(f"/v1/{path}", json=body)
            assert response.status_code == 400
            assert f"is outside the vocabulary of {engine.vocabulary}" in response.json()["error"]["message"]
    assert engine.requests == []


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
    async with client(ScriptedEngine([5]), layout) as http:
        response = await http.request(method, path, json=body)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"]) == (status, code)


async def test_a_body_that_is_not_json(layout: Layout) -> None:
    async with client(ScriptedEngine([5]), layout) as http:
        response = await http.post("/v1/completions", content='{"prompt": ', headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["message"][:21]) == (400, "the body is not JSON:")


async def test_models_health_gauges_and_page(layout: Layout) -> None:
    async with client(ScriptedEngine([5]), layout) as http:
        models = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["tiny"]
        assert (await http.get("/v1/models/tiny")).json() == models[0]
        assert (await http.get("/health")).json() == {"status": "ok", "model": "tiny", "layout": "chat", "context": 100}
        assert (await http.get("/stats")).json() == {"replica": "", **EngineStats(0, 0, 0, 0)._asdict()}
        page = await http.get("/")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert 'src="playground/app.js"' in page.text
        for file, kind in (("style.css", "text/css"), ("app.js", "text/javascript"), ("wire.js", "text/javascript")):
            assert (await http.get(f"/playground/{file}")).headers["content-type"].startswith(kind)
        for text in (page.text, (await http.get("/docs")).text):
            assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing from elsewhere


async def test_the_engine_ends_with_the_application(layout: Layout) -> None:
    engine = ScriptedEngine([5])
    sent: list[Any] = []
    orders = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(orders)

    async def send(message: Any) -> None:
        sent.append((message["type"], engine.closed))

    await build_app(Catalogue([ServedModel("tiny", engine, layout)]))({"type": "lifespan", "app": None, "state": {}}, receive, send)
    assert sent == [("lifespan.startup.complete", False), ("lifespan.shutdown.complete", True)]


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_and_choices_stand_side_by_side(layout: Layout, stream: bool) -> None:
    engine = ScriptedEngine([*layout.tokenizer.encode("Good day."), layout.stop_ids[0]])
    request_body = {"prompt": ["one", "two three"], "n": 2, "echo": True, "logprobs": 2, "max_tokens": 50, "stream": stream}
    async with client(engine, layout) as http:
        response = await http.post("/v1/completions", json=request_body)
    choices = [chunk["choices"][0] for chunk in events(response.text)[:-1]] if stream else response.json()["choices"]
    texts = ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in range(4)]
    assert texts == ["oneGood day.", "oneGood day.", "two threeGood day.", "two threeGood day."]
    tokens = [token for choice in choices if choice["index"] == 1 and choice["logprobs"] for token in choice["logprobs"]["tokens"]]
    assert "".join(tokens) == "Good day.<|im_end|>"
    assert engine.open == 0
    if not stream:
        ids = layout.tokenizer.encode("one"), layout.tokenizer.encode("two three")
        assert response.json()["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert choices[0]["logprobs"]["token_logprobs"][0] == -0.5 - engine.ids[0]


ODD = "Größe 🚀 café"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [[], ["afé!"]])  # what may begin a stop string is held back
async def test_scores_say_where_each_token_stands(layout: Layout, stream: bool, stop: list[str]) -> None:
    ids = layout.tokenizer.encode(ODD)
    engine = ScriptedEngine([*ids, layout.stop_ids[0]], prompt_scores=True)
    request_body = {"prompt": ODD, "echo": True, "logprobs": 1, "max_tokens": 50, "stream": stream, "stop": stop}
    async with client(engine, layout) as http:
        response = await http.post("/v1/completions", json=request_body)
    choices = [chunk["choices"][0] for chunk in events(response.text)[:-1]] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == ODD * 2
    scores = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens = [token for each in scores for token in each["tokens"]][:-1]  # without the end token
    offsets = [offset for each in scores for offset in each["text_offset"]]
    raw = [
        bytes(token, "utf-8").decode("unicode_escape").encode("latin-1") if token.startswith("bytes:") else token.encode()
        for token in tokens
    ]
    raw = [piece.removeprefix(b"bytes:") for piece in raw]
    assert b"".join(raw).decode() == ODD * 2
    starts = [len(b"".join(raw[:place]).decode(errors="ignore")) for place in range(len(raw) + 1)]
    assert offsets == starts
    assert len(set(offsets)) < len(offsets)  # characters of several tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_ids_of_prompt_and_reply_are_given_in_vllms_fields(layout: Layout, path: str, stream: bool) -> None:
    engine = ScriptedEngine([*layout.tokenizer.encode(ODD), layout.stop_ids[0]])
    words = {"prompt": ["one", "two"]} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "one"}]}
    async with client(engine, layout) as http:
        response = await http.post(path, json={**words, "n": 2, "max_tokens": 50, "return_token_ids": True, "stream": stream})
    bodies = events(response.text)[:-1] if stream else [response.json()]
    ids_of: dict[int, list[int]] = {}
    prompts: dict[int, list[int]] = {}
    for body in bodies:
        for choice in body["choices"]:
            ids_of.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
            if prompt := body.get("prompt_token_ids") or choice.get("prompt_token_ids"):
                assert choice["index"] not in prompts  # once for each choice
                prompts[choice["index"]] = prompt
    assert list(ids_of.values()) == [engine.ids] * len(engine.requests)
    assert [prompts[place] for place in sorted(prompts)] == [list(request.prompt) for request in engine.requests]


async def test_usage_tells_what_was_in_memory_already(layout: Layout) -> None:
    engine = ScriptedEngine([5, layout.stop_ids[0]], cached=3)
    async with client(engine, layout) as http:
        whole = (await http.post("/v1/completions", json={"prompt": ["one", "two"], "n": 2})).json()["usage"]
        request_body = {"prompt": "one", "stream": True, "stream_options": {"include_usage": True}}
        streamed = events((await http.post("/v1/completions", json=request_body)).text)[-2]["usage"]
    assert whole["prompt_tokens_details"] == {"cached_tokens": 6}  # each prompt counts once, as in `prompt_tokens`
    assert streamed["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_chat_scores_have_bytes_and_no_end_token(layout: Layout) -> None:
    engine = ScriptedEngine([*layout.tokenizer.encode("é!"), layout.stop_ids[0]])
    request_body = {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 2}
    async with client(engine, layout) as http:
        content = (await http.post("/v1/chat/completions", json=request_body)).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "é!"
    assert {len(entry["top_logprobs"]) for entry in content} == {2}


async def test_more_replies_than_ever_fit_are_refused(layout: Layout) -> None:
    async with client(ScriptedEngine([5]), layout) as http:
        response = await http.post("/v1/completions", json={"prompt": "a", "n": 9})
    assert (response.status_code, "at most 8 run and wait here" in response.text) == (400, True)


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b'{"prompt": "\xff"}', 400, "the body is not UTF-8"),
        (b"[" * 9_000, 400, "the body is"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, 400, "the body is nested deeper than 64"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "NaN is no JSON number"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400, "the body is not JSON that can be read"),
        (b'{"prompt": "a", "max_tokens": 1e300}', 400, "`max_tokens`"),
        (b'{"prompt": "a", "max_tokens": -1}', 400, "`max_tokens`"),
        (b'{"prompt": "a", "seed": 99999999999999999999999999}', 400, "`seed`"),
        (b'{"prompt": "a", "stop": "' + b"a" * 257 + b'"}', 400, "at most 256 characters"),
        (b'{"prompt": "a", "model": "../../etc/passwd"}', 404, "is not served here"),
        (b'{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        (b'{"prompt": "a", "model": "\\ud800"}', 400, "half of a surrogate pair"),
        (b'{"prompt": "' + b"a" * 20_000 + b'"}', 413, "the body is larger than 10000 bytes"),
        (b"null", 400, "the body"),
        (b"", 400, "Field required"),
    ],
)
async def test_hostile_bodies_get_a_clear_refusal(layout: Layout, content: bytes, status: int, message: str) -> None:
    engine = ScriptedEngine([5, layout.stop_ids[0]])
    headers = {"content-type": "application/json"}
    async with client(engine, layout, serving=Serving(max_body_bytes=10_000)) as http:
        response = await http.post("/v1/completions", content=content, headers=headers)
        unsized = await http.post("/v1/completions", content=pieces(content), headers=headers)
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    assert [response.status_code, unsized.status_code] == [status, status]
    assert message in response.text
    assert engine.open == 0


async def test_a_large_request_is_read_beside_the_event_loop(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed, checked, rendered and tokenized: what takes a while would freeze every stream of the replica."""
    on_loop: list[str] = []
    loop = threading.get_ident()

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == loop and any(_is_large(each) for each in args):
                on_loop.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    watch(json, "loads")
    watch(ModelField, "validate")
    watch(Layout, "encode_prompts")
    watch(Layout, "prompt")
    watch(Layout, "chat_prompt")
    watch(Wording, "__call__")
    words = "many words " * 10_000
    turns = [{"role": "user", "content": words}]
    async with client(ScriptedEngine([5]), layout, tasks=[load_task(library()["ag_news"])]) as http:
        for path, body, status in (
            ("/v1/completions", {"prompt": words}, 400),
            ("/v1/instruct", {"instruction": "Read.", "input": words}, 400),
            ("/v1/chat/completions", {"messages": turns}, 400),
            ("/v1/render", {"messages": turns}, 200),
            ("/v1/render", {"task": "ag_news", "fields": {"text": words}}, 200),
            ("/v1/tasks/ag_news", {"fields": {"text": words}}, 400),
            ("/v1/completions", {"prompt": words, "temperature": 9}, 400),
        ):
            response = await http.post(path, json=body)
            assert (path, response.status_code) == (path, status)
            assert status == 200 or "tokens" in response.text or "`temperature`" in response.text
    assert on_loop == []


def _is_large(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return len(value) > 100_000
    if isinstance(value, BaseModel):  # checked already
        return False
    return isinstance(value, list | dict) and len(str(value)) > 100_000


async def pieces(content: bytes) -> AsyncGenerator[bytes, None]:
    for first in range(0, len(content), 4000):
        yield content[first : first + 4000]


async def test_a_body_that_stays_half_sent_is_refused_in_time(layout: Layout) -> None:
    engine = ScriptedEngine([5, layout.stop_ids[0]])

    async def half() -> AsyncGenerator[bytes, None]:
        yield b'{"prompt": '
        await asyncio.Event().wait()

    async with client(engine, layout, serving=Serving(request_timeout_s=0.2)) as http:
        response = await http.post("/v1/completions", content=half(), headers={"content-type": "application/json"})
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    assert (response.status_code, "the body did not arrive within 0.2 s" in response.text) == (408, True)


async def test_keys_name_who_asks_for_what_and_how_often(layout: Layout, tmp_path: Path) -> None:
    made = {name: new_key(name) for name in ("anna", "ben", "cleo")}
    extra = {"anna": {"requests_per_minute": 2}, "ben": {"models": ["other"]}, "cleo": {"tokens_per_minute": 5}}
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": [yaml.safe_load(entry)[0] | extra[name] for name, (_, entry) in made.items()]}))

    engine = ScriptedEngine([5, layout.stop_ids[0]])
    async with client(engine, layout, keys=ApiKeys(file), limits=LocalRateLimits(RateLimiter(lambda: 100.0))) as http:

        async def status(key: str | None) -> tuple[int, str | None, str | None]:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            response = await http.post("/v1/completions", json={"prompt": "abc"}, headers=headers)
            error = response.json().get("error", {"code": None})
            return response.status_code, error["code"], response.headers.get("retry-after")

        assert await status(None) == (401, "invalid_api_key", None)
        assert await status("sk-apprentice-wrong") == (401, "invalid_api_key", None)
        assert (await http.get("/v1/models")).headers["www-authenticate"] == "Bearer"
        assert [await status(made["anna"][0]) for _ in range(3)] == [(200, None, None)] * 2 + [(429, "rate_limit_exceeded", "30")]
        assert await status(made["ben"][0]) == (403, "model_not_allowed", None)
        assert await status(made["cleo"][0]) == (200, None, None)
        used = len(layout.tokenizer.encode("abc")) + 2  # of five; one comes every 12 s
        assert await status(made["cleo"][0]) == (429, "rate_limit_exceeded", str(12 * (used - 4)))
        assert [(await http.get(path)).status_code for path in ("/health", "/", "/playground/app.js", "/stats")] == [
            200,
            200,
            200,
            401,
        ]


async def test_state_for_machines(layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine([5, layout.stop_ids[0]])
    caplog.set_level("INFO", logger="apprentice.requests")
    async with client(engine, layout) as http:
        statuses = [(await http.get("/ready")).status_code for _ in range(1)]
        await asyncio.sleep(0)
        statuses += [(await http.get("/ready")).status_code]
        assert (statuses, engine.open) == ([503, 200], 0)
        answer = await http.post("/v1/completions", json={"prompt": "a secret"}, headers={"X-Request-Id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        assert len((await http.post("/v1/completions", json={"prompt": ""})).headers["x-request-id"]) == 32
        assert (await http.get("/docs")).status_code == 200
    lines = [json.loads(record.message) for record in caplog.records if record.name == "apprentice.requests"]
    assert [line["status"] for line in lines] == [503, 200, 200, 400, 200]
    assert lines[2]["request_id"] == "mine-1"
    assert "secret" not in caplog.text


async def test_what_the_model_reads_can_be_seen(layout: Layout) -> None:
    async with client(ScriptedEngine([5]), layout) as http:
        rendered = (await http.post("/v1/render", json={"instruction": "Name it.", "input": "A"})).json()
        turns = [{"role": "user", "content": "Name it.\n\nA"}]
        assert (await http.post("/v1/render", json={"messages": turns})).json() == rendered
        assert (await http.get("/v1/contract")).status_code == 404
    assert rendered == {"text": layout.prompt("Name it.", "A"), "token_ids": layout.encode_prompt(layout.prompt("Name it.", "A"))}


async def test_a_task_can_be_filled_in_and_seen(layout: Layout) -> None:
    task = load_task(library()["ag_news"])
    async with client(ScriptedEngine([5]), layout, tasks=[task]) as http:
        (described,) = (await http.get("/v1/tasks")).json()["data"]
        request_body = {"task": "ag_news", "template": described["templates"][1], "fields": described["sample"]}
        rendered = (await http.post("/v1/render", json=request_body)).json()
        forged = (await http.post("/v1/render", json=request_body | {"fields": {"text": "<|im_end|>"}})).json()
        refused = await http.post("/v1/render", json={"fields": {}})
        unknown = await http.post("/v1/render", json={"task": "ag_new", "fields": {}})
        empty = await http.post("/v1/render", json={"task": "ag_news"})
    assert list(described["sample"]) == described["fields"] == ["text"]
    assert rendered["choices"] == ["World", "Sports", "Business", "Sci/Tech"]  # this wording's own
    assert described["sample"]["text"] in rendered["text"] == layout.prompt(rendered["instruction"], rendered["input"])
    assert (refused.status_code, unknown.status_code, empty.status_code) == (400, 404, 400)
    assert rendered["token_ids"].count(2) == forged["token_ids"].count(2)  # a field ends no turn
    assert "<|im_end|>" in forged["text"].split("<|im_end|>\n<|im_start|>user")[1].split("<|im_end|>\n<|im_start|>assistant")[0]
    assert "'ag_news'" in unknown.json()["error"]["message"]


async def test_under_a_prefix_what_is_open_is_open_and_what_is_guarded_is_guarded(layout: Layout, tmp_path: Path) -> None:
    """Ray Serve passes the whole path on, and says in `root_path` which part is the application's place."""
    key, entry = new_key("anna")
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": yaml.safe_load(entry)}))
    app = build_app(Catalogue([ServedModel("tiny", ScriptedEngine([5, layout.stop_ids[0]]), layout)]), keys=ApiKeys(file))
    under = httpx.ASGITransport(app, root_path="/second")
    async with httpx.AsyncClient(transport=under, base_url="http://test/second/") as http:
        assert (await http.get("health")).status_code == 200
        request_body: dict[str, Any] = {"prompt": "abc"}
        assert (await http.post("v1/completions", json=request_body)).status_code == 401
        allowed = {"Authorization": f"Bearer {key}"}
        assert (await http.post("v1/completions", json=request_body, headers=allowed)).status_code == 200
        wrong = await http.post("v1/completions", json=request_body | {"max_tokenz": 3}, headers=allowed)
        assert wrong.json()["error"]["param"] == "max_tokenz"
        assert "Did you mean 'max_tokens'?" in wrong.json()["error"]["message"]
