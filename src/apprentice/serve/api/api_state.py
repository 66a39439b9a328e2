"""State that all routes share: served models, accounts, metrics, readiness."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

from fastapi.responses import Response
from starlette.requests import Request as HttpRequest

from apprentice.inference.generation_request import GenerationRequest
from apprentice.recipe import Serving
from apprentice.serve.api.error_status import status_of
from apprentice.serve.api.limits.accounts import Account
from apprentice.serve.api.limits.rate_limiter import RateLimits
from apprentice.serve.api.middleware import key_of, limit_state_of
from apprentice.serve.api.request_body import run_in_thread_if_large
from apprentice.serve.api.request_metrics import SAMPLE_S, RequestMetrics
from apprentice.serve.api.retry_after import RetrySchedule
from apprentice.serve.api.schemas.descriptions import ModelDescription
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.api.schemas.requests import GenerationFields
from apprentice.serve.api.schemas.responses import Usage
from apprentice.serve.engines.base import Overloaded
from apprentice.serve.generation.prompt_encoding import EncodedPrompt, PromptEncoder
from apprentice.serve.generation.replies.reply_formats import ReplyFormat
from apprentice.serve.generation.replies.reply_service import ReplyService
from apprentice.serve.generation.served_models import Catalogue, ModelLease, ServedModel

Body = TypeVar("Body", bound=GenerationFields)


class ApiState:
    """The models of `catalogue` and what is known of the requests to them; `replica` is the id that `/stats` shows."""

    def __init__(self, catalogue: Catalogue, serving: Serving, limits: RateLimits | None, replica: str) -> None:
        self.catalogue = catalogue
        self.engines = catalogue.engines
        self.metrics = RequestMetrics(catalogue.engines)
        self.replica = replica
        self.retry_schedule = RetrySchedule()
        self._timeout_s = serving.request_timeout_s
        self._created = int(time.time())
        self._limits = limits
        self._services: WeakKeyDictionary[ServedModel, ReplyService] = WeakKeyDictionary()
        self._probe: asyncio.Task[None] | None = None

    async def sample_metrics(self) -> None:
        """Updates the engines' metrics every `SAMPLE_S` seconds until it is cancelled."""
        while True:
            self.metrics.sample()
            await asyncio.sleep(SAMPLE_S)

    def describe_model(self, name: str) -> ModelDescription:
        """A model as `/v1/models` lists it; an adapter has its base as `parent`."""
        parent = {} if name in self.engines else {"parent": self.catalogue.default.name}
        return ModelDescription(id=name, object="model", created=self._created, owned_by="apprentice", **parent)

    def service(self, model: ServedModel) -> ReplyService:
        """The reply service of the model, made at its first request."""
        if model not in self._services:
            self._services[model] = ReplyService(model)
        return self._services[model]

    async def lease(self, http: HttpRequest, name: str | None) -> ModelLease:
        """A lease of the model. Raises `RequestProblem` for one that is not served, or that this key may not use."""
        name = self.catalogue.default.name if name is None else name
        if not self.may_use(http, name):
            key = key_of(http.scope)
            message = f"key {key.name if key else ''!r} may not use the model {name!r}."
            raise RequestProblem(message, status=403, param="model", code="model_not_allowed")
        return await self.catalogue.take(name, lambda other: self.may_use(http, other))

    def may_use(self, http: HttpRequest, name: str) -> bool:
        """Whether the request's key admits requests for the model."""
        key = key_of(http.scope)
        return key is None or key.may_use(name)

    @asynccontextmanager
    async def account(self, http: HttpRequest, name: str | None) -> AsyncGenerator[tuple[ServedModel, Account], None]:
        """The model and an account for one request, for a `with` block.

        An exception closes the account; without one, the block must close it.
        """
        began_at = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            lease = await self._lease_by(deadline, http, name)
        except (Overloaded, RequestProblem) as error:
            if status_of(error) not in (403, 404):  # otherwise made-up names would become series of the metrics
                self.metrics.record_end(name or self.catalogue.default.name, status_of(error), began_at, None, None)
            raise
        model = lease.model

        def on_close(usage: Usage | None, first_token_at: float | None, status: int) -> None:
            lease.release()
            if usage is not None:
                self.retry_schedule.record_end()
            self.metrics.record_end(model.name, status, began_at, first_token_at, usage)

        account = Account(deadline, self._limits, key_of(http.scope), on_close, limit_state_of(http.scope))
        try:
            yield model, account
        except BaseException as error:
            account.close(None, None, status_of(error))
            raise

    async def _lease_by(self, deadline: float, http: HttpRequest, name: str | None) -> ModelLease:
        try:
            async with asyncio.timeout_at(deadline):
                return await self.lease(http, name)
        except TimeoutError as error:
            message = f"the model {name!r} had no place in memory in the time that this endpoint gives a request; try again."
            raise RequestProblem(message, status=504, kind="server_error", code="request_timeout") from error

    async def respond(
        self,
        http: HttpRequest,
        body: Body,
        encode: Callable[[PromptEncoder, Body], list[EncodedPrompt]],
        format_type: type[ReplyFormat],
    ) -> Response:
        """Response of a generation endpoint, which says how its body becomes prompts and what shape its replies have."""
        async with self.account(http, body.model) as (model, account):
            service = self.service(model)
            prompts = await run_in_thread_if_large(http, encode, service.encoder, body)
            return await service.respond(body, prompts, format_type, account)

    async def is_ready(self) -> bool:
        """True once each engine has produced a token; the first call starts a request for one. Raises `EngineFailed`."""
        for engine in self.engines.values():
            engine.check()
        if self._probe is None:
            self._probe = asyncio.create_task(self._generate_a_token())
        if not self._probe.done():
            return False
        if self._probe.exception() is not None:
            self._probe = None
            return False
        return True

    async def _generate_a_token(self) -> None:
        for model in self.catalogue.fixed.values():
            (tokens,) = model.engine.generate([GenerationRequest((model.layout.tokenizer.end_id,), max_new_tokens=1)])
            try:
                await anext(tokens)
            finally:
                tokens.close()
