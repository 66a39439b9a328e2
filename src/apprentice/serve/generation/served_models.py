"""Catalogue of the models that one endpoint serves: each has a name, an engine, a prompt format and perhaps an adapter.

A request takes a lease of a model and releases it at its end, so that an adapter in use stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import did_you_mean
from apprentice.inference.generation_request import GenerationRequest
from apprentice.run.contract import PromptContract
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.engines.base import Engine, TokenStream


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A served model; `adapter` is what its engine expects as `GenerationRequest.adapter`."""

    name: str
    engine: Engine
    layout: Layout
    contract: PromptContract | None = None
    adapter: Any = None

    def generate(self, requests: Sequence[GenerationRequest]) -> list[TokenStream]:
        """Passes the requests to the engine, with this model's adapter. The caller must close each stream.

        Raises `RequestProblem` for more than the engine ever takes, `Overloaded` for more than it takes now, `EngineFailed`.
        """
        if len(requests) > self.engine.capacity:
            raise RequestProblem(
                f"the request asks for {len(requests)} replies, and at most {self.engine.capacity} run and wait here;"
                " ask for fewer."
            )
        if self.adapter is not None:
            requests = [replace(request, adapter=self.adapter) for request in requests]
        return list(self.engine.generate(list(requests)))


class ModelLease:
    """The right of one request to use a model; as a context manager it gives the model. `release` may be called again."""

    def __init__(self, model: ServedModel, on_release: Callable[[], None] | None = None) -> None:
        self.model = model
        self._on_release = on_release

    def release(self) -> None:
        """Gives the model back."""
        if self._on_release is not None:
            self._on_release()
        self._on_release = None

    def __enter__(self) -> ServedModel:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.release()


class DynamicModels(Protocol):
    """Protocol of a set of models that come and go; `adapters.AdapterCache` is one."""

    async def names(self) -> list[str]:
        """Names of all that are available now."""

    async def take(self, name: str) -> ModelLease | None:
        """A lease of the model, loaded if need be; None if there is none of that name.

        Raises `RequestProblem` or `Overloaded`.
        """


class Catalogue:
    """Permanent `models`, the first of which answers requests that name none, and those of `dynamic`, which come and go."""

    def __init__(self, models: Sequence[ServedModel], dynamic: DynamicModels | None = None) -> None:
        self.default = models[0]
        self.fixed = {model.name: model for model in models}
        self._dynamic = dynamic

    @property
    def engines(self) -> dict[str, Engine]:
        """Engines by the names of their models."""
        return {name: model.engine for name, model in self.fixed.items()}

    async def names(self) -> list[str]:
        """Names of all models, the permanent ones first."""
        dynamic = await self._dynamic.names() if self._dynamic is not None else []
        return [*self.fixed, *(name for name in dynamic if name not in self.fixed)]

    async def take(self, name: str | None, is_allowed: Callable[[str], bool] = lambda name: True) -> ModelLease:
        """A lease of the model `name` (None: the default). Error messages name only models that `is_allowed` admits.

        Raises `RequestProblem` for a model that is not served or cannot be used, `Overloaded` where too many wait for adapters.
        """
        if name is None or name in self.fixed:
            return ModelLease(self.fixed[name] if name is not None else self.default)
        lease = await self._dynamic.take(name) if self._dynamic is not None else None
        if lease is None:
            known = [other for other in await self.names() if is_allowed(other)]
            message = f"model {name!r} is not served here.{did_you_mean(name, known)} This endpoint serves {_listed(known)}."
            raise RequestProblem(message, status=404, param="model", code="model_not_found")
        return lease


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, names[:most])) or "nothing for this key"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more (GET /v1/models)"
