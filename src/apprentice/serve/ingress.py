"""The HTTP routes over one engine: OpenAI's, our own, health, metrics, and the page at `/`.

A plain ASGI application: any server runs it, Ray Serve among them. Knows nothing of replicas or models.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from apprentice import __version__
from apprentice.artifacts import PromptContract
from apprentice.data.layout import Layout
from apprentice.errors import did_you_mean
from apprentice.recipe import Serving
from apprentice.serve.answering import Answering
from apprentice.serve.body import CheckedRoute
from apprentice.serve.engine import Engine, EngineFailed, Overloaded, Request
from apprentice.serve.gate import BODY_TIMEOUT_S, Gate, Limits, key_of
from apprentice.serve.keys import Keys
from apprentice.serve.metrics import Metrics
from apprentice.serve.pages import serve_pages
from apprentice.serve.protocol import (
    Asked,
    ChatRequest,
    CompletionRequest,
    InstructRequest,
    RenderRequest,
    RequestProblem,
    TaskRequest,
    Usage,
)
from apprentice.serve.questions import answered, described, rendered
from apprentice.serve.refusals import answer_errors
from apprentice.tasks.schema import Task

log = logging.getLogger(__name__)


def build_app(
    engine: Engine,
    layout: Layout,
    model_name: str,
    *,
    serving: Serving | None = None,
    contract: PromptContract | None = None,
    tasks: Sequence[Task] = (),
    keys: Keys | None = None,
    limits: Limits | None = None,
    replica: str = "",
) -> ASGIApp:
    """The application that serves `engine` as `model_name`, phrasing prompts in `layout`; it closes the engine when it ends.

    `keys` None lets everybody in; `limits` counts what keys use.
    """
    serving = serving or Serving()
    door = _Door(engine, layout, model_name, serving, limits, Metrics(engine, model_name, replica))
    return Gate(
        _routes(door, contract, tasks),
        keys=keys,
        limits=limits,
        max_body_bytes=serving.max_body_bytes,
        body_timeout_s=min(BODY_TIMEOUT_S, serving.request_timeout_s),
    )


def describe_api() -> dict[str, Any]:
    """The endpoint's OpenAPI description; no model is loaded for it."""
    # Routes ask the engine and the layout for something only when they are called.
    nothing = cast(Any, SimpleNamespace(context=0, name="plain", close=lambda: None))
    return _routes(_Door(nothing, nothing, "model", Serving(), None, Metrics(nothing, "model", "")), None, ()).openapi()


def _routes(door: _Door, contract: PromptContract | None, tasks: Sequence[Task]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        door.engine.close()

    app = FastAPI(title="apprentice", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.route_class = CheckedRoute
    _serve_openai(app, door)
    _serve_ours(app, door, contract, {task.name: task for task in tasks})
    _serve_state(app, door)
    serve_pages(app)
    answer_errors(app)
    return app


class _Door:
    """What the routes share."""

    def __init__(
        self, engine: Engine, layout: Layout, model_name: str, serving: Serving, limits: Limits | None, metrics: Metrics
    ) -> None:
        self.engine = engine
        self.layout = layout
        self.metrics = metrics
        self.answering = Answering(engine, layout, model_name, timeout_s=serving.request_timeout_s)
        self.model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "apprentice"}
        self._model_name = model_name
        self._limits = limits
        self._answers: asyncio.Task[None] | None = None

    def check_model(self, http: HttpRequest, name: str | None) -> None:
        """Raises `RequestProblem` for a model that is not served, or not to this key."""
        if name not in (None, self._model_name):
            near = did_you_mean(str(name), [self._model_name])
            message = f"model {name!r} is not served here.{near} This endpoint serves {self._model_name!r}."
            raise RequestProblem(message, status=404, param="model", code="model_not_found")
        if (key := key_of(http.scope)) is not None and not key.may_use(self._model_name):
            message = f"key {key.name!r} may not use the model {self._model_name!r}."
            raise RequestProblem(message, status=403, param="model", code="model_not_allowed")

    async def answer(self, http: HttpRequest, asked: Asked) -> Response:
        self.check_model(http, asked.model)
        began = time.perf_counter()
        key = key_of(http.scope)

        def on_end(usage: Usage, first: float | None, status: int) -> None:
            self.metrics.ended(status, began, first, usage)
            if self._limits is not None and key is not None and key.tokens_per_minute is not None:
                self._limits.spend(key.name, key.tokens_per_minute, usage.prompt + usage.completion)

        try:
            return await self.answering.answer(asked, on_end)
        except Overloaded:
            self.metrics.ended(429, began, None, None)
            raise
        except RequestProblem as problem:
            self.metrics.ended(problem.status, began, None, None)
            raise

    async def has_answered(self) -> bool:
        """True once the engine has produced a token; the first call asks it for one."""
        self.engine.check()
        if self._answers is None:
            self._answers = asyncio.create_task(self._ask())
        if not self._answers.done():
            return False
        if self._answers.exception() is not None:
            self._answers = None
            return False
        return True

    async def _ask(self) -> None:
        (stream,) = self.engine.generate([Request((self.layout.tokenizer.end_id,), max_tokens=1)])
        try:
            await anext(stream)
        finally:
            stream.close()


def _serve_openai(app: FastAPI, door: _Door) -> None:
    @app.post("/v1/completions")
    async def completions(http: HttpRequest, asked: CompletionRequest) -> Response:
        return await door.answer(http, asked)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: HttpRequest, asked: ChatRequest) -> Response:
        return await door.answer(http, asked)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [door.model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(http: HttpRequest, name: str) -> dict[str, Any]:
        door.check_model(http, name)
        return door.model


def _serve_ours(app: FastAPI, door: _Door, contract: PromptContract | None, tasks: dict[str, Task]) -> None:
    def task_named(name: str) -> Task:
        if name not in tasks:
            message = f"task {name!r} is not known here.{did_you_mean(name, tasks)} GET /v1/tasks lists them."
            raise RequestProblem(message, status=404, param="task", code="task_not_found")
        return tasks[name]

    @app.post("/v1/instruct")
    async def instruct(http: HttpRequest, asked: InstructRequest) -> Response:
        return await door.answer(http, asked)

    @app.post("/v1/render")
    async def render(asked: RenderRequest) -> dict[str, Any]:
        if asked.task is not None:
            return rendered(task_named(asked.task), asked, door.layout)
        text, ids = door.answering.phrasing.rendered(asked)
        return {"text": text, "token_ids": ids}

    @app.get("/v1/contract")
    async def read_contract() -> dict[str, Any]:
        if contract is None:
            raise RequestProblem("this endpoint was started without a prompt contract of its own.", status=404)
        return contract.model_dump(mode="json")

    @app.get("/v1/tasks")
    async def list_tasks() -> dict[str, Any]:
        return {"object": "list", "data": [described(task) for task in tasks.values()]}

    @app.post("/v1/tasks/{name}")
    async def ask_task(http: HttpRequest, name: str, asked: TaskRequest) -> dict[str, Any]:
        door.check_model(http, asked.model)
        return await answered(task_named(name), asked, door.layout, door.answering)


def _serve_state(app: FastAPI, door: _Door) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        door.engine.check()
        return {"status": "ok", "model": door.model["id"], "layout": door.layout.name, "context": door.engine.context}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        try:
            if await door.has_answered():
                return {"status": "ready"}
        except EngineFailed as failure:
            log.warning("not ready: %s", failure)
        raise RequestProblem("the engine has not answered yet.", status=503, kind="server_error", code="not_ready")

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return door.engine.stats()._asdict()

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(door.metrics.text(), media_type="text/plain; version=0.0.4")
