"""HTTP routes over a catalogue of models: OpenAI's, our own (instruct, render, tasks), health and stats, and the browser pages.

The result is a plain ASGI application: any ASGI server can run it, Ray Serve among them.
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
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from apprentice import __version__
from apprentice.errors import did_you_mean
from apprentice.recipe import Serving
from apprentice.serve.api.accounts import Account, Limits
from apprentice.serve.api.body import CheckedRoute, beside_loop_if_large
from apprentice.serve.api.errors import answer_errors
from apprentice.serve.api.keys import Keys
from apprentice.serve.api.metrics import SAMPLE_S, Metrics
from apprentice.serve.api.middleware import BODY_TIMEOUT_S, Gate, key_of, standing_of
from apprentice.serve.api.outcomes import status_of
from apprentice.serve.api.pages import serve_pages
from apprentice.serve.api.retry_after import Appointments
from apprentice.serve.api.schemas import (
    Asked,
    ChatRequest,
    CompletionRequest,
    InstructRequest,
    RenderRequest,
    RequestProblem,
    TaskRequest,
    Usage,
)
from apprentice.serve.api.tasks import answered, described, rendered
from apprentice.serve.engines.base import EngineFailed, Overloaded, Request
from apprentice.serve.generation.served_models import Catalogue, Lease, Model
from apprentice.serve.generation.service import Answering
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
    """The ASGI application that serves the models of `catalogue`; it closes their engines when it shuts down.

    `keys` None admits everybody; `limits` is the rate limiter of the keys. `replica` is the id that `/stats` shows. `behind_proxy`
    is true behind Ray Serve's proxy.
    """
    serving = serving or Serving()
    door = _Door(catalogue, serving, limits, replica)
    return Gate(
        _routes(door, tasks),
        keys=keys,
        limits=limits,
        max_body_bytes=serving.max_body_bytes,
        body_timeout_s=min(BODY_TIMEOUT_S, serving.request_timeout_s),
        behind_proxy=behind_proxy,
    )


def describe_api() -> dict[str, Any]:
    """The endpoint's OpenAPI description, made without loading a model."""
    # Routes use the catalogue only when they are called.
    nothing = cast(Any, SimpleNamespace(engines={}))
    return _routes(_Door(nothing, Serving(), None, ""), ()).openapi()


def _routes(door: _Door, tasks: Sequence[Task]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        sampling = asyncio.create_task(door.sample())
        yield
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
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
    """State that all routes share: models, accounts, metrics, readiness."""

    def __init__(self, catalogue: Catalogue, serving: Serving, limits: Limits | None, replica: str) -> None:
        self.catalogue = catalogue
        self.engines = catalogue.engines
        self.metrics = Metrics(catalogue.engines)
        self.replica = replica
        self.appointments = Appointments()
        self._timeout_s = serving.request_timeout_s
        self._created = int(time.time())
        self._limits = limits
        self._known: WeakKeyDictionary[Model, Answering] = WeakKeyDictionary()
        self._answers: asyncio.Task[None] | None = None

    async def sample(self) -> None:
        """Updates the engines' metrics every `SAMPLE_S` seconds until it is cancelled."""
        while True:
            self.metrics.sample()
            await asyncio.sleep(SAMPLE_S)

    def shown(self, name: str) -> dict[str, Any]:
        """A model as `/v1/models` lists it; an adapter has its base as `parent`."""
        body = {"id": name, "object": "model", "created": self._created, "owned_by": "apprentice"}
        return body if name in self.engines else body | {"parent": self.catalogue.default.name}

    def answering(self, model: Model) -> Answering:
        if model not in self._known:
            self._known[model] = Answering(model)
        return self._known[model]

    async def take(self, http: HttpRequest, name: str | None) -> Lease:
        """A lease of the model. Raises `RequestProblem` for one that is not served, or that this key may not use."""
        wanted = self.catalogue.default.name if name is None else name
        if not self.may_use(http, wanted):
            key = key_of(http.scope)
            message = f"key {key.name if key else ''!r} may not use the model {wanted!r}."
            raise RequestProblem(message, status=403, param="model", code="model_not_allowed")
        return await self.catalogue.take(wanted, lambda other: self.may_use(http, other))

    def may_use(self, http: HttpRequest, name: str) -> bool:
        key = key_of(http.scope)
        return key is None or key.may_use(name)

    @asynccontextmanager
    async def accounted(self, http: HttpRequest, name: str | None) -> AsyncGenerator[tuple[Model, Account], None]:
        """The model and an account for one request, for a `with` block.

        An exception closes the account; without one, the block must close it.
        """
        began = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            lease = await self._taken_by(deadline, http, name)
        except (Overloaded, RequestProblem) as error:
            if status_of(error) not in (403, 404):  # otherwise made-up names would become series of the metrics
                self.metrics.ended(name or self.catalogue.default.name, status_of(error), began, None, None)
            raise
        model = lease.model

        def on_close(usage: Usage | None, first: float | None, status: int) -> None:
            lease.release()
            if usage is not None:
                self.appointments.ended()
            self.metrics.ended(model.name, status, began, first, usage)

        account = Account(deadline, self._limits, key_of(http.scope), on_close, standing_of(http.scope))
        try:
            yield model, account
        except BaseException as error:
            account.close(None, None, status_of(error))
            raise

    async def _taken_by(self, deadline: float, http: HttpRequest, name: str | None) -> Lease:
        try:
            async with asyncio.timeout_at(deadline):
                return await self.take(http, name)
        except TimeoutError as error:
            message = f"the model {name!r} had no place in memory in the time that this endpoint gives a request; try again."
            raise RequestProblem(message, status=504, kind="server_error", code="request_timeout") from error

    async def answer(self, http: HttpRequest, asked: Asked) -> Response:
        async with self.accounted(http, asked.model) as (model, account):
            answering = self.answering(model)
            requests = await beside_loop_if_large(http, answering.requests, asked)
            return await answering.answer(asked, requests, account)

    async def has_answered(self) -> bool:
        """True once each engine has produced a token; the first call starts a request for one."""
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
            with await door.take(http, name):  # raises with the reason
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
        async with door.accounted(http, asked.model) as (model, account):
            return await answered(task_named(name), asked, model.layout, door.answering(model), account)


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
            return {"replica": door.replica, **chosen.engine.stats()._asdict()}
