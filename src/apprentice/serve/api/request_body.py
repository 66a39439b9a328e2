"""Reading of JSON request bodies: any fault becomes one clear refusal, and large bodies are parsed in a thread."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request

P = ParamSpec("P")
T = TypeVar("T")
_MAX_DEPTH = 64  # arrays and objects inside each other
_LARGE_BYTES = 32_768  # a larger body takes longer to parse than a thread takes to start


async def run_in_thread_if_large(http: Request, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Result of `work(*args, **kwargs)`, run in a thread where the body of `http` is large.

    On the event loop such work would freeze all streams.
    """
    if len(await http.body()) > _LARGE_BYTES:
        return await asyncio.to_thread(work, *args, **kwargs)
    return work(*args, **kwargs)


class _ValidatedRequest(Request):
    """A request whose JSON is parsed and validated against the route's body `field`, by `_read`."""

    field: Any = None

    async def json(self) -> Any:
        if not hasattr(self, "_validated"):
            self._validated = await run_in_thread_if_large(self, _read, await self.body(), self.field)
        return self._validated


class ValidatedRoute(APIRoute):
    """A route whose body is parsed and validated by this module, not by FastAPI."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler that FastAPI calls, with our reading of the body around it."""
        handle = super().get_route_handler()

        async def handle_validated(request: Request) -> Response:
            http = _ValidatedRequest(request.scope, request.receive)
            http.field = self.body_field
            try:
                return await handle(http)
            except HTTPException as error:
                # FastAPI wraps any error while a body is read in an HTTPException about JSON.
                if isinstance(error.__cause__, RequestValidationError):
                    raise error.__cause__ from None
                raise

        return handle_validated


def _read(body: bytes, field: Any) -> Any:
    """The body as the route's request model, which FastAPI takes as it is.

    Raises `RequestValidationError` or `HTTPException`.
    """
    values = _parse(body)
    request, errors = field.validate(values, {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return request


def _parse(body: bytes) -> Any:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise HTTPException(400, "the body is not UTF-8") from error
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise HTTPException(400, f"the body is nested deeper than {_MAX_DEPTH}") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits, or NaN
        raise HTTPException(400, f"the body is not JSON that can be read: {error}") from error
    if _depth(values) > _MAX_DEPTH:
        raise HTTPException(400, f"the body is nested deeper than {_MAX_DEPTH}")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _depth(value: Any) -> int:
    """Levels of nested arrays and objects, counted without recursion."""
    deepest = 0
    unvisited = [(value, 1)]
    while unvisited:
        inner, level = unvisited.pop()
        if isinstance(inner, dict | list):
            deepest = max(deepest, level)
            unvisited += [
                (item, level + 1)
                for item in (inner.values() if isinstance(inner, dict) else inner)
                if isinstance(item, dict | list)
            ]
    return deepest
