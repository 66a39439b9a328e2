"""The ASGI application over a catalogue of models: middleware, routes, error handlers, and the engines' end.

Any ASGI server can run it, Ray Serve among them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI
from starlette.types import ASGIApp

from apprentice import __version__
from apprentice.recipe import Serving
from apprentice.serve.api.api_state import ApiState
from apprentice.serve.api.error_handlers import add_error_handlers
from apprentice.serve.api.limits.api_keys import ApiKeys
from apprentice.serve.api.limits.rate_limiter import RateLimits
from apprentice.serve.api.middleware import BODY_TIMEOUT_S, AccessMiddleware
from apprentice.serve.api.request_body import ValidatedRoute
from apprentice.serve.api.routes.health_routes import add_health_routes
from apprentice.serve.api.routes.instruction_routes import add_instruction_routes
from apprentice.serve.api.routes.openai_routes import add_openai_routes
from apprentice.serve.api.routes.pages import add_pages
from apprentice.serve.generation.served_models import Catalogue
from apprentice.tasks.schema import Task


def build_app(
    catalogue: Catalogue,
    *,
    serving: Serving | None = None,
    tasks: Sequence[Task] = (),
    keys: ApiKeys | None = None,
    limits: RateLimits | None = None,
    replica: str = "",
    behind_proxy: bool = False,
) -> ASGIApp:
    """The ASGI application that serves the models of `catalogue`; it closes their engines when it shuts down.

    `keys` None admits everybody; `limits` is the rate limiter of the keys. `replica` is the id that `/stats` shows. `behind_proxy`
    is true behind Ray Serve's proxy.
    """
    serving = serving or Serving()
    state = ApiState(catalogue, serving, limits, replica)
    return AccessMiddleware(
        _fastapi_app(state, tasks),
        keys=keys,
        limits=limits,
        max_body_bytes=serving.max_body_bytes,
        body_timeout_s=min(BODY_TIMEOUT_S, serving.request_timeout_s),
        behind_proxy=behind_proxy,
    )


def describe_api() -> dict[str, Any]:
    """The endpoint's OpenAPI description, made without loading a model."""
    # Routes use the catalogue only when they are called.
    catalogue = cast(Any, SimpleNamespace(engines={}))
    return _fastapi_app(ApiState(catalogue, Serving(), None, ""), ()).openapi()


def _fastapi_app(state: ApiState, tasks: Sequence[Task]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        sampling = asyncio.create_task(state.sample_metrics())
        yield
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
        for engine in state.engines.values():
            engine.close()

    app = FastAPI(title="apprentice", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.route_class = ValidatedRoute
    add_openai_routes(app, state)
    add_instruction_routes(app, state, {task.name: task for task in tasks})
    add_health_routes(app, state)
    add_pages(app)
    add_error_handlers(app, state.retry_schedule)
    return app
