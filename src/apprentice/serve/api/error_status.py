"""HTTP status that is counted for an error, and the error that the client reads."""

from __future__ import annotations

import asyncio
import logging

from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.engines.base import EngineFailed, Overloaded

log = logging.getLogger(__name__)
CLIENT_CLOSED = 499  # the client disconnected before the end


def status_of(error: BaseException) -> int:
    """HTTP status for a request that `error` ended; 499 where its client has disconnected."""
    if isinstance(error, RequestProblem):
        return error.status
    if isinstance(error, Overloaded):
        return 429
    if isinstance(error, EngineFailed):
        return 503
    return CLIENT_CLOSED if isinstance(error, asyncio.CancelledError) else 500


def problem_of(error: Exception) -> RequestProblem:
    """The error that the client reads; an unexpected one is logged, and the client reads only its type."""
    if isinstance(error, RequestProblem):
        return error
    if isinstance(error, EngineFailed):
        return RequestProblem(f"the engine has stopped: {error}.", status=503, kind="server_error", code="engine_failed")
    log.error("a request failed by a fault of ours", exc_info=error)
    message = f"{type(error).__name__}: this is a fault of the endpoint; its log says more."
    return RequestProblem(message, status=500, kind="server_error")
