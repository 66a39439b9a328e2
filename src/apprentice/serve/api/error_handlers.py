"""Exception handlers that turn every error of the endpoint into OpenAI's error body."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from apprentice.serve.api.error_status import problem_of
from apprentice.serve.api.middleware import respond
from apprentice.serve.api.retry_after import RetrySchedule
from apprentice.serve.api.schemas.problems import RequestProblem, problem_of_fields
from apprentice.serve.api.schemas.requests import ChatRequest, CompletionRequest, InstructRequest, RenderRequest, TaskRequest
from apprentice.serve.engines.base import EngineFailed, Overloaded

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/instruct": InstructRequest,
    "/v1/render": RenderRequest,
}


def add_error_handlers(app: FastAPI, retry_schedule: RetrySchedule) -> None:
    """Adds the handlers to `app`; a request refused because the queue is full gets a `Retry-After` from `retry_schedule`."""

    @app.exception_handler(RequestProblem)
    async def on_problem(_: HttpRequest, problem: RequestProblem) -> Response:
        return respond(problem)

    @app.exception_handler(RequestValidationError)
    async def on_validation(request: HttpRequest, error: RequestValidationError) -> Response:
        body = _BODIES.get(request.scope["path"].removeprefix(request.scope.get("root_path", "")), TaskRequest)
        return respond(problem_of_fields(error.errors(), list(body.model_fields)))

    @app.exception_handler(Overloaded)
    async def on_overload(_: HttpRequest, __: Overloaded) -> Response:
        seconds = retry_schedule.next_s()
        message = f"too many requests are waiting; try again in {seconds} s."
        return respond(RequestProblem(message, status=429, kind="rate_limit_error", code="overloaded", retry_after_s=seconds))

    @app.exception_handler(EngineFailed)
    async def on_failure(_: HttpRequest, failure: EngineFailed) -> Response:
        return respond(problem_of(failure))

    @app.exception_handler(HTTPException)
    async def on_http(request: HttpRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}."
        code = "unknown_url" if error.status_code == 404 else None
        response: JSONResponse = respond(RequestProblem(message, status=error.status_code, code=code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_bug(_: HttpRequest, error: Exception) -> Response:
        return respond(problem_of(error))
