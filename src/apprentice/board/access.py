"""BoardAccess: ASGI middleware that decides who may ask the board for what.

A browser sends requests to a loopback address for any page that it shows. Three things keep other pages out: the Host must be one
that the board listens on (DNS rebinding), a request that changes something must come from the board's own origin (cross-site
requests), and the session's cookie is not sent for other sites (SameSite).
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "apprentice_board"
SESSION_PATH = "/api/session"
_READING = ("GET", "HEAD", "OPTIONS")


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_every_address(host: str) -> bool:
    """Whether a server that listens on `host` is reached by all of the machine's addresses."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def host_of(authority: str) -> str:
    """`localhost` of `localhost:8700`, `[::1]` of `[::1]:8700`, in lower case."""
    name, _, port = authority.lower().rpartition(":")
    return name if name and port.isdecimal() else authority.lower()


class BoardAccess:
    """Middleware around `app`. `key` None admits everybody who passes the checks of Host and Origin.

    `hosts` are further names that the board is reached by; `any_host` does without the check of Host, for a board with a key on
    all addresses of a machine. With `read_only`, every request that could change something gets status 403.
    """

    def __init__(
        self, app: ASGIApp, *, key: str | None, hosts: Sequence[str] = (), any_host: bool = False, read_only: bool = False
    ) -> None:
        self._app = app
        self._key = key
        self._hosts = {host.lower() for host in hosts}
        self._any_host = any_host
        self._read_only = read_only
        self._session = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        refusal = self._refusal(Headers(scope=scope), scope["method"], scope["path"])
        if refusal is not None:
            status, code, message = refusal
            await JSONResponse({"error": {"code": code, "message": message}}, status)(scope, receive, send)
        elif scope["path"] == SESSION_PATH and scope["method"] == "POST":
            await (await self._open_session(Request(scope, receive)))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, method: str, path: str) -> tuple[int, str, str] | None:
        """Status, code and message of a request that is not answered; None for one that is."""
        authority = headers.get("host", "")
        host = host_of(authority)
        if not (self._any_host or is_loopback(host) or host in self._hosts):
            return (
                421,
                "unknown_host",
                f"the board is not reached by the name {host[:100]!r}; open it at the address that it printed.",
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{authority.lower()}", f"https://{authority.lower()}"):
            return 403, "cross_site", "this request comes from another site's page, and the board answers its own pages alone."
        if method not in _READING and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "cross_site", "this request comes from another site's page, and the board answers its own pages alone."
        is_asking_for_session = path == SESSION_PATH and method == "POST"
        if path.startswith("/api/") and not is_asking_for_session and not self._is_admitted(headers):
            return 401, "key_required", "the board asks for its key; send `Authorization: Bearer KEY`, or enter it on the page."
        if self._read_only and method not in _READING and not is_asking_for_session:
            return 403, "read_only", "this board was started with --read-only, so it changes nothing."
        return None

    def _is_admitted(self, headers: Headers) -> bool:
        if self._key is None:
            return True
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _equal(secret.strip(), self._key):
            return True
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        return _equal(cookies.get(COOKIE, ""), self._session)

    async def _open_session(self, request: Request) -> JSONResponse:
        """Answers a POST whose Authorization has the key with a cookie that event streams and embedded reports are asked with."""
        if not self._is_admitted(request.headers):
            return JSONResponse({"error": {"code": "key_required", "message": "this is not the board's key."}}, 401)
        response = JSONResponse({"read_only": self._read_only})
        if self._key is not None:
            response.set_cookie(COOKIE, self._session, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return response


def _equal(secret: str, expected: str) -> bool:
    return hmac.compare_digest(secret.encode(), expected.encode())
