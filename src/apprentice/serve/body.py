"""Reading a request's JSON: whatever is wrong with it becomes one clear refusal. Knows nothing of what the fields mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request

_DEEPEST = 64  # arrays and objects inside each other


class _Checked(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = _parsed(await self.body())
        return self._json


class CheckedRoute(APIRoute):
    """A route whose body is read here."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            return await handle(_Checked(request.scope, request.receive))

        return checked


def _parsed(body: bytes) -> Any:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise HTTPException(400, "the body is not UTF-8") from error
    try:
        values = json.loads(text, parse_constant=_no_number)
    except RecursionError as error:
        raise HTTPException(400, f"the body is nested deeper than {_DEEPEST}") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits, NaN
        raise HTTPException(400, f"the body is not JSON that can be read: {error}") from error
    if _depth(values) > _DEEPEST:
        raise HTTPException(400, f"the body is nested deeper than {_DEEPEST}")
    return values


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _depth(value: Any) -> int:
    """Levels of arrays and objects, counted without recursion."""
    deepest = 0
    left = [(value, 1)]
    while left:
        inner, level = left.pop()
        if isinstance(inner, dict | list):
            deepest = max(deepest, level)
            left += [
                (item, level + 1)
                for item in (inner.values() if isinstance(inner, dict) else inner)
                if isinstance(item, dict | list)
            ]
    return deepest
