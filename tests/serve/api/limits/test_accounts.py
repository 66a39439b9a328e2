"""What a request costs its key and what is counted of it: reserved before, settled after, once, whatever ended it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from starlette.requests import ClientDisconnect

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.data.encoding.prompt_format import Layout
from apprentice.inference.generation_request import GeneratedToken
from apprentice.recipe import Serving
from apprentice.serve.api.application import build_app
from apprentice.serve.api.limits.api_keys import GRACE_S, REFRESH_S, ApiKeys, new_key
from apprentice.serve.api.limits.rate_limiter import LocalRateLimits, RateLimiter
from apprentice.serve.api.limits.shared_rate_limits import RateLimiterDeployment, SharedRateLimits
from apprentice.serve.engines.base import EngineFailed
from apprentice.serve.generation.served_models import Catalogue, ServedModel
from apprentice.tasks.registry import library, load_task
from apprentice.tasks.schema import Task
from tests.serve.conftest import Counted
from tests.serve.scripted import ScriptedEngine, ScriptedReply

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def layout(chat_model: Path) -> Layout:
    return layout_beside(chat_model)


class Guarded:
    """A keys file with one key of so many tokens a minute, and a client that has it."""

    def __init__(self, file: Path, tokens: int | None, requests: int | None = None) -> None:
        self.key, entry = new_key("anna")
        limits = {"tokens_per_minute": tokens, "requests_per_minute": requests}
        self.file = file
        file.write_text(yaml.safe_dump({"keys": [yaml.safe_load(entry)[0] | limits]}))
        self.now = 100.0
        self.keys = ApiKeys(file, lambda: self.now)
        self.limiter = RateLimiter(lambda: self.now)

    def client(self, engine: ScriptedEngine, layout: Layout, **more: Any) -> httpx.AsyncClient:
        limits = more.pop("limits", LocalRateLimits(self.limiter))
        app = build_app(Catalogue([ServedModel("tiny", engine, layout)]), keys=self.keys, limits=limits, **more)
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test", headers=headers
        )


class Slow(ScriptedEngine):
    """Each token takes a turn of the loop, so that all who come at once run at once."""

    capacity = 1000

    def generate(self, requests: list[Any]) -> list[Any]:
        class Later(ScriptedReply):
            async def __anext__(self) -> list[GeneratedToken]:
                await asyncio.sleep(0)
                return await super().__anext__()

        super().generate(requests)
        return [Later(self, ()) for _ in requests]


async def test_many_at_once_do_not_use_more_than_a_minute_has(layout: Layout, tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "keys.yaml", 1000)
    engine = Slow([*layout.tokenizer.encode("one two three four"), layout.stop_ids[0]])
    engine.context = 200
    prompt = len(layout.tokenizer.encode("Hello"))
    each = prompt + len(engine.ids)
    async with guarded.client(engine, layout) as http:
        request_body = {"prompt": "Hello", "max_tokens": 100 - prompt}
        answers = await asyncio.gather(*(http.post("/v1/completions", json=request_body) for _ in range(96)))
        statuses = [answer.status_code for answer in answers]
        assert (statuses.count(200), statuses.count(429), engine.most) == (10, 86, 10)
        waits = [int(answer.headers["retry-after"]) for answer in answers if answer.status_code == 429]
        assert max(waits) <= 6  # a hundred come in six seconds
        # What was not used came back at once.
        left = 1000 - 10 * each
        assert guarded.limiter.reserve("anna", 1000, left).wait_s == 0.0
        assert guarded.limiter.reserve("anna", 1000, 1).wait_s > 0.0


async def test_a_refused_or_failed_request_gives_back_what_it_reserved(layout: Layout, tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "keys.yaml", 150)
    request_body = {"prompt": "Hello", "max_tokens": 90}
    async with guarded.client(ScriptedEngine([]), layout) as http:
        assert [(await http.post("/v1/completions", json=request_body)).json()["error"]["code"] for _ in range(3)] == [
            "overloaded"
        ] * 3
    assert guarded.limiter.reserve("anna", 150, 150).wait_s == 0.0


async def test_a_task_costs_its_key_what_it_reads_and_is_counted(layout: Layout, tmp_path: Path, counted: Counted) -> None:
    guarded = Guarded(tmp_path / "keys.yaml", 2000)
    engine = ScriptedEngine([5])
    engine.context = 1000
    task = load_task(library()["ag_news"])
    async with guarded.client(engine, layout, tasks=[task]) as http:
        answer = await http.post("/v1/tasks/ag_news", json={"fields": {"text": "a goal"}})
        assert answer.status_code == 200
        read = len(layout.encode_prompt(answer.json()["prompt"]))
        choices = layout.encode_answers([choice["choice"] for choice in answer.json()["choices"]])
        cost = read + sum(len(ids) + len(layout.end_ids) for ids in choices)
        assert guarded.limiter.reserve("anna", 2000, 2000 - cost - 10).wait_s == 0.0
        refused = await http.post("/v1/tasks/ag_news", json={"fields": {"text": "a goal"}})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert (await http.post("/v1/tasks/ag_news", json={"fields": {}})).status_code == 400
        assert guarded.limiter.reserve("anna", 2000, 10).wait_s == 0.0  # what is refused costs nothing
    assert [counted("apprentice_requests", model="tiny", status=status) for status in ("200", "429", "400")] == [1, 1, 1]


async def test_a_question_takes_few_places_however_many_choices_it_has(layout: Layout) -> None:
    engine = ScriptedEngine([5])
    engine.context, engine.capacity = 1000, 9
    definition = yaml.safe_load(library()["ag_news"].read_text())
    definition |= {"name": "many", "choices": [f"topic {number}" for number in range(77)]}
    definition["templates"] = [template | {"choices": None} for template in definition["templates"][:1]]
    definition["label"] = "'topic 1'"
    task = Task.model_validate({key: value for key, value in definition.items() if value is not None})
    app = build_app(Catalogue([ServedModel("tiny", engine, layout)]), tasks=[task])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        answer = await http.post("/v1/tasks/many", json={"fields": {"text": "a goal"}})
    assert answer.status_code == 200, answer.text
    assert len({choice["choice"] for choice in answer.json()["choices"]}) == len(engine.requests) == 77
    assert (engine.most, engine.open) == (8, 0)


async def test_a_stream_counts_as_what_it_ended_as(layout: Layout, counted: Counted) -> None:
    async def stream(engine: ScriptedEngine, **more: Any) -> str:
        app = build_app(Catalogue([ServedModel("tiny", engine, layout)]), **more)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return (await http.post("/v1/completions", json={"prompt": "a", "stream": True})).text

    ids = layout.tokenizer.encode("one two three")
    await stream(ScriptedEngine([*ids, layout.stop_ids[0]]))
    await stream(ScriptedEngine(ids, fails=True, failure=EngineFailed("out of memory")))
    await stream(ScriptedEngine(ids, fails=True, failure=ValueError("a fault")))
    assert [counted("apprentice_requests", model="tiny", status=status) for status in ("200", "503", "500", "499")] == [1, 1, 1, 0]
    assert counted("apprentice_request_seconds", model="tiny") == 1


async def test_a_client_that_leaves_counts_as_one_that_left(layout: Layout, counted: Counted) -> None:
    engine = Slow([*layout.tokenizer.encode("one two three"), layout.stop_ids[0]])
    app = build_app(Catalogue([ServedModel("tiny", engine, layout)]))
    body = b'{"prompt": "a", "stream": true}'
    incoming = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(incoming, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("the connection is gone")

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b"", "app": None}
    with pytest.raises((OSError, ClientDisconnect)):  # which the server then drops
        await app({**scope, "asgi": {"spec_version": "2.4"}, "state": {}}, receive, send)
    assert counted("apprentice_requests", model="tiny", status="499") == 1
    assert (engine.open, counted("apprentice_request_seconds", model="tiny")) == (0, 0)


async def test_a_request_that_takes_too_long_counts_once_and_in_no_histogram(layout: Layout, counted: Counted) -> None:
    class Silent(ScriptedEngine):
        def generate(self, requests: list[Any]) -> list[Any]:
            class Never(ScriptedReply):
                async def __anext__(self) -> list[GeneratedToken]:
                    await asyncio.Event().wait()
                    raise AssertionError

            super().generate(requests)
            return [Never(self, ()) for _ in requests]

    engine = Silent([5])
    app = build_app(Catalogue([ServedModel("tiny", engine, layout)]), serving=Serving(request_timeout_s=0.05))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 504
        assert (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 5000})).status_code == 400
    assert [counted("apprentice_requests", model="tiny", status=status) for status in ("504", "400", "499")] == [1, 1, 0]
    assert (engine.open, counted("apprentice_request_seconds", model="tiny")) == (0, 0)


class _Down:
    """A Ray Serve handle whose deployment is gone."""

    def __getattr__(self, name: str) -> Any:
        async def fail(*_: Any) -> float:
            raise RuntimeError("the actor died")

        return SimpleNamespace(remote=fail)


class _Up:
    """The handle of a limiter that runs."""

    def __init__(self, limiter: RateLimiterDeployment) -> None:
        self.limiter = limiter

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(getattr(self.limiter, name)(*arguments)))


async def test_a_limiter_that_is_down_is_an_answer_in_openais_shape(layout: Layout, tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "keys.yaml", 1000, 10)
    engine = ScriptedEngine([5, layout.stop_ids[0]])
    async with guarded.client(engine, layout, limits=SharedRateLimits(_Down())) as http:
        answer = await http.post("/v1/completions", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "limits_unavailable", "5")
    assert "x-request-id" in answer.headers
    assert engine.requests == []
    shared = RateLimiterDeployment()
    async with guarded.client(engine, layout, limits=SharedRateLimits(_Up(shared))) as http:
        assert (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 20})).status_code == 200
        await asyncio.sleep(0)
    assert (await shared.reserve("anna", 1000, 1000 - len(layout.tokenizer.encode("a")) - 2)).wait_s == 0.0


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_tell_what_is_left_of_the_limits(layout: Layout, tmp_path: Path, stream: bool) -> None:
    """OpenAI's headers: after what this request may come to use, in refusals too."""
    guarded = Guarded(tmp_path / "keys.yaml", 600, 2)
    prompt = len(layout.tokenizer.encode("Hello"))
    async with guarded.client(ScriptedEngine([5, layout.stop_ids[0]]), layout) as http:
        request_body = {"prompt": "Hello", "max_tokens": 100 - prompt, "stream": stream}
        first = (await http.post("/v1/completions", json=request_body)).headers
        rate_limits = {name.removeprefix("x-ratelimit-"): value for name, value in first.items() if name.startswith("x-ratelimit-")}
        assert rate_limits == {
            "limit-requests": "2",
            "remaining-requests": "1",
            "reset-requests": "30s",
            "limit-tokens": "600",
            "remaining-tokens": "500",
            "reset-tokens": "10s",
        }
        await http.post("/v1/completions", json=request_body)
        refused = await http.post("/v1/completions", json=request_body)
        assert (refused.status_code, refused.headers["x-ratelimit-remaining-requests"]) == (429, "0")
        assert "x-ratelimit-limit-requests" not in (await http.get("/v1/models")).headers  # asks for nothing that is counted


async def test_a_typo_in_the_keys_file_is_said_and_ends_what_it_should_have_revoked(
    layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = Guarded(tmp_path / "keys.yaml", None)
    good = guarded.file.read_text()
    engine = ScriptedEngine([5, layout.stop_ids[0]])
    async with guarded.client(engine, layout) as http:

        async def code() -> str | None:
            answer = await http.post("/v1/completions", json={"prompt": "a"})
            return str(answer.json()["error"]["code"]) if answer.status_code != 200 else None

        guarded.file.write_text("keys: [{name: anna, sha256: revoked}]")
        guarded.now += REFRESH_S + 1
        assert await code() is None  # perhaps it is just being written
        assert "keys.0.sha256" in caplog.text
        guarded.now += GRACE_S + 1
        assert await code() == "keys_unreadable"
        assert (await http.get("/health")).status_code == 200
        guarded.file.write_text(good)
        guarded.now += REFRESH_S + 1
        assert await code() is None
        guarded.file.write_text(good.replace("anna", "anne"))
        guarded.now += REFRESH_S + 1
        assert await code() is None
        assert [key.name for key in guarded.keys.all] == ["anne"]
