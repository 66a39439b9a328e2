"""The models that one endpoint answers as: each a name, the engine behind it, how it is spoken to, and the adapter that it puts on.

Whoever asks takes a lease of a model and gives it back, so that an adapter in use stays in memory. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import did_you_mean
from apprentice.run.folder import PromptContract
from apprentice.serve.api.schemas import RequestProblem
from apprentice.serve.engines.base import Engine


@dataclass(frozen=True, eq=False)
class Model:
    """What requests for `name` are answered with; `adapter` is what its engine takes as a request's."""

    name: str
    engine: Engine
    layout: Layout
    contract: PromptContract | None = None
    adapter: Any = None


class Lease:
    """A model for one request; `release` may be called again."""

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
    """Models that come and go: `adapters.Adapters`."""

    async def names(self) -> list[str]:
        """All there are now."""

    async def take(self, name: str) -> Lease | None:
        """A lease of the model, loaded if need be; None if there is none of that name. Raises `RequestProblem` or `Overloaded`."""


class Catalogue:
    """`models` that are always there, the first of them where a request names none, and `more`."""

    def __init__(self, models: Sequence[Model], more: More | None = None) -> None:
        self.default = models[0]
        self.fixed = {model.name: model for model in models}
        self._more = more

    @property
    def engines(self) -> dict[str, Engine]:
        """Each engine under the name of its own model."""
        return {name: model.engine for name, model in self.fixed.items()}

    async def names(self) -> list[str]:
        more = await self._more.names() if self._more is not None else []
        return [*self.fixed, *(name for name in more if name not in self.fixed)]

    async def take(self, name: str | None, allowed: Callable[[str], bool] = lambda name: True) -> Lease:
        """A lease of the model; only those that are `allowed` are spoken of.

        Raises `RequestProblem` for a model that is not here or cannot be used, `Overloaded` where too many wait for adapters.
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
