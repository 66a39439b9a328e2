"""The HTTP routes over one engine: OpenAI's, our own `/v1/instruct`, health, gauges, and the page at `/`.

A plain FastAPI application: any ASGI server runs it, Ray Serve among them. Knows nothing of replicas or models.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from apprentice.data.layout import Layout
from apprentice.errors import did_you_mean
from apprentice.serve.engine import Engine, EngineFailed, Overloaded, Request
from apprentice.serve.phrasing import Phrasing
from apprentice.serve.protocol import (
    LAST_EVENT,
    Asked,
    ChatRequest,
    CompletionRequest,
    InstructRequest,
    Replies,
    RequestProblem,
    Usage,
    event,
    explain,
)
from apprentice.serve.text import TextStream

_PAGE = Path(__file__).parent / "playground"
_ASSETS = {"index.html": "text/html", "style.css": "text/css", "app.js": "text/javascript"}
# The page needs nothing from elsewhere, and must not be made to load it.
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src 'self' data:", "Cache-Control": "no-cache"}
_BODIES: dict[str, type[Asked]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/instruct": InstructRequest,
}


def build_app(engine: Engine, layout: Layout, model_name: str) -> FastAPI:
    """The application that serves `engine` as `model_name`, phrasing prompts in `layout`; it closes the engine when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        engine.close()

    app = FastAPI(title="apprentice", docs_url=None, redoc_url=None, lifespan=lifespan)
    phrasing = Phrasing(layout, engine.context)
    model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "apprentice"}

    async def answer(asked: Asked, request: Callable[[], Request], *, chat: bool) -> Response:
        if asked.model not in (None, model_name):
            raise _unknown_model(str(asked.model), model_name)
        reply = _Reply(engine, layout, request(), asked.stops)
        replies = Replies(model_name, chat=chat)
        if asked.stream:
            return await _streamed(reply, replies, usage=asked.stream_options.include_usage)
        async with aclosing(reply.pieces()) as pieces:
            text = "".join([piece async for piece in pieces])
        ids = reply.ids if asked.return_token_ids else None
        return JSONResponse(replies.whole(text, reply.finish, reply.usage, ids))

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest) -> Response:
        return await answer(asked, lambda: phrasing.completion(asked), chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest) -> Response:
        return await answer(asked, lambda: phrasing.chat(asked), chat=True)

    @app.post("/v1/instruct")
    async def instruct(asked: InstructRequest) -> Response:
        return await answer(asked, lambda: phrasing.instruct(asked), chat=False)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model_name:
            raise _unknown_model(name, model_name)
        return model

    @app.get("/health")
    async def health() -> dict[str, Any]:
        engine.check()
        return {"status": "ok", "model": model_name, "layout": layout.name, "context": engine.context}

    @app.get("/stats")
    async def stats() -> dict[str, int]:
        return engine.stats()._asdict()

    _serve_page(app)
    _answer_errors(app)
    return app


@dataclass
class _Reply:
    """One reply on its way from the engine to text; `finish` and `usage` are known once the pieces have ended."""

    engine: Engine
    layout: Layout
    request: Request
    stops: list[str]
    finish: str = "length"
    ids: list[int] = field(default_factory=list)  # all that were produced, the end token included

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt), len(self.ids))

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it becomes certain; a piece for every token, often empty. Closing it frees the engine's place."""
        text = TextStream(self.layout.tokenizer.decode, self.stops)
        async with aclosing(self.engine.generate(self.request)) as tokens:
            async for token in tokens:
                self.ids.append(token.id)
                yield "" if token.finish == "stop" else text.add(token.id)
                if text.stopped or token.finish:
                    self.finish = "stop" if text.stopped else str(token.finish)
                    break
        yield text.end()


async def _streamed(reply: _Reply, replies: Replies, *, usage: bool) -> Response:
    pieces = reply.pieces()
    try:
        opening = await anext(pieces)  # an engine that refuses does so here, while the status can still say it
    except BaseException:
        await pieces.aclose()
        raise
    empty = {"usage": None} if usage else {}

    async def events() -> AsyncGenerator[str, None]:
        try:
            yield event(replies.chunk(opening, None, first=True) | empty)
            async for piece in pieces:
                if piece:
                    yield event(replies.chunk(piece, None) | empty)
            yield event(replies.chunk("", reply.finish) | empty)
            if usage:
                yield event(replies.usage_chunk(reply.usage))
        except EngineFailed as failure:
            yield event(_failed(failure).body)
        finally:
            await pieces.aclose()
        yield LAST_EVENT

    return _EventStream(events(), pieces)


class _EventStream(StreamingResponse):
    """Server-sent events that close their source whatever happens to the client, even before the first event is out."""

    def __init__(self, events: AsyncGenerator[str, None], source: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._closing = (events, source)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generator in self._closing:
                await generator.aclose()


def _unknown_model(name: str, served: str) -> RequestProblem:
    near = did_you_mean(name, [served])
    message = f"model {name!r} is not served here.{near} This endpoint serves {served!r}."
    return RequestProblem(message, status=404, param="model", code="model_not_found")


def _failed(failure: EngineFailed) -> RequestProblem:
    return RequestProblem(f"the engine has stopped: {failure}.", status=503, kind="server_error", code="engine_failed")


def _serve_page(app: FastAPI) -> None:
    def route(path: str, file: str) -> None:
        @app.get(path, include_in_schema=False)
        async def asset() -> FileResponse:
            return FileResponse(_PAGE / file, media_type=_ASSETS[file], headers=_PAGE_HEADERS)

    route("/", "index.html")
    for file in _ASSETS:
        route(f"/playground/{file}", file)


def _answer_errors(app: FastAPI) -> None:
    """Every error in the shape that OpenAI's clients read."""

    def respond(problem: RequestProblem) -> JSONResponse:
        return JSONResponse(problem.body, status_code=problem.status)

    @app.exception_handler(RequestProblem)
    async def on_problem(_: HttpRequest, problem: RequestProblem) -> Response:
        return respond(problem)

    @app.exception_handler(RequestValidationError)
    async def on_validation(request: HttpRequest, error: RequestValidationError) -> Response:
        known = list(_BODIES[request.url.path].model_fields) if request.url.path in _BODIES else []
        return respond(explain(error.errors(), known))

    @app.exception_handler(Overloaded)
    async def on_overload(_: HttpRequest, __: Overloaded) -> Response:
        message = "too many requests are waiting; try again in a moment."
        response = respond(RequestProblem(message, status=429, kind="rate_limit_error", code="overloaded"))
        response.headers["Retry-After"] = "1"
        return response

    @app.exception_handler(EngineFailed)
    async def on_failure(_: HttpRequest, failure: EngineFailed) -> Response:
        return respond(_failed(failure))

    @app.exception_handler(HTTPException)
    async def on_http(request: HttpRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}."
        return respond(RequestProblem(message, status=error.status_code, code="unknown_url" if error.status_code == 404 else None))

    @app.exception_handler(Exception)
    async def on_bug(_: HttpRequest, error: Exception) -> Response:
        return respond(RequestProblem(f"{type(error).__name__}: {error}", status=500, kind="server_error"))
