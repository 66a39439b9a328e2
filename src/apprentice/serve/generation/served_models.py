"""Catalogue of the models that one endpoint serves: each has a name, an engine, a prompt format and perhaps an adapter.

A request takes a lease of a model and releases it at its end, so that an adapter in use stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import did_you_mean
from apprentice.run.contract import PromptContract
from apprentice.serve.api.schemas import RequestProblem
from apprentice.serve.engines.base import Engine


@dataclass(frozen=True, eq=False)
class Model:
    """A served model; `adapter` is what its engine expects as `Request.adapter`."""

    name: str
    engine: Engine
    layout: Layout
    contract: PromptContract | None = None
    adapter: Any = None


class Lease:
    """The right of one request to use a model; as a context manager it gives the model. `release` may be called again."""

    def __init__(self, model: Model, on_release: Callable[[], None] | None = None) -> None:
        self.model = model
        self._on_release = on_release

    def release(self) -> None:
        if self._on_release is not None:
            self._on_release()
        self._on_release = None

    def __enter__(self) -> Model:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.release()


class More(Protocol):
    """Protocol of a set of models that come and go; `adapters.Adapters` is one."""

    async def names(self) -> list[str]:
        """Names of all that are available now."""

    async def take(self, name: str) -> Lease | None:
        """A lease of the model, loaded if need be; None if there is none of that name.

        Raises `RequestProblem` or `Overloaded`.
        """


class Catalogue:
    """Permanent `models`, the first of which answers requests that name none, and those of `more`, which come and go."""

    def __init__(self, models: Sequence[Model], more: More | None = None) -> None:
        self.default = models[0]
        self.fixed = {model.name: model for model in models}
        self._more = more

    @property
    def engines(self) -> dict[str, Engine]:
        """Engines by the names of their models."""
        return {name: model.engine for name, model in self.fixed.items()}

    async def names(self) -> list[str]:
        more = await self._more.names() if self._more is not None else []
        return [*self.fixed, *(name for name in more if name not in self.fixed)]

    async def take(self, name: str | None, allowed: Callable[[str], bool] = lambda name: True) -> Lease:
        """A lease of the model `name` (None: the default). Error messages name only models that are `allowed`.

        Raises `RequestProblem` for a model that is not served or cannot be used, `Overloaded` where too many wait for adapters.
        """
        if name is None or name in self.fixed:
            return Lease(self.fixed[name] if name is not None else self.default)
        lease = await self._more.take(name) if self._more is not None else None
        if lease is None:
            known = [other for other in await self.names() if allowed(other)]
            message = f"model {name!r} is not served here.{did_you_mean(name, known)} This endpoint serves {_listed(known)}."
            raise RequestProblem(message, status=404, param="model", code="model_not_found")
        return lease


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, names[:most])) or "nothing for this key"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more (GET /v1/models)"
