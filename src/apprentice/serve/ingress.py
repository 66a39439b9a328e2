"""The HTTP routes over the models of a catalogue: OpenAI's, our own, health, metrics, and the page at `/`.

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
from weakref import WeakKeyDictionary

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from apprentice import __version__
from apprentice.errors import did_you_mean
from apprentice.recipe import Serving
from apprentice.serve.answering import Answering
from apprentice.serve.appointments import Appointments
from apprentice.serve.body import CheckedRoute, beside_loop_if_large
from apprentice.serve.catalogue import Catalogue, Lease, Model
from apprentice.serve.engine import EngineFailed, Overloaded, Request
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
    catalogue: Catalogue,
    *,
    serving: Serving | None = None,
    tasks: Sequence[Task] = (),
    keys: Keys | None = None,
    limits: Limits | None = None,
    replica: str = "",
    behind_proxy: bool = False,
) -> ASGIApp:
    """The application that serves the models of `catalogue`; it closes their engines when it ends.

    `keys` None lets everybody in; `limits` counts what keys use. `behind_proxy`: Ray Serve's.
    """
    serving = serving or Serving()
    door = _Door(catalogue, serving, limits, Metrics(catalogue.engines, replica))
    return Gate(
        _routes(door, tasks),
        keys=keys,
        limits=limits,
        max_body_bytes=serving.max_body_bytes,
        body_timeout_s=min(BODY_TIMEOUT_S, serving.request_timeout_s),
        behind_proxy=behind_proxy,
    )


def describe_api() -> dict[str, Any]:
    """The endpoint's OpenAPI description; no model is loaded for it."""
    # Routes ask the catalogue for something only when they are called.
    nothing = cast(Any, SimpleNamespace(engines={}))
    return _routes(_Door(nothing, Serving(), None, Metrics({}, "")), ()).openapi()


def _routes(door: _Door, tasks: Sequence[Task]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        for engine in door.engines.values():
            engine.close()

    app = FastAPI(title="apprentice", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.route_class = CheckedRoute
    _serve_openai(app, door)
    _serve_ours(app, door, {task.name: task for task in tasks})
    _serve_state(app, door)
    serve_pages(app)
    answer_errors(app, door.appointments)
    return app


class _Door:
    """What the routes share."""

    def __init__(self, catalogue: Catalogue, serving: Serving, limits: Limits | None, metrics: Metrics) -> None:
        self.catalogue = catalogue
        self.engines = catalogue.engines
        self.metrics = metrics
        self.appointments = Appointments()
        self._timeout_s = serving.request_timeout_s
        self._created = int(time.time())
        self._limits = limits
        self._known: WeakKeyDictionary[Model, Answering] = WeakKeyDictionary()
        self._answers: asyncio.Task[None] | None = None

    def shown(self, name: str) -> dict[str, Any]:
        """A model as OpenAI's clients list it; an adapter's says what it is over."""
        body = {"id": name, "object": "model", "created": self._created, "owned_by": "apprentice"}
        return body if name in self.engines else body | {"parent": self.catalogue.default.name}

    def answering(self, model: Model) -> Answering:
        if model not in self._known:
            self._known[model] = Answering(model, timeout_s=self._timeout_s)
        return self._known[model]

    async def take(self, http: HttpRequest, name: str | None) -> Lease:
        """A lease of the model. Raises `RequestProblem` for one that is not served, or not to this key."""
        wanted = self.catalogue.default.name if name is None else name
        if not self.may_use(http, wanted):
            key = key_of(http.scope)
            message = f"key {key.name if key else ''!r} may not use the model {wanted!r}."
            raise RequestProblem(message, status=403, param="model", code="model_not_allowed")
        return await self.catalogue.take(wanted, lambda other: self.may_use(http, other))

    def may_use(self, http: HttpRequest, name: str) -> bool:
        key = key_of(http.scope)
        return key is None or key.may_use(name)

    async def answer(self, http: HttpRequest, asked: Asked) -> Response:
        began = time.perf_counter()
        key = key_of(http.scope)
        lease = await self.take(http, asked.model)
        model = lease.model

        def on_end(usage: Usage, first: float | None, status: int) -> None:
            lease.release()
            self.appointments.ended()
            self.metrics.ended(model.name, status, began, first, usage)
            if self._limits is not None and key is not None and key.tokens_per_minute is not None:
                self._limits.spend(key.name, key.tokens_per_minute, usage.prompt + usage.completion)

        try:
            answering = self.answering(model)
            requests = await beside_loop_if_large(http, answering.requests, asked)
            return await answering.answer(asked, requests, on_end)
        except BaseException as error:
            lease.release()
            if isinstance(error, Overloaded | RequestProblem):
                self.metrics.ended(model.name, 429 if isinstance(error, Overloaded) else error.status, began, None, None)
            raise

    async def has_answered(self) -> bool:
        """True once each engine has produced a token; the first call asks for one."""
        for engine in self.engines.values():
            engine.check()
        if self._answers is None:
            self._answers = asyncio.create_task(self._ask())
        if not self._answers.done():
            return False
        if self._answers.exception() is not None:
            self._answers = None
            return False
        return True

    async def _ask(self) -> None:
        for model in self.catalogue.fixed.values():
            (stream,) = model.engine.generate([Request((model.layout.tokenizer.end_id,), max_tokens=1)])
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
    async def models(http: HttpRequest) -> dict[str, Any]:
        names = [name for name in await door.catalogue.names() if door.may_use(http, name)]
        return {"object": "list", "data": [door.shown(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(http: HttpRequest, name: str) -> dict[str, Any]:
        if name not in await door.catalogue.names() or not door.may_use(http, name):
            with await door.take(http, name):  # which says why not
                pass
        return door.shown(name)


def _serve_ours(app: FastAPI, door: _Door, tasks: dict[str, Task]) -> None:
    def task_named(name: str) -> Task:
        if name not in tasks:
            message = f"task {name!r} is not known here.{did_you_mean(name, tasks)} GET /v1/tasks lists them."
            raise RequestProblem(message, status=404, param="task", code="task_not_found")
        return tasks[name]

    @app.post("/v1/instruct")
    async def instruct(http: HttpRequest, asked: InstructRequest) -> Response:
        return await door.answer(http, asked)

    @app.post("/v1/render", response_model=dict[str, Any])
    async def render(http: HttpRequest, asked: RenderRequest) -> Response:
        with await door.take(http, asked.model) as model:
            phrasing = door.answering(model).phrasing

            def shown() -> Response:
                if asked.task is not None:
                    return JSONResponse(rendered(task_named(asked.task), asked, model.layout))
                text, ids = phrasing.rendered(asked)
                return JSONResponse({"text": text, "token_ids": ids})

            return await beside_loop_if_large(http, shown)

    @app.get("/v1/contract")
    async def read_contract(http: HttpRequest, model: str | None = None) -> dict[str, Any]:
        with await door.take(http, model) as chosen:
            if chosen.contract is None:
                raise RequestProblem("this endpoint was started without a prompt contract of its own.", status=404)
            return chosen.contract.model_dump(mode="json")

    @app.get("/v1/tasks")
    async def list_tasks() -> dict[str, Any]:
        return {"object": "list", "data": [described(task) for task in tasks.values()]}

    @app.post("/v1/tasks/{name}")
    async def ask_task(http: HttpRequest, name: str, asked: TaskRequest) -> dict[str, Any]:
        with await door.take(http, asked.model) as model:
            return await answered(task_named(name), asked, model.layout, door.answering(model))


def _serve_state(app: FastAPI, door: _Door) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        for engine in door.engines.values():
            engine.check()
        default = door.catalogue.default
        return {"status": "ok", "model": default.name, "layout": default.layout.name, "context": default.engine.context}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        try:
            if await door.has_answered():
                return {"status": "ready"}
        except EngineFailed as failure:
            log.warning("not ready: %s", failure)
        raise RequestProblem("the engine has not answered yet.", status=503, kind="server_error", code="not_ready")

    @app.get("/stats")
    async def stats(http: HttpRequest, model: str | None = None) -> dict[str, Any]:
        with await door.take(http, model) as chosen:
            return chosen.engine.stats()._asdict()

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(door.metrics.text(), media_type="text/plain; version=0.0.4")
