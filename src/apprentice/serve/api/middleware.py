"""ASGI middleware around all routes: request ids, a limit on bodies, API keys, and one log line for each request.

Prompts are never logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apprentice.errors import ServingError
from apprentice.serve.api.error_status import CLIENT_CLOSED, problem_of
from apprentice.serve.api.limits.accounts import RateLimitState, rate_limit_problem
from apprentice.serve.api.limits.api_keys import ApiKey, ApiKeys
from apprentice.serve.api.limits.rate_limiter import RateLimits
from apprentice.serve.api.schemas.problems import RequestProblem

log = logging.getLogger("apprentice.requests")
OPEN_PATHS = ("/", "/health", "/ready", "/docs", "/openapi.json")  # paths that need no key, besides the playground's files
_KEY, _LIMIT_STATE = "apprentice.key", "apprentice.limit_state"
BODY_TIMEOUT_S = 30.0  # seconds within which a body must have arrived


class AccessMiddleware:
    """ASGI middleware around `app`; without `keys` it admits everybody.

    A body must arrive within `body_timeout_s` seconds (else status 408) and have at most `max_body_bytes` bytes (else 413).
    `behind_proxy` leaves the header X-Request-Id to Ray Serve's proxy, which would join a second one to its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys | None,
        limits: RateLimits | None,
        max_body_bytes: int,
        body_timeout_s: float = BODY_TIMEOUT_S,
        behind_proxy: bool = False,
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._behind_proxy = behind_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_at = time.perf_counter()
        headers = Headers(scope=scope)
        client_id = headers.get("x-request-id", "")
        request_id = client_id if client_id.isascii() and client_id.isprintable() and 0 < len(client_id) <= 64 else uuid.uuid4().hex
        status = CLIENT_CLOSED  # until a response begins

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                response_headers = MutableHeaders(scope=message)
                if not self._behind_proxy:
                    response_headers["X-Request-Id"] = request_id
                if limit_state := limit_state_of(scope):
                    response_headers.update(limit_state.headers())
            await send(message)

        try:
            if refusal := await self._refusal(scope, headers):
                await refusal(scope, receive, send_on)
            else:
                await self._app(scope, self._limited(receive), send_on)
        finally:
            key: ApiKey | None = scope.get(_KEY)
            line = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.perf_counter() - began_at, 4),
                "key": key.name if key else None,
            }
            log.info(json.dumps(line))

    async def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        try:
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length[:20]) > self._max_body_bytes:
                raise RequestProblem(f"{self._too_large}.", status=413, code="body_too_large")
            await self._check_key(scope, headers)
        except Exception as error:
            return respond(problem_of(error))
        return None

    async def _check_key(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # Serve may mount the application under a prefix
        if self._keys is None or path in OPEN_PATHS or path.startswith("/playground/"):
            return
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        key = self._owner(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            message = "no valid API key was given; send the header `Authorization: Bearer KEY`."
            raise RequestProblem(message, status=401, code="invalid_api_key")
        scope[_KEY] = key
        if self._limits is None or not key.is_limited or scope["method"] != "POST":
            return
        status = await self._limits.admit(key.name, key.requests_per_minute, key.tokens_per_minute)
        scope[_LIMIT_STATE] = RateLimitState(key, status)
        if status.wait_s > 0:
            raise rate_limit_problem(key, status.wait_s)

    def _owner(self, secret: str) -> ApiKey | None:
        assert self._keys is not None
        try:
            return self._keys.owner(secret)
        except ServingError as error:
            message = "the endpoint cannot read its API keys any more, so it lets nobody in; its log says why."
            raise RequestProblem(message, status=503, kind="server_error", code="keys_unreadable") from error

    def _limited(self, receive: Receive) -> Receive:
        """Wraps `receive`: raises for a body that is too long, whatever its Content-Length, or that does not arrive in time."""
        received_bytes = 0
        # None once the body is complete: a later call waits for the client to leave.
        deadline: float | None = asyncio.get_running_loop().time() + self._body_timeout_s

        async def receive_limited() -> Message:
            nonlocal received_bytes, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"the body did not arrive within {self._body_timeout_s:g} s") from error
            if not message.get("more_body"):
                deadline = None
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large)  # the only exception that FastAPI passes on from reading a body
            return message

        return receive_limited

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self._max_body_bytes} bytes, the most that is read here"


def key_of(scope: Scope) -> ApiKey | None:
    """API key of the request; None where everybody is admitted."""
    key: ApiKey | None = scope.get(_KEY)
    return key


def limit_state_of(scope: Scope) -> RateLimitState | None:
    """State of the limits of the request's key; None where it has no limits."""
    state: RateLimitState | None = scope.get(_LIMIT_STATE)
    return state


def respond(problem: RequestProblem) -> JSONResponse:
    """The HTTP response for `problem`."""
    headers = {} if problem.retry_after_s is None else {"Retry-After": str(problem.retry_after_s)}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"  # RFC 9110 asks for it, and some clients send no key before they read it
    return JSONResponse(problem.body.to_dict(), status_code=problem.status, headers=headers)
