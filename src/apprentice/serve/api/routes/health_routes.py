"""Routes for machines: liveness, readiness, and the engine's gauges and counters."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest

from apprentice.serve.api.api_state import ApiState
from apprentice.serve.api.schemas.descriptions import Health, Readiness
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.engines.base import EngineFailed

log = logging.getLogger(__name__)


def add_health_routes(app: FastAPI, state: ApiState) -> None:
    """Adds `/health`, `/ready` and `/stats` to `app`."""

    @app.get("/health")
    async def health() -> Health:
        for engine in state.engines.values():
            engine.check()
        default = state.catalogue.default
        return Health(status="ok", model=default.name, layout=default.layout.name, context=default.engine.context)

    @app.get("/ready")
    async def ready() -> Readiness:
        try:
            if await state.is_ready():
                return Readiness(status="ready")
        except EngineFailed as failure:
            log.warning("not ready: %s", failure)
        raise RequestProblem("the engine has not answered yet.", status=503, kind="server_error", code="not_ready")

    @app.get("/stats")
    async def stats(http: HttpRequest, model: str | None = None) -> dict[str, Any]:
        with await state.lease(http, model) as leased:
            return {"replica": state.replica, **leased.engine.stats()._asdict()}
